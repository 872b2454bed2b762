"""The caller's side of a measurement: queues tasks, or waits for the result of each.

``dray bench`` runs it as a process of its own, for whatever shares a process with it would be measured as well:
``python -m dray.cli.bench_load FOLDER KIND COUNT BATCH THREADS``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dray.cli.bench_progress import Counter
from dray.cli.bench_tasks import SENT, register
from dray.core.app import Dray
from dray.core.task import BoundTask, Task

WARM_UP_TRIPS = 50
AN_HOUR_S = 3600
PATIENCE_S = 30.0
Figures = dict[str, Any]


class Load:
    """Calls of the measured task through one application.

    Each kind makes ``count`` calls. The first one is not timed: it opens the connection.
    """

    def __init__(self, app: Dray, folder: Path) -> None:
        self._app = app
        self._task = register(app)
        self._sent = Counter(folder / SENT)

    def prepare(self) -> None:
        """Connect."""
        self._app.connect()

    def run(self, kind: str, count: int, batch: int, threads: int, started: Callable[[], object]) -> Figures:
        """``many``, ``delayed``, ``single`` or ``trips``; ``started`` is called, and waited for, after the first calls.

        ``began`` is on the clock of ``time.perf_counter``, which all processes of a machine share.
        """
        count -= self._warm_up(kind)
        started()
        cpu_s, began = time.process_time(), time.perf_counter()
        took_ms: list[float] = []
        if kind == "trips":
            took_ms = self._trips(count)
        elif kind == "single":
            self._single(count, threads)
        else:
            self._many(self._delayed() if kind == "delayed" else self._task, count, batch)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
        cpu_us = cpu_s / max(count, 1) * 1e6
        return {"began": began, "per_s": count / seconds, "cpu_us": cpu_us, "took_ms": took_ms}

    def _delayed(self) -> BoundTask[[], None]:
        return self._task.options(countdown=AN_HOUR_S)

    def _warm_up(self, kind: str) -> int:
        """How many of the calls that were asked for this made."""
        if kind == "trips":
            for _ in range(WARM_UP_TRIPS):
                self._task.delay().get(PATIENCE_S)
            return 0
        (self._delayed() if kind == "delayed" else self._task).delay()
        self._sent.tick()
        return 1

    def _many(self, task: Task[[], None] | BoundTask[[], None], count: int, batch: int) -> None:
        while count:
            size = min(count, batch)
            if size == 1:
                task.delay()
            else:
                self._app.send_many(task.s() for _ in range(size))
            self._sent.tick(size)
            count -= size

    def _single(self, count: int, threads: int) -> None:
        shares = [count // threads + (at < count % threads) for at in range(threads)]
        if threads == 1:
            self._delay(count)
        else:
            with ThreadPoolExecutor(threads) as callers:
                list(callers.map(self._delay, shares))

    def _delay(self, count: int) -> None:
        delay, tick = self._task.delay, self._sent.tick
        for _ in range(count):
            delay()
            tick()

    def _trips(self, count: int) -> list[float]:
        took_ms = []
        for _ in range(count):
            began = time.perf_counter()
            self._task.delay().get(PATIENCE_S)
            took_ms.append((time.perf_counter() - began) * 1000)
            self._sent.tick()
        return sorted(took_ms)


def _wait_for_go() -> None:
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()


def main() -> None:
    """The process: says ``ready`` when it is connected, starts at the line ``go``, prints its figures."""
    folder, kind, *numbers = sys.argv[1:]
    count, batch, threads = map(int, numbers)
    with Dray(config=Path(folder) / "dray.yaml") as app:
        load = Load(app, Path(folder))
        load.prepare()
        print(json.dumps(load.run(kind, count, batch, threads, _wait_for_go)), flush=True)


if __name__ == "__main__":
    main()
