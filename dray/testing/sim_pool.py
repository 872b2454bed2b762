"""A pool whose slots are fibers: tasks take virtual time, may be ended, and their slots may die under them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dray.core.contracts import Executor, NoOptions, PluginContext, Pool, PoolFeatures
from dray.core.errors import SoftTimeLimitExceeded, TaskRevoked, TimeLimitExceeded, WorkerLost
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.testing.sim_audit import Audit
from dray.testing.sim_kernel import NEVER, Fiber, Kernel, Process


class Ended(BaseException):
    """Unwinds a task whose slot was ended from outside, or died."""


class SimSlot:
    """Where one task runs; what a task of a simulated world may ask for. See :class:`dray.core.contracts.Slot`."""

    def __init__(self, pool: SimPool) -> None:
        self._pool = pool
        self.fiber: Fiber | None = None
        self.delivery: Delivery | None = None
        self.picked_at = 0.0
        self.begun = False
        self.complete = False
        self.fate: Exception | None = None
        """Why the run was ended by the pool, or by the death of its process."""
        self.abandoned = False
        """The pool was stopped: nobody wants the outcome."""
        self.soft_at = self.hard_at = NEVER

    # --- the executor's side -------------------------------------------------------------------------------

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        assert self.delivery is not None
        if self.fate is not None:  # ended before it could begin
            raise Ended
        self.begun = True
        now = self._pool.kernel.now
        self.soft_at = NEVER if soft_s is None else now + soft_s
        self.hard_at = NEVER if hard_s is None else now + hard_s
        self._pool.audit.began(self._pool.process, self.delivery, self.picked_at)
        self._pool.kernel.current.slot = self

    def end(self) -> None:
        self.soft_at = self.hard_at = NEVER
        if self.complete and self.delivery is not None:
            self._pool.audit.ended(self._pool.process, self.delivery, True)
            self.begun = False

    def report(self, result: StoredResult) -> None:
        self._pool.report([result])

    # --- the task's side -----------------------------------------------------------------------------------

    def work(self, seconds: float) -> None:
        """Take so long, within the limits."""
        kernel = self._pool.kernel
        kernel.pause(min(kernel.now + seconds, self.soft_at, self.hard_at))
        if self.fate is not None:
            raise Ended
        if kernel.now >= self.hard_at:
            self.fate = TimeLimitExceeded("simulated: time_limit")
            raise Ended
        if kernel.now >= self.soft_at:
            self.soft_at = NEVER
            raise SoftTimeLimitExceeded("simulated: soft_time_limit")

    def die(self) -> None:
        """The child process dies under its task."""
        self.crash()
        raise Ended

    # --- the pool's side -----------------------------------------------------------------------------------

    def crash(self) -> None:
        """The slot's process dies."""
        if self.delivery is not None and self.fate is None:
            self._pool.audit.crashed(self.delivery.id)
            self.finish(WorkerLost("simulated: killed by signal 9"))

    def finish(self, fate: Exception) -> None:
        """End what runs."""
        if self.fate is None:
            self.fate = fate
            if self.fiber is not None and self.fiber is not self._pool.kernel.current:
                self._pool.kernel.wake(self.fiber)


class SimPool(Pool):
    """Slots in virtual time; keeps the contract that the real pools keep. See :class:`dray.core.contracts.Pool`."""

    api = 1
    features = PoolFeatures(interrupt=True, kill=True)

    def __init__(self, kernel: Kernel, process: Process, audit: Audit, capacity: int, context: PluginContext) -> None:
        super().__init__(NoOptions(), context)
        self.kernel = kernel
        self.process = process
        self.audit = audit
        self.capacity = capacity
        self.slots: list[SimSlot] = []
        self._queue: deque[Delivery] = deque()
        self._idle: list[SimSlot] = []
        self._stopped = False
        self._executor: Executor | None = None
        self._done: Callable[[Sequence[Outcome]], None] = lambda _: None
        self.report: Callable[[Sequence[StoredResult]], None] = lambda _: None

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        self._executor, self._done, self.report = executor, done, report
        for number in range(self.capacity):
            slot = SimSlot(self)
            self.slots.append(slot)
            slot.fiber = self.kernel.spawn(self.process, f"slot{number}", lambda slot=slot: self._serve(slot))  # type: ignore[misc]

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        self._queue.extend(deliveries)
        for slot in self._idle[: len(deliveries)]:
            assert slot.fiber is not None
            self.kernel.wake(slot.fiber)

    def recall(self) -> list[Delivery]:
        recalled = list(self._queue)
        self._queue.clear()
        return recalled

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        for waiting in self._queue:
            if waiting is delivery:
                self._queue.remove(waiting)
                return True
        for slot in self.slots:
            if slot.delivery is delivery and kill:
                slot.finish(TaskRevoked("simulated: terminated"))
                return True
        return False

    def stop(self, timeout_s: float) -> list[Delivery]:
        deadline = self.kernel.now + timeout_s
        while self.kernel.now < deadline and any(slot.delivery is not None for slot in self.slots):
            self.kernel.sleep(0.1)
        self._stopped = True
        unfinished = self.recall()
        for slot in self.slots:
            if slot.delivery is not None and not slot.abandoned:
                slot.abandoned = True
                unfinished.append(slot.delivery)
                slot.finish(WorkerLost("simulated: the pool stops"))
        return unfinished

    def running(self) -> list[RunningTask]:
        busy = [slot.delivery for slot in self.slots if slot.delivery is not None]
        return [RunningTask(delivery.id, delivery.headers.get("task", ""), 0.0, 0) for delivery in busy]

    # --- a slot's life -------------------------------------------------------------------------------------

    def _serve(self, slot: SimSlot) -> None:
        while not self._stopped:
            if not self._queue:
                self._idle.append(slot)
                self.kernel.pause()
                self._idle.remove(slot)
                continue
            self._run(slot, self._queue.popleft())

    def _run(self, slot: SimSlot, delivery: Delivery) -> None:
        assert self._executor is not None
        slot.delivery, slot.picked_at = delivery, self.kernel.now
        slot.begun, slot.complete, slot.fate, slot.abandoned = False, False, None, False
        self.kernel.sleep(self.kernel.random.random() * 0.002)
        outcome = None
        if slot.fate is None:
            outcome = self._executor.run(delivery, slot)
            self.process.check()
            if slot.begun:
                self.audit.ended(self.process, delivery, False)
            self.kernel.sleep(self.kernel.random.random() * 0.01)
        if slot.fate is not None:  # it may have died with the outcome in its hands
            outcome = self._executor.lost(delivery, slot.fate)
        slot.delivery = None
        if not slot.abandoned:
            assert outcome is not None
            self._done([outcome])
