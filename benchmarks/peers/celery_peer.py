"""Celery: the program that is measured. Over files, RabbitMQ or Redis; prefork, or two solo workers."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from progress import Counter

STORE = Path(os.environ["PEER_STORE"])
BROKER = os.environ["PEER_BROKER"]
RESULTS = os.environ["PEER_RESULTS"] == "1"

LEAN = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "ERROR"]
WORKER = ["celery", "-A", "celery_peer", "worker", *LEAN]
WORKERS = {
    "": [[*WORKER, "-P", "prefork", "-c", "2"]],
    "solo": [[*WORKER, "-P", "solo", "-n", f"solo{number}@bench"] for number in (1, 2)],
}
ENV: dict[str, str] = {}


def over_files() -> Celery:
    for folder in ("queue", "control", "results"):
        (STORE / folder).mkdir(exist_ok=True)
    app = Celery("peer", broker="filesystem://", backend=f"file://{STORE}/results" if RESULTS else None)
    app.conf.broker_transport_options = {
        "data_folder_in": str(STORE / "queue"),
        "data_folder_out": str(STORE / "queue"),
        "control_folder": str(STORE / "control"),
        "polling_interval": 0.002,  # the default is a second, which would make every round trip a wait
    }
    app.conf.worker_enable_remote_control = False
    return app


def over_broker() -> Celery:
    # pyamqp: with librabbitmq installed, amqp means that, which kombu cannot consume with any more
    return Celery(
        "peer", broker=BROKER.replace("amqp://", "pyamqp://"), backend=os.environ["PEER_BACKEND"] if RESULTS else None
    )


app = over_broker() if BROKER else over_files()
app.conf.update(
    task_default_queue="peer",
    task_ignore_result=not RESULTS,
    worker_prefetch_multiplier=64,
    worker_redirect_stdouts=False,
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
