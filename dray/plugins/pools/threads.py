"""The ``threads`` pool: tasks run on threads of the worker's own process."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dray.core.contracts import Executor, PluginContext, Pool, PoolFeatures
from dray.core.errors import ConfigError, DrayError
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.plugins._batcher import Batcher
from dray.plugins._escaped import outcome_of_escape
from dray.plugins._softlimit import ThreadAlarms, ThreadLimit


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
        self._waiting = 0
        self._runners: list[_Runner] = []
        self._stopping = False
        self._closed = False

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        context = self.context
        self._batcher = Batcher(done, context.clock, context.logger, context.name)
        self._alarms = ThreadAlarms(context.clock, f"dray-alarms-{context.name}")
        self._runners = [_Runner(self, executor, report, self._alarms) for _ in range(self.capacity)]
        for number, runner in enumerate(self._runners):
            runner.thread = threading.Thread(target=runner.serve, name=f"dray-{context.name}-{number}", daemon=True)
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
        tasks = [runner.running() for runner in self._runners]
        return [task for task in tasks if task is not None]

    def stop(self, timeout_s: float) -> list[Delivery]:
        if not self._runners:
            return []
        with self._lock:
            self._stopping = True
            self._work.notify_all()
        monotonic = self.context.clock.monotonic
        deadline = monotonic() + timeout_s
        for runner in self._runners:
            runner.thread.join(max(deadline - monotonic(), 0.0))
        with self._lock:
            self._closed = True
            running = [runner.delivery for runner in self._runners if runner.delivery and not runner.finishing]
            finishing = [runner for runner in self._runners if runner.finishing]
            unfinished = [*running, *self._pending]
            self._pending.clear()
        for runner in finishing:
            runner.thread.join()
        self._alarms.close()
        self._batcher.close()
        self._runners = []
        return unfinished

    # --- called by the runners

    def take(self, runner: _Runner) -> Delivery | None:
        """The next delivery for this runner, as soon as there is one; None: the end."""
        with self._lock:
            runner.delivery = None
            runner.finishing = False
            while not self._pending and not self._stopping:
                self._waiting += 1
                try:
                    self._work.wait()
                finally:
                    self._waiting -= 1
            if self._stopping:
                return None
            return runner.claim(self._pending.popleft())

    def finish(self, runner: _Runner, outcome: Outcome) -> None:
        """The runner's delivery came to this; too late once ``stop`` has given it back."""
        with self._lock:
            if self._closed:
                return
            runner.finishing = True
        self._batcher.add(outcome, more=bool(self._pending))


class _Runner:
    """One thread, and the slot that the executor talks to."""

    thread: threading.Thread

    def __init__(
        self,
        pool: ThreadsPool,
        executor: Executor,
        report: Callable[[Sequence[StoredResult]], None],
        alarms: ThreadAlarms,
    ) -> None:
        self._pool = pool
        self._executor = executor
        self._report = report
        self._monotonic = pool.context.clock.monotonic
        self._limit = ThreadLimit(alarms)
        self._task = ""
        self._began = 0.0
        self.delivery: Delivery | None = None
        self.finishing = False

    def serve(self) -> None:
        """The thread."""
        pool, run = self._pool, self._executor.run
        while (delivery := pool.take(self)) is not None:
            try:
                outcome = run(delivery, self)
            except BaseException as error:
                self.end()
                outcome = outcome_of_escape(self._executor, delivery, error)
            pool.finish(self, outcome)

    def claim(self, delivery: Delivery) -> Delivery:
        self.delivery = delivery
        self._task = ""
        self._began = self._monotonic()
        return delivery

    def running(self) -> RunningTask | None:
        delivery = self.delivery
        if delivery is None:
            return None
        return RunningTask(delivery.id, self._task or delivery.headers.get("task", ""), self._began, os.getpid())

    # --- the slot

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        del hard_s  # a thread cannot be killed
        self._task = task
        if soft_s is not None:
            self._limit.arm(task, soft_s)

    def end(self) -> None:
        if self._limit.armed:
            self._limit.disarm()

    def report(self, result: StoredResult) -> None:
        self._limit.shield(self._report, [result])
