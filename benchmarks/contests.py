"""What is measured on RabbitMQ and Redis, with how many tasks, and what dray is to reach there."""

from __future__ import annotations

from dataclasses import dataclass

SYSTEMS = {"quorum": "rabbitmq", "classic": "rabbitmq", "redis": "redis"}
"""Each kind of queue and the broker that it lives in."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One measurement of dray, repeated in each round; and the peers that do the same in between."""

    queue: str
    measure: str
    tasks: int
    results: bool = False
    peers: tuple[tuple[str, int], ...] = ()
    once: bool = False
    long: bool = False
    smoke: bool = False

    @property
    def system(self) -> str:
        return SYSTEMS[self.queue]

    @property
    def key(self) -> str:
        return f"{self.queue} {self.measure}{' with results' if self.results else ''} {self.tasks}"


@dataclass(frozen=True, slots=True)
class Reach:
    """One figure of a contest, and what it is to be: ``at_least``, or at most."""

    title: str
    contest: Contest
    figure: str
    goal: float
    at_least: bool = True


RABBITMQ_PEERS = (("dramatiq", 30_000), ("celery", 5_000), ("celery-solo", 12_000), ("taskiq", 10_000))
RABBITMQ_PEERS_RESULTS = (("dramatiq", 10_000), ("celery", 3_000), ("celery-solo", 5_000), ("taskiq", 5_000))
REDIS_PEERS = (
    ("dramatiq", 20_000), ("celery", 2_000), ("celery-solo", 5_000), ("taskiq", 12_000), ("huey", 8_000),
    ("saq", 8_000), ("rq", 800),
)  # fmt: skip
REDIS_PEERS_RESULTS = (
    ("dramatiq", 10_000), ("celery", 2_000), ("celery-solo", 3_000), ("taskiq", 6_000), ("huey", 6_000),
    ("saq", 8_000), ("rq", 800),
)  # fmt: skip
TRIPS, IDLE = 200, 2


def trips(*names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, TRIPS) for name in names)


QUORUM_DRAIN = Contest("quorum", "drain", 120_000, peers=RABBITMQ_PEERS)
QUORUM_DRAIN_RESULTS = Contest("quorum", "drain", 60_000, True, RABBITMQ_PEERS_RESULTS, smoke=True)
CLASSIC_DRAIN = Contest("classic", "drain", 80_000)
CLASSIC_LIVE = Contest("classic", "live", 60_000, smoke=True)
QUORUM_LIVE = Contest("quorum", "live", 80_000)
REDIS_DRAIN = Contest("redis", "drain", 200_000, peers=REDIS_PEERS, smoke=True)
REDIS_DRAIN_RESULTS = Contest("redis", "drain", 100_000, True, REDIS_PEERS_RESULTS)
REDIS_LIVE = Contest("redis", "live", 120_000)
REDIS_SEND = Contest("redis", "send", 200_000)
CLASSIC_SEND = Contest("classic", "send", 40_000)
QUORUM_SEND = Contest("quorum", "send", 80_000)
CLASSIC_LATENCY = Contest("classic", "latency", 500, True, trips("dramatiq", "celery", "celery-solo", "taskiq"))
REDIS_LATENCY = Contest(
    "redis", "latency", 500, True, trips("huey", "dramatiq", "celery", "celery-solo", "taskiq", "saq", "rq"), smoke=True
)
QUORUM_MEMORY = Contest("quorum", "memory", 100_000, once=True)
REDIS_MEMORY = Contest(
    "redis", "memory", 100_000, once=True, peers=tuple((name, IDLE) for name, _ in REDIS_PEERS)
)  # fmt: skip
SHALLOW = {queue: Contest(queue, "drain", 10_000, long=True) for queue in ("quorum", "redis")}
DEEP = {queue: Contest(queue, "drain", 1_000_000, once=True, long=True) for queue in ("quorum", "redis")}
ORDINARY = {"quorum": QUORUM_DRAIN, "redis": REDIS_DRAIN}
GROWTH = {queue: Contest(queue, "memory", 2_000_000, once=True, long=True) for queue in ("quorum", "redis")}

REACHES = (
    Reach("RabbitMQ quorum, drain", QUORUM_DRAIN, "per_s", 40_000),
    Reach("RabbitMQ quorum, drain, results in Redis", QUORUM_DRAIN_RESULTS, "per_s", 25_000),
    Reach("RabbitMQ classic, drain", CLASSIC_DRAIN, "per_s", 25_000),
    Reach("RabbitMQ classic, live", CLASSIC_LIVE, "per_s", 16_700),
    Reach("RabbitMQ quorum, live", QUORUM_LIVE, "per_s", 22_000),
    Reach("Redis, drain", REDIS_DRAIN, "per_s", 60_000),
    Reach("Redis, drain, results in Redis", REDIS_DRAIN_RESULTS, "per_s", 30_000),
    Reach("Redis, live", REDIS_LIVE, "per_s", 35_000),
    Reach("Redis, send_many()", REDIS_SEND, "send_many_per_s", 120_000),
    Reach("RabbitMQ classic, send_many(), confirmed", CLASSIC_SEND, "send_many_per_s", 18_000),
    Reach("RabbitMQ quorum, send_many(), confirmed", QUORUM_SEND, "send_many_per_s", 35_000),
    Reach("Redis, delay(), one thread", REDIS_SEND, "delay_per_s", 8_000),
    Reach("RabbitMQ classic, delay(), one thread", CLASSIC_SEND, "delay_per_s", 1_300),
    Reach("RabbitMQ classic, delay(), 16 threads", CLASSIC_SEND, "delay_threads_per_s", 8_000),
    Reach("RabbitMQ classic, round trip, median, ms", CLASSIC_LATENCY, "p50_ms", 0.75, at_least=False),
    Reach("RabbitMQ classic, round trip, slowest of 100, ms", CLASSIC_LATENCY, "p99_ms", 1.5, at_least=False),
    Reach("Redis, round trip, median, ms", REDIS_LATENCY, "p50_ms", 0.75, at_least=False),
    Reach("Redis, round trip, slowest of 100, ms", REDIS_LATENCY, "p99_ms", 1.5, at_least=False),
    Reach("Redis, drain, worker's processor time, µs a task", REDIS_DRAIN, "worker_cpu_us", 25, at_least=False),
    Reach("RabbitMQ quorum, drain, worker's processor time, µs", QUORUM_DRAIN, "worker_cpu_us", 35, at_least=False),
    Reach("Redis, idle worker, MB", REDIS_MEMORY, "idle_mb", 55, at_least=False),
    Reach("RabbitMQ, idle worker, MB", QUORUM_MEMORY, "idle_mb", 55, at_least=False),
    Reach("Redis, 100,000 tasks in an hour, worker + MB", REDIS_MEMORY, "delayed_mb", 2, at_least=False),
    Reach("RabbitMQ, 100,000 tasks in an hour, worker + MB", QUORUM_MEMORY, "delayed_mb", 2, at_least=False),
    Reach("Redis, growth over 2,000,000 tasks, MB", GROWTH["redis"], "growth_mb", 3, at_least=False),
    Reach("RabbitMQ, growth over 2,000,000 tasks, MB", GROWTH["quorum"], "growth_mb", 3, at_least=False),
)
DEEP_GOAL = 0.9

CONTESTS = (
    QUORUM_DRAIN, QUORUM_DRAIN_RESULTS, CLASSIC_DRAIN, CLASSIC_LIVE, QUORUM_LIVE, REDIS_DRAIN, REDIS_DRAIN_RESULTS,
    REDIS_LIVE, REDIS_SEND, CLASSIC_SEND, QUORUM_SEND, CLASSIC_LATENCY, REDIS_LATENCY, QUORUM_MEMORY, REDIS_MEMORY,
    *SHALLOW.values(), *DEEP.values(), *GROWTH.values(),
)  # fmt: skip
