"""Celery with its filesystem transport, prefork: the program that is measured."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from progress import Counter

STORE = Path(os.environ["PEER_STORE"])
RESULTS = os.environ["PEER_RESULTS"] == "1"

WORKER = ["celery", "-A", "celery_peer", "worker", "-P", "prefork", "-c", "2", "-l", "ERROR"]
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]

for folder in ("queue", "control", "results"):
    (STORE / folder).mkdir(exist_ok=True)

app = Celery("peer", broker="filesystem://", backend=f"file://{STORE}/results" if RESULTS else None)
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(STORE / "queue"),
        "data_folder_out": str(STORE / "queue"),
        "control_folder": str(STORE / "control"),
        "polling_interval": 0.002,  # the default is a second, which would make every round trip a wait
    },
    task_ignore_result=not RESULTS,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
)
counter = Counter(STORE / "progress")


@app.task(name="noop")
def noop() -> int:
    counter.tick()
    return 1


def enqueue(count: int) -> None:
    with app.producer_or_acquire() as producer:
        for _ in range(count):
            noop.apply_async(producer=producer)


def roundtrip(timeout_s: float) -> None:
    noop.delay().get(timeout=timeout_s, interval=0.001)
