"""SAQ on Redis, two processes: the program that is measured."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from progress import Counter
from saq import Queue

RESULTS = os.environ["PEER_RESULTS"] == "1"
TTL_S = 3600 if RESULTS else -1
AT_ONCE = 100

WORKERS = {"": [["saq", "saq_peer.settings", "--quiet", "--workers", "2"]]}
ENV: dict[str, str] = {}

queue = Queue.from_url(os.environ["PEER_BROKER"], name="peer")
counter = Counter(Path(os.environ["PEER_STORE"]) / "progress")


async def noop(_ctx: object) -> int:
    counter.tick()
    return 1


settings = {"queue": queue, "functions": [("noop", noop)], "concurrency": 100}


async def enqueue(count: int) -> None:
    await queue.connect()
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*[queue.enqueue("noop", ttl=TTL_S) for _ in range(min(AT_ONCE, count - start))])


async def roundtrip(timeout_s: float) -> None:
    await queue.connect()
    await queue.apply("noop", timeout=timeout_s, poll_interval=0.001)
