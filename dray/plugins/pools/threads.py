"""The ``threads`` pool: tasks run on threads of the worker's own process."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dray.core.contracts import Executor, PluginContext, Pool, PoolFeatures
from dray.core.errors import ConfigError, DrayError, WorkerLost
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.plugins._softlimit import ThreadAlarms, ThreadLimit

_REPORT_S = 0.001
"""While there is more to run, finished outcomes are passed on this often."""


@dataclass(frozen=True, slots=True)
class ThreadsOptions:
    """Options of the ``threads`` pool."""

    size: int | None = None
    """Number of threads; default: the number of CPUs plus 4, at most 32."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"threads: size is {self.size}; it must be at least 1, or be left out")


class ThreadsPool(Pool):
    """Runs tasks on ``size`` threads: for tasks that wait (network, disk), not for those that compute.

    A soft limit raises ``SoftTimeLimitExceeded`` in the task the next time its thread runs Python code: one that sits
    in C code (a blocking read, ``time.sleep``, a long query) learns of it only when that returns. Nothing can end a
    thread for certain, so there are no hard limits, and tasks that outlast ``stop`` run on until the process ends; what
    they return then is dropped.
    """

    api = 1
    Options = ThreadsOptions
    features = PoolFeatures(interrupt=True, kill=False)

    def __init__(self, options: ThreadsOptions, context: PluginContext) -> None:
        super().__init__(options, context)
        self.capacity = options.size or min(32, (os.cpu_count() or 1) + 4)
        self._pending: deque[Delivery] = deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)
        self._waiting = 0
        self._runners: list[_Runner] = []
        self._stopping = False
        self._alarms: ThreadAlarms | None = None

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        self._executor, self._done, self._report = executor, done, report
        self._alarms = ThreadAlarms(self.context.clock, f"dray-alarms-{self.context.name}")
        self._runners = [_Runner(self, number) for number in range(self.capacity)]
        for runner in self._runners:
            runner.thread.start()

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        if not self._runners or self._stopping:
            raise DrayError(f"pool {self.context.name} is not running: start() it first, and submit before stop()")
        with self._lock:
            self._pending.extend(deliveries)
            if self._waiting:
                self._work.notify(min(self._waiting, len(deliveries)))

    def recall(self) -> list[Delivery]:
        with self._lock:
            taken = list(self._pending)
            self._pending.clear()
        return taken

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        del kill  # a thread cannot be killed
        with self._lock:
            for at, waiting in enumerate(self._pending):
                if waiting is delivery:
                    del self._pending[at]
                    return True
        return False

    def running(self) -> list[RunningTask]:
        tasks = (runner.running() for runner in self._runners)
        return [task for task in tasks if task is not None]
