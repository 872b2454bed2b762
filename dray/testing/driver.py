"""A worker that a test drives by hand: the worker's own steps, one after the other, on a clock that the test moves."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

from dray.core.app import Connections, Dray
from dray.core.contracts import ResultBackend
from dray.core.errors import DrayError, ResultTimeout
from dray.core.executor import attempt_of
from dray.core.message import TERMINAL, Action, DeadLetter, Delivery, Outgoing, Settlement, State
from dray.core.options import parse_seconds
from dray.core.result import Results, Snapshot
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.backends.null import NullBackend
from dray.testing.clock import FakeClock
from dray.testing.inline_steps import InlineSteps, PolledTransport

TASKS_MAX = 10_000
"""A single call of the driver that runs more tasks than this is taken for an endless loop."""


class Call(NamedTuple):
    """A call, as it stands in a queue."""

    id: str
    task: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    queue: str
    priority: int = 0
    eta: float | None = None
    """When it becomes due (epoch seconds of the worker's clock); None: it is due."""
    attempt: int = 0
    """Retries so far."""
    reason: str | None = None
    """Of a dead letter: why it is one."""


class Run(NamedTuple):
    """One run of a task."""

    call: Call
    state: str
    """``SUCCESS``, ``FAILURE``, ``RETRY``, or ``CRASHED``."""


class InlineWorker:
    """Runs an app's tasks inside a test: deterministic, in one thread, without a server and without waiting.

    ::

        with InlineWorker(app) as worker:
            result = send_invoice.delay(7)           # the code under test, unchanged
            assert worker.queued()[0].args == [7]
            worker.run_until_idle()                  # runs it, and whatever it queues
            assert result.get() == "sent"            # a get() runs what is queued by itself
            remind.apply_async((7,), countdown=3600)
            worker.advance("1h")                     # time passes, what falls due runs at its time
            worker.crash_next()                      # the process that runs the next task dies
            assert not worker.dead()

    Within the block all calls of the app go to a memory transport, and its results to a memory back end; the
    configured ones are not loaded. All else is real: arguments and results pass through the configured serializer,
    signature and compression, and the steps are those of a worker (receive, admit, run, settle), with its retries,
    dead letters, revocations and hooks. Tasks of all queues are run, in the order in which a worker takes them.
    ``settings`` are settings that this test wants otherwise, as ``Dray(...)`` takes them.

    The clock starts at ``start`` (default: now) and stands still, except in :meth:`advance` and while somebody waits
    for a result; ids are ``task-1``, ``task-2``...; jitter comes from ``seed``. Time limits are accepted and not
    enforced. With ``backend: null`` configured no results are kept, as in production. For one thread; not reentrant.
    """

    def __init__(self, app: Dray, *, start: float | None = None, seed: int = 0, **settings: object) -> None:
        self.app = app
        self.clock = FakeClock(time.time() if start is None else start)
        self.runs: list[Run] = []
        """What ran so far, oldest first."""
        self._seed = seed
        self._settings = settings
        self._crash: str | None = None
        self._running = 0
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> InlineWorker:
        self._twin = twin = self.app.replica(
            clock=self.clock, ids=_Numbered(), random_source=random.Random(self._seed), **self._settings
        )
        twin.import_tasks()
        self._transport = PolledTransport(PolledTransport.Options(), twin.plugin_context("transports", "memory"))
        kind = NullBackend if twin.config.backend.use == "null" else MemoryBackend
        backend: ResultBackend = kind(kind.Options(), twin.plugin_context("backends", "memory"))
        self._connections: Connections = twin.compose(self._transport, backend, self._make_results)
        with contextlib.ExitStack() as stack:
            stack.enter_context(twin.substituted(self._connections))
            stack.enter_context(self.app.substituted(self._connections))
            self._workers = [InlineSteps(twin)]
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # --- driving -------------------------------------------------------------------------------------------

    def run_until_idle(self, limit: int = TASKS_MAX) -> int:
        """Run what is due, and what that queues, until nothing is due; returns how many runs it took.

        A task that fails raises nothing here: ask its result, :meth:`dead` or :attr:`runs`. Raises ``DrayError`` after
        ``limit`` runs: tasks queue each other for ever.
        """
        before = len(self.runs)
        while self._step():
            if len(self.runs) - before >= limit:
                names = sorted({run.call.task for run in self.runs[-100:]})
                raise DrayError(f"{limit} runs and no end; the last ones were of {', '.join(names)}")
        return len(self.runs) - before

    def run_next(self) -> Run | None:
        """Run one task that is due; None when none is."""
        before = len(self.runs)
        while len(self.runs) == before and self._step():
            pass
        return self.runs[before] if len(self.runs) > before else None

    def advance(self, duration: float | str | timedelta, limit: int = TASKS_MAX) -> int:
        """Let time pass: seconds, ``"1h30m"`` or a ``timedelta``. What falls due meanwhile runs at its own time.

        Returns how many runs it took; raises as :meth:`run_until_idle`.
        """
        seconds = duration.total_seconds() if isinstance(duration, timedelta) else parse_seconds(duration)
        end, before = self.clock.time() + seconds, len(self.runs)
        self.run_until_idle(limit)
        while (due := self._next_event()) <= end:
            self._move_to(due)
            self.run_until_idle(limit - (len(self.runs) - before))
        self._move_to(end)
        self.run_until_idle()
        return len(self.runs) - before

    def crash_next(self, *, whole_worker: bool = False) -> None:
        """The next task that runs is run, and its process dies (as by SIGKILL) before anybody hears of it.

        It comes back at once, as from a process pool; at the third time it is a dead letter (poison). With
        ``whole_worker`` all processes die: it comes back when its lease ends, 30 seconds later: ``advance("30s")``.
        """
        self._crash = "worker" if whole_worker else "process"

    # --- looking -------------------------------------------------------------------------------------------

    def queued(self, queue: str | None = None) -> list[Call]:
        """What waits, due or not: of one queue, or of all by name; within a queue in the order it would be run."""
        queues = self._transport.queues() if queue is None else [queue]
        return [self._call(message) for name in queues for message in self._transport.peek(name, TASKS_MAX)]

    def dead(self, queue: str | None = None) -> list[Call]:
        """The dead letters, the oldest first, with their reasons."""
        return [self._call(letter) for letter in reversed(self._transport.dead_list(queue, TASKS_MAX))]

    def states(self) -> dict[str, State]:
        """The stored states by task id; what is queued and has none is not among them."""
        seen = {run.call.id for run in self.runs} | {call.id for call in (*self.queued(), *self.dead())}
        return {key: State(stored.state) for key, stored in self._connections.backend.fetch(sorted(seen)).items()}

    # --- pieces --------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One round of a worker: look after leases, receive, run one, settle. False: nothing was there."""
        for part in (self._transport, self._connections.backend):
            part.open()  # the code under test may have closed the app
        for worker in self._workers:
            worker.keeper.step()
        worker = self._workers[-1]
        refused = worker.receive(self._transport.queues())
        delivery = worker.pool.next()
        if delivery is None:
            return refused
        self._run(worker, self._call(delivery))
        worker.settle()
        return True

    def _run(self, worker: InlineSteps, call: Call) -> None:
        crash, self._crash = self._crash, None
        self._running += 1
        try:
            if crash == "worker":
                worker.pool.run_unheard()
                self._workers[-1] = InlineSteps(self._twin)
                state = "CRASHED"
            else:
                settlement = worker.pool.run_next(crash=crash is not None).settlement
                state = "CRASHED" if crash else _state(settlement)
        finally:
            self._running -= 1
        self.runs.append(Run(call, state))

    @contextlib.contextmanager
    def _another_worker(self) -> Iterator[None]:
        """A task waits for others: another worker runs them, this one is busy."""
        self._workers.append(InlineSteps(self._twin))
        try:
            yield
        finally:
            self._workers.pop().end()

    def _next_event(self) -> float:
        """When a delayed message is due, or the lease of a crashed worker ends."""
        store = self._transport.opened()
        ours = {delivery.receipt for worker in self._workers for delivery in worker.parts.settler.in_flight()}
        with store.lock:
            leases = [lease.until for receipt, lease in store.leases.items() if receipt not in ours]
            delayed = [queue.delayed[0][0] for queue in store.queues.values() if queue.delayed]
        return min(leases + delayed, default=math.inf)

    def _move_to(self, moment: float) -> None:
        self.clock.advance(max(moment - self.clock.time(), 0.0))

    def _call(self, message: Outgoing | Delivery | DeadLetter) -> Call:
        """A message in the user's terms; its arguments are empty where they cannot be decoded."""
        headers = message.headers
        delivery = Delivery(message.queue, message.id, message.body, headers, None)
        args: Sequence[Any] = ()
        kwargs: Mapping[str, Any] = {}
        with contextlib.suppress(DrayError):
            args, kwargs = self._twin.codec.decode_call(delivery)
        return Call(
            message.id,
            headers.get("task", ""),
            args,
            kwargs,
            message.queue,
            getattr(message, "priority", 0),
            getattr(message, "not_before", None),
            attempt_of(delivery),
            getattr(message, "reason", None),
        )

    def _make_results(self, *parts: Any) -> Results:
        return _DrivenResults(*parts, wait_for=self._wait_for)

    def _wait_for(self, ids: Sequence[str], timeout_s: float | None) -> None:
        """Run, and let time pass, until all these have ended. Raises ``ResultTimeout``."""
        with self._another_worker() if self._running else contextlib.nullcontext():
            end = None if timeout_s is None else self.clock.time() + timeout_s
            self.run_until_idle()
            while left := [key for key in ids if key not in self._ended(ids)]:
                due = self._next_event()
                if due == math.inf or (end is not None and due > end):
                    why = (
                        "nothing that is queued will bring it" if due == math.inf else f"not there after {timeout_s} s"
                    )
                    self._move_to(self.clock.time() if end is None else end)
                    raise ResultTimeout(f"the result of {left[0]}: {why}")
                self._move_to(due)
                self.run_until_idle()

    def _ended(self, ids: Sequence[str]) -> set[str]:
        return {key for key, stored in self._connections.backend.fetch(ids).items() if stored.state in TERMINAL}


class _DrivenResults(Results):
    """Who waits for a result drives the worker."""

    def __init__(self, *parts: Any, wait_for: Callable[[Sequence[str], float | None], None]) -> None:
        super().__init__(*parts)
        self._wait_for = wait_for

    def wait(self, ids: Sequence[str], timeout_s: float | None) -> Iterator[tuple[str, Snapshot]]:
        self.require(ids)
        self._wait_for(ids, timeout_s)
        return super().wait(ids, timeout_s)

    async def await_(self, ids: Sequence[str], timeout_s: float | None) -> dict[str, Snapshot]:
        self.require(ids)
        self._wait_for(ids, timeout_s)
        return await super().await_(ids, timeout_s)


class _Numbered:
    """Ids that a test can read."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def new(self) -> str:
        return f"task-{next(self._numbers)}"


def _state(settlement: Settlement) -> str:
    if settlement.action is Action.DEAD:
        return "FAILURE"
    again = any(message.id == settlement.delivery.id for message in settlement.then)
    return "RETRY" if again else "SUCCESS"
