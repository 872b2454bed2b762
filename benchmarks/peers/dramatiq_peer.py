"""Dramatiq on RabbitMQ or Redis: the program that is measured."""

from __future__ import annotations

import os
from pathlib import Path

import dramatiq
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from progress import Counter

BROKER = os.environ["PEER_BROKER"]
RESULTS = os.environ["PEER_RESULTS"] == "1"

WORKERS = {"": [["dramatiq", "dramatiq_peer", "-p", "2", "-t", "4", "-Q", "peer"]]}
# By default it fetches two messages a thread, which makes it two to five times slower than it can be.
ENV = {"dramatiq_queue_prefetch": "1000"}

if BROKER.startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=BROKER)
else:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    broker = RabbitmqBroker(url=BROKER)
if RESULTS:
    broker.add_middleware(Results(backend=RedisBackend(url=os.environ["PEER_BACKEND"])))
dramatiq.set_broker(broker)
counter = Counter(Path(os.environ["PEER_STORE"]) / "progress")


@dramatiq.actor(queue_name="peer", **({"store_results": True} if RESULTS else {}))
def noop() -> int | None:
    counter.tick()
    return 1 if RESULTS else None


def enqueue(count: int) -> None:
    for _ in range(count):
        noop.send()


def roundtrip(timeout_s: float) -> None:
    noop.send().get_result(block=True, timeout=int(timeout_s * 1000))
