"""The pool of :class:`~dray.testing.InlineWorker`: tasks run one by one, when the test says so, and may "crash"."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from dray.core.contracts import Executor, NoOptions, PluginContext, Pool, PoolFeatures
from dray.core.errors import WorkerLost
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult


class InlinePool(Pool):
    """Holds deliveries until :meth:`run_next` runs one of them on the calling thread.

    It accepts every limit and enforces none: time stands still while a task runs.
    """

    api = 1
    features = PoolFeatures(interrupt=True, kill=True)
    capacity = 1

    def __init__(self, context: PluginContext) -> None:
        super().__init__(NoOptions(), context)
        self._pending: deque[Delivery] = deque()

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        self._executor, self._done = executor, done
        self._slot = _Slot(report)

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        self._pending.extend(deliveries)

    def next(self) -> Delivery | None:
        """What :meth:`run_next` would run."""
        return self._pending[0] if self._pending else None

    def run_next(self, *, crash: bool) -> Outcome:
        """Run one. ``crash``: its process dies once the function has returned, before anybody hears of it."""
        delivery = self._pending.popleft()
        outcome = self._run(delivery)
        if crash:
            outcome = self._executor.lost(delivery, WorkerLost("crash_next() ended the process that ran it"))
        self._done([outcome])
        return outcome

    def run_unheard(self) -> None:
        """Run one, and tell nobody: the whole worker dies with it."""
        self._run(self._pending.popleft())

    def _run(self, delivery: Delivery) -> Outcome:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._executor.run(delivery, self._slot)
        # An async test: a coroutine task needs a loop of its own, and a thread has one loop at a time.
        with ThreadPoolExecutor(1) as other_thread:
            return other_thread.submit(self._executor.run, delivery, self._slot).result()

    def recall(self) -> list[Delivery]:
        taken = list(self._pending)
        self._pending.clear()
        return taken

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        waiting = any(item is delivery for item in self._pending)
        if waiting:
            self._pending = deque(item for item in self._pending if item is not delivery)
        return waiting

    def stop(self, timeout_s: float) -> list[Delivery]:
        return self.recall()

    def running(self) -> list[RunningTask]:
        return []


class _Slot:
    """What the executor talks to."""

    def __init__(self, report: Callable[[Sequence[StoredResult]], None]) -> None:
        self._report = report

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None: ...

    def end(self) -> None: ...

    def report(self, result: StoredResult) -> None:
        self._report([result])
