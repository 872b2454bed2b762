"""Huey on SQLite or Redis: the program that is measured."""

from __future__ import annotations

import os
from pathlib import Path

from huey import RedisHuey, SqliteHuey
from progress import Counter

STORE = Path(os.environ["PEER_STORE"])
BROKER = os.environ["PEER_BROKER"]
RESULTS = os.environ["PEER_RESULTS"] == "1"

# A consumer polls SQLite. Its default pause (0.1 s, growing to 10 s) would make every round trip a wait.
POLLING = [] if BROKER else ["-d", "0.002", "-m", "0.002"]
WORKERS = {"": [["huey_consumer", "huey_peer.huey", "-k", "process", "-w", "2", *POLLING, "-n", "-q"]]}
ENV: dict[str, str] = {}

if BROKER:
    huey = RedisHuey("peer", url=BROKER, results=RESULTS)
else:
    huey = SqliteHuey("peer", filename=str(STORE / "huey.db"), results=RESULTS)
counter = Counter(STORE / "progress")


@huey.task()
def noop() -> int | None:
    counter.tick()
    return 1 if RESULTS else None


def enqueue(count: int) -> None:
    for _ in range(count):
        noop()


def roundtrip(timeout_s: float) -> None:
    noop().get(blocking=True, timeout=timeout_s, backoff=1.0, max_delay=0.001)
