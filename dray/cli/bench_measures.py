"""What ``dray bench`` measures, each over a rig of its own. Rates are tasks a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from dray.cli.bench_load import Figures
from dray.cli.bench_rig import Rig

SINGLE_MAX, THREADED_MAX = 2_000, 8_000
TRIPS_MAX = 500
DELAYED_MAX = 100_000
IDLE_TASKS = 20
WARM_SHARE = 10


def send(rig: Rig, count: int) -> Figures:
    """Calls of one process, nobody takes the tasks: ``delay()`` from one thread and from many, ``send_many()``."""
    one = rig.load("single", min(count, SINGLE_MAX))
    threads = rig.load("single", min(count, THREADED_MAX), rig.setup.threads)
    many = rig.load("many", count)
    return {
        "delay_per_s": one["per_s"],
        "delay_threads_per_s": threads["per_s"],
        "send_many_per_s": many["per_s"],
        "delay_cpu_us": one["cpu_us"],
        "send_many_cpu_us": many["cpu_us"],
    }


def drain(rig: Rig, count: int) -> Figures:
    """The tasks are queued, then a worker starts: from the first that is executed to the last."""
    rig.load("many", count)
    began = time.perf_counter()
    with rig.worker():
        first = rig.until(1)
        figures = _Usage(rig).until(count)
    if not figures["per_s"]:  # all of them between two looks: then the worker's start counts after all
        figures["per_s"] = count / (time.perf_counter() - began)
    return figures | {"start_s": first - began}


def live(rig: Rig, count: int) -> Figures:
    """A caller queues the tasks while the worker runs them: from the first call to the last that is executed."""
    with rig.worker():
        rig.load("many", IDLE_TASKS)
        rig.until(IDLE_TASKS)
        with rig.caller("many", count) as caller:
            rig.until(IDLE_TASKS + 1)  # the caller's first task, which opened its connection
            usage = _Usage(rig)
            caller.go()
            figures = usage.until(IDLE_TASKS + count)
            sent = caller.result()
    return figures | {"send_per_s": sent["per_s"], "send_cpu_us": sent["cpu_us"]}


def latency(rig: Rig, count: int) -> Figures:
    """One task at a time, from ``delay()`` to the end of ``get()``, with a worker that has nothing else to do."""
    with rig.worker():
        took_ms = rig.load("trips", min(count, TRIPS_MAX))["took_ms"]
    return {
        "p50_ms": statistics.median(took_ms),
        "p99_ms": took_ms[int(len(took_ms) * 0.99)],
        "slowest_ms": took_ms[-1],
    }


def memory(rig: Rig, count: int) -> Figures:
    """What the worker and its children hold: idle; warm; what it grows by from there; what tasks in an hour add."""
    with rig.worker():
        rig.load("many", IDLE_TASKS)
        rig.until(IDLE_TASKS)
        idle = rig.worker_pss_mb()
        warm = _after(rig, max(count // WARM_SHARE, IDLE_TASKS))
        grown = _after(rig, count)
        rig.load("delayed", min(count, DELAYED_MAX))
        delayed = _after(rig, IDLE_TASKS)
    return {
        "idle_mb": idle,
        "warm_mb": warm,
        "growth_mb": _less(grown, warm),
        "delayed": min(count, DELAYED_MAX),
        "delayed_mb": _less(delayed, grown),
    }


MEASURES: Mapping[str, Callable[[Rig, int], Figures]] = MappingProxyType(
    {"send": send, "drain": drain, "live": live, "latency": latency, "memory": memory}
)
SEVERAL_PROCESSES = frozenset({"live", "memory"})
"""Those that say nothing when caller and worker share a process."""
WITH_RESULTS = frozenset({"latency"})


class _Usage:
    """The rate from now on, and what worker and broker use meanwhile."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._worker, self._broker = rig.worker_cpu_s(), rig.broker_cpu_s()
        self._began, self._already = time.perf_counter(), rig.ran()

    def until(self, total: int) -> Figures:
        """The figures when ``total`` tasks have run."""
        ended = self._rig.until(total)
        worker, broker = self._rig.worker_cpu_s(), self._rig.broker_cpu_s()
        count = total - self._already
        seconds = ended - self._began
        return {
            "per_s": count / seconds if count else None,
            "seconds": seconds,
            "worker_cpu_us": _each(_less(worker, self._worker), count),
            "broker_cpu_us": _each(_less(broker, self._broker), count),
        }


def _after(rig: Rig, count: int) -> float | None:
    """The worker's memory when it has run this many more."""
    total = rig.ran() + count
    rig.load("many", count)
    rig.until(total)
    return rig.worker_pss_mb()


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _each(seconds: float | None, count: int) -> float | None:
    return None if seconds is None or not count else seconds / count * 1e6
