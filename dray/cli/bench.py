"""``dray bench``: what this machine does with tasks that do nothing."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from dray.cli import Failure
from dray.cli.demo_tasks import nothing
from dray.cli.local import LocalWorker, caller, folder
from dray.cli.output import as_json, progress, table
from dray.cli.params import COUNT
from dray.cli.queues import inspectable

if TYPE_CHECKING:
    from dray.core.app import Dray
    from dray.core.worker import Worker

TARGET = "dray.cli.demo_tasks:app"
SINGLE_MAX = 2000
ROUND_TRIPS = 300
PATIENCE_S = 120.0
QUEUE = "default"


@dataclass(slots=True)
class Figures:
    """What was measured: tasks a second, milliseconds."""

    tasks: int
    delay_per_s: float
    send_many_per_s: float
    drain_per_s: float
    round_trip_p50_ms: float
    round_trip_p99_ms: float


@click.command("bench")
@click.option("--tasks", type=COUNT, default=20_000, show_default=True, help="How many to queue.")
@click.option("--transport", default="sqlite", show_default=True, help="The transport; results go to its back end.")
@click.option("--pool", default="prefork", show_default=True, help="The pool.")
@click.option("--size", type=COUNT, help="Its size; default: the pool's own.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def bench_command(tasks: int, transport: str, pool: str, size: int | None, json_: bool) -> None:
    """Measure this machine with tasks that do nothing.

    Caller and worker share this machine and a temporary folder; results are kept. What is measured is the queue's own
    cost, the least that a task can take: real tasks are slower by what they do, a slower disk by what it takes.
    """
    with folder(transport, pool, size) as place, caller(place) as app:
        app.task(name=nothing.name)(nothing.fn)
        inspectable(app.transport)
        if app.transport.features.shared:
            figures = _measure(app, tasks, LocalWorker(place, TARGET))
        else:
            figures = _in_this_process(app, tasks)
    if json_:
        as_json({"transport": transport, "pool": pool, "size": size, **asdict(figures)})
        return
    rows = [
        ("delay(), one at a time", f"{figures.delay_per_s:,.0f}/s"),
        ("send_many()", f"{figures.send_many_per_s:,.0f}/s"),
        (f"drain of {figures.tasks:,} tasks, results kept", f"{figures.drain_per_s:,.0f}/s"),
        ("round trip, delay() to get(), median", f"{figures.round_trip_p50_ms:.2f} ms"),
        ("round trip, slowest of 100", f"{figures.round_trip_p99_ms:.2f} ms"),
    ]
    table(("no-op tasks", f"{transport}, {pool}"), rows)


def _measure(app: Dray, tasks: int, worker: AbstractContextManager[object]) -> Figures:
    """Fill the queue; then start the worker and see how fast it empties; then one task at a time."""
    task = app.registry[nothing.name]
    singles = min(tasks, SINGLE_MAX)
    delay_s = _timed(lambda: [task.delay() for _ in range(singles)])
    many = max(tasks - singles, 1)
    many_s = _timed(lambda: app.send_many(task.s() for _ in range(many)))
    with worker:
        drain_per_s = _drain(app, singles + many, worker)
        trips = sorted(_timed(lambda: task.delay().get(PATIENCE_S)) * 1000 for _ in range(ROUND_TRIPS))
    return Figures(
        tasks=singles + many,
        delay_per_s=singles / delay_s,
        send_many_per_s=many / many_s,
        drain_per_s=drain_per_s,
        round_trip_p50_ms=statistics.median(trips),
        round_trip_p99_ms=trips[int(len(trips) * 0.99)],
    )


def _drain(app: Dray, total: int, worker: object) -> float:
    """Tasks a second, from the first that ended to the last: the worker's start does not count."""
    transport, pause = inspectable(app.transport), threading.Event()
    began, first = time.perf_counter(), None
    deadline = time.monotonic() + PATIENCE_S
    with progress() as bar:
        line = bar.add_task("draining", total=total)
        while True:
            stats, now = transport.stats([QUEUE])[QUEUE], time.perf_counter()
            left = stats.ready + stats.leased
            bar.update(line, completed=total - left)
            if left == 0:  # all of them between two looks: then the worker's start counts after all
                since, count = first or (began, total)
                return count / (now - since)
            if first is None and left < total:
                first = (now, left)
            if isinstance(worker, LocalWorker):
                worker.check()
            if time.monotonic() > deadline:
                raise Failure(f"{left:,} of {total:,} tasks are still queued after {PATIENCE_S:.0f} s")
            pause.wait(0.01)


class _Inside(AbstractContextManager["_Inside"]):
    """A worker of this process: lets it begin, and stops it."""

    def __init__(self, worker: Worker, go: threading.Event) -> None:
        self._worker = worker
        self._go = go

    def __enter__(self) -> _Inside:
        self._go.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()


def _in_this_process(app: Dray, tasks: int) -> Figures:
    """For a transport that no other process reaches: the worker on the main thread, the caller on another."""
    go, found = threading.Event(), list[Figures | Exception]()
    worker = app.worker()

    def call() -> None:
        try:
            found.append(_measure(app, tasks, _Inside(worker, go)))
        except Exception as error:
            found.append(error)
            go.set()
            worker.stop()

    caller_thread = threading.Thread(target=call, name="dray-bench")
    caller_thread.start()
    go.wait(PATIENCE_S)
    worker.run()
    caller_thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
