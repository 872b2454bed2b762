"""taskiq on RabbitMQ (aio-pika) or a Redis stream, two processes: the program that is measured."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from progress import Counter

BROKER = os.environ["PEER_BROKER"]
RESULTS = os.environ["PEER_RESULTS"] == "1"
AT_ONCE = 100

TUNED = ["--workers", "2", "--max-async-tasks", "500", "--max-prefetch", "500", "--no-parse", "--log-level", "ERROR"]
WORKERS = {"": [["taskiq", "worker", "taskiq_peer:broker", *TUNED]]}
ENV: dict[str, str] = {}

if BROKER.startswith("redis"):
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(BROKER, queue_name="peer")
else:
    from taskiq_aio_pika import AioPikaBroker

    broker = AioPikaBroker(BROKER, queue_name="peer", qos=1000)
if RESULTS:
    from taskiq_redis import RedisAsyncResultBackend

    broker = broker.with_result_backend(RedisAsyncResultBackend(os.environ["PEER_BACKEND"], result_ex_time=3600))
counter = Counter(Path(os.environ["PEER_STORE"]) / "progress")
started = False


@broker.task(task_name="noop")
async def noop() -> int:
    counter.tick()
    return 1


async def _start() -> None:
    global started
    if not started:
        await broker.startup()
        started = True


async def enqueue(count: int) -> None:
    await _start()
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*[noop.kiq() for _ in range(min(AT_ONCE, count - start))])


async def roundtrip(timeout_s: float) -> None:
    await _start()
    await (await noop.kiq()).wait_result(check_interval=0.0005, timeout=timeout_s)
