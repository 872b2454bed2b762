"""The ``solo`` pool: tasks run one after the other on the process's main thread. No hand-off, the least overhead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from dray.core.contracts import Executor, PluginContext, Pool, PoolFeatures
from dray.core.errors import DrayError
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.plugins._batcher import Batcher
from dray.plugins._escaped import outcome_of_escape
from dray.plugins._softlimit import SignalLimit, ThreadAlarms, ThreadLimit

_LOOK_S = 0.05
"""How often an idle pool looks whether it is to stop: that event is not ours, nobody wakes us for it."""


class SoloPool(Pool):
    """Runs tasks inside :meth:`run`, one at a time.

    On the main thread a soft limit is a ``SIGALRM`` (tasks must leave that signal alone) and interrupts blocking calls
    too; on any other thread it is raised the next time the task runs Python code. A task cannot be killed, so there
    are no hard limits; a task that outlasts ``stop`` runs on, and what it returns is dropped.
    """

    api = 1
    features = PoolFeatures(interrupt=True, kill=False)
    capacity = 1

    def __init__(self, options: object, context: PluginContext) -> None:
        super().__init__(options, context)
        self._monotonic = context.clock.monotonic
        self._pending: deque[Delivery] = deque()
        self._lock = threading.Lock()  # guards taking from the queue against looking through it
        self._wake = threading.Event()
        self._idle = False
        self._running = threading.Lock()
        self._batcher: Batcher | None = None
        self._slot: _Slot | None = None
        self._stopping = False
        self._closed = False

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        self._executor = executor
        self._alarms = ThreadAlarms(self.context.clock, f"dray-alarms-{self.context.name}")
        self._slot = _Slot(report, self._alarms)
        self._batcher = Batcher(done, self.context.clock, self.context.logger, self.context.name)

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        if self._batcher is None or self._stopping:
            raise DrayError(f"pool {self.context.name} is not running: start() it first, and submit before stop()")
        with self._lock:
            self._pending.extend(deliveries)
        if self._idle:
            self._wake.set()

    def run(self, stopping: threading.Event) -> None:
        slot, batcher = self._slot, self._batcher
        if slot is None or batcher is None:
            raise DrayError(f"pool {self.context.name} was not started: start() it before run()")
        with self._running:
            slot.enter()
            try:
                while not self._stopping and not stopping.is_set():
                    if not self._pending:
                        self._wait()
                    elif not self._run_next(slot, batcher):
                        return
            finally:
                slot.leave()

    def _run_next(self, slot: _Slot, batcher: Batcher) -> bool:
        """Run one delivery; False: ``stop`` did not wait for it."""
        with self._lock:
            if not self._pending:
                return True
            slot.delivery = delivery = self._pending.popleft()
        slot.task, slot.began = "", self._monotonic()
        try:
            outcome = self._executor.run(delivery, slot)
        except BaseException as error:
            slot.end()
            outcome = outcome_of_escape(self._executor, delivery, error)
        with self._lock:
            slot.delivery = None
            if self._closed:  # stop() has given it back
                return False
        batcher.add(outcome, bool(self._pending))
        return True

    def _wait(self) -> None:
        self._wake.clear()
        self._idle = True
        if not self._pending and not self._stopping:
            self._wake.wait(_LOOK_S)
        self._idle = False

    def recall(self) -> list[Delivery]:
        with self._lock:
            taken = list(self._pending)
            self._pending.clear()
        return taken

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        del kill  # the main thread cannot be killed
        with self._lock:
            for at, waiting in enumerate(self._pending):
                if waiting is delivery:
                    del self._pending[at]
                    return True
        return False

    def running(self) -> list[RunningTask]:
        task = self._slot.running() if self._slot is not None else None
        return [task] if task is not None else []

    def stop(self, timeout_s: float) -> list[Delivery]:
        if self._batcher is None or self._slot is None:
            return []
        self._stopping = True
        self._wake.set()
        ended = self._running.acquire(timeout=max(timeout_s, 0))
        with self._lock:
            self._closed = True
            current, self._slot.delivery = self._slot.delivery, None
            unfinished = [*([current] if current is not None else []), *self._pending]
            self._pending.clear()
            passing_on = not ended and current is None
        if passing_on:
            ended = self._running.acquire()
        if ended:
            self._running.release()
        self._alarms.close()
        self._batcher.close()
        return unfinished


class _Slot:
    """What the executor talks to."""

    def __init__(self, report: Callable[[Sequence[StoredResult]], None], alarms: ThreadAlarms) -> None:
        self._report = report
        self._alarms = alarms
        self._limit: SignalLimit | ThreadLimit = ThreadLimit(alarms)
        self.task = ""
        self.began = 0.0
        self.delivery: Delivery | None = None

    def enter(self) -> None:
        """Tasks run on this thread from now on."""
        if threading.current_thread() is threading.main_thread():
            self._limit = SignalLimit(_Slot.begin, _Slot.end)
        else:
            self._limit = ThreadLimit(self._alarms)

    def leave(self) -> None:
        self._limit.close()

    def running(self) -> RunningTask | None:
        delivery = self.delivery
        if delivery is None:
            return None
        return RunningTask(delivery.id, self.task or delivery.headers.get("task", ""), self.began, os.getpid())

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        del hard_s  # the main thread cannot be killed
        self.task = task
        if soft_s is not None:
            self._limit.arm(task, soft_s)

    def end(self) -> None:
        if self._limit.armed:
            self._limit.disarm()

    def report(self, result: StoredResult) -> None:
        self._limit.shield(self._report, [result])
