"""RQ on Redis, two simple workers (they do not fork for each job): the program that is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

from progress import Counter
from redis import Redis
from rq import Queue

BROKER = os.environ["PEER_BROKER"]
RESULTS = os.environ["PEER_RESULTS"] == "1"
RESULT_TTL_S = 500 if RESULTS else 0
AT_ONCE = 1000

WORKERS = {"": [["rq", "worker", "peer", "-q", "-w", "rq.worker.SimpleWorker", "--url", BROKER]] * 2}
ENV: dict[str, str] = {}

queue = Queue("peer", connection=Redis.from_url(BROKER))
counter = Counter(Path(os.environ["PEER_STORE"]) / "progress")


def noop() -> int | None:
    counter.tick()
    return 1 if RESULTS else None


def enqueue(count: int) -> None:
    for start in range(0, count, AT_ONCE):
        queue.enqueue_many(
            [Queue.prepare_data(noop, result_ttl=RESULT_TTL_S) for _ in range(min(AT_ONCE, count - start))]
        )


def roundtrip(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    job = queue.enqueue(noop, result_ttl=RESULT_TTL_S)
    while job.latest_result() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(job.id)
        time.sleep(0.0005)
