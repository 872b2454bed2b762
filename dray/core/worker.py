"""One worker: demand -> receive -> submit; and its life: start, warm stop, cold stop."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dray.core.clock import Clock, Random
from dray.core.contracts import Consumer, Durability, Pool, ResultBackend, Tombstones, Transport
from dray.core.demand import Demand
from dray.core.errors import CodecError, ConfigError, TransportError
from dray.core.executor import TaskExecutor, attempt_of
from dray.core.fallback import Fallback
from dray.core.faults import Faults
from dray.core.hooks import Hooks
from dray.core.message import Delivery, Outcome, StoredResult
from dray.core.settler import NOTHING_TO_DO, Settler

log = logging.getLogger(__name__)
RECEIVE_S = 5.0
BACKLOG_MAX = 2000
FLUSH_S = 10.0
EXIT_WARM, EXIT_FAILED, EXIT_COLD = 0, 1, 3
"""Exit codes: stopped in order; the worker itself failed; stopped cold, running tasks were given back."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of."""

    name: str
    queues: Sequence[str]
    transport: Transport
    backend: ResultBackend
    pool: Pool
    executor: TaskExecutor
    settler: Settler
    fallback: Fallback
    hooks: Hooks
    clock: Clock
    random: Random
    faults: Faults | None
    shutdown_timeout_s: float
    max_deliveries: Mapping[str, int] = field(default_factory=dict)
    max_deliveries_default: int = 5
    require_durability: Durability | None = None
    on_ready: Callable[[], None] = lambda: None
    """Called on the main thread once connections are open and tasks are taken."""


class Intake:
    """Takes messages in: asks for as many as are wanted, sorts out what must not run, hands the rest to the pool.

    ``step`` makes one attempt; owned by one thread. ``done`` may be called from any.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._demand = Demand(parts.pool.capacity)
        self._lock = threading.Lock()
        self._target = parts.pool.capacity
        self._submitted = 0
        self._done = 0
        self._returned = 0
        self._consumer: Consumer | None = None
        self.room = threading.Event()
        """Set when something was done: there may be room for more."""

    def step(self) -> bool:
        """Receive and submit once; False when there is no room: wait for :attr:`room`. Raises ``TransportError``."""
        parts = self._parts
        self._target = self._demand.target(self._done, parts.clock.monotonic())
        wanted = self._demand.wanted(self.held, self._target)
        if wanted <= 0 or parts.settler.backlog > BACKLOG_MAX:
            return False
        if self._consumer is None:
            self._consumer = parts.transport.consumer(parts.queues, wanted)
        deliveries = self._consumer.receive(wanted, RECEIVE_S)
        if deliveries:
            if parts.faults is not None:
                parts.faults.hit("received")
            parts.settler.track(deliveries)
            try:
                runnable = self._admit(deliveries)
            except BaseException:
                parts.settler.give_back(deliveries)  # else their leases would be kept, and nobody would run them
                raise
            with self._lock:
                self._submitted += len(runnable)
            parts.pool.submit(runnable)
            if parts.faults is not None:
                parts.faults.hit("handed_over")
        return True

    def _admit(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Those that may run; the others are settled without the pool."""
        parts, refused = self._parts, list[Outcome]()
        marks: Mapping[str, str] = {}
        if isinstance(parts.transport, Tombstones):
            marks = parts.transport.buried([delivery.id for delivery in deliveries])
        runnable = []
        for delivery in deliveries:
            limit = parts.max_deliveries.get(delivery.queue, parts.max_deliveries_default)
            outcome = None
            if delivery.id in marks:
                outcome = self._buried(delivery, marks[delivery.id])
            elif delivery.delivery_count > limit:
                outcome = parts.executor.undeliverable(
                    delivery,
                    f"handed out {delivery.delivery_count} times, max_deliveries is {limit}: its workers were lost",
                )
            elif not parts.fallback.native:
                outcome = self._early(delivery)
            if outcome is None:
                runnable.append(delivery)
            else:
                refused.append(outcome)
        if parts.hooks.task_received is not None:
            for delivery in runnable:
                parts.hooks.task_received(
                    task=delivery.headers.get("task", ""),
                    id=delivery.id,
                    queue=delivery.queue,
                    attempt=attempt_of(delivery),
                    delivery_count=delivery.delivery_count,
                )
        if refused:
            parts.settler.collect(refused)
        return runnable

    def _buried(self, delivery: Delivery, mark: str) -> Outcome:
        if mark == "ended":
            log.warning("task %s has ended before: this copy is not run", delivery.id)
            return self._parts.executor.replayed(delivery)
        if mark == "dead":  # a replay, or its worker was lost before the dead letter was written
            return self._parts.executor.undeliverable(delivery, "it has ended among the dead letters before")
        return self._parts.executor.revoked(delivery)

    def _early(self, delivery: Delivery) -> Outcome | None:
        try:
            settlement = self._parts.fallback.early(delivery)
        except CodecError:
            return None  # the executor refuses it with a reason
        return None if settlement is None else Outcome(settlement, None)

    def done(self, count: int) -> None:
        """The pool ended this many."""
        with self._lock:
            self._done += count
        self.room.set()

    def returned(self, count: int) -> None:
        """The pool gave this many back: they say nothing about its speed."""
        with self._lock:
            self._returned += count
        self.room.set()

    @property
    def held(self) -> int:
        """Deliveries that the pool has."""
        return self._submitted - self._done - self._returned

    def surplus(self) -> int:
        """How many are held beyond what the measured rate justifies: others could run them."""
        return self.held - 2 * self._target

    def wake(self) -> None:
        """Make a blocked ``step`` return. Any thread, a signal handler included."""
        self.room.set()
        if self._consumer is not None:
            self._consumer.wake()

    def disconnect(self) -> None:
        """Let go of the consumer; the next ``step`` opens another."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            try:
                consumer.close()
            except TransportError as error:
                log.debug("closing the consumer: %s", error)


class Worker:
    """Runs the tasks of some queues in one pool until it is told to stop.

    Responsibilities: the threads (intake, settler, keeper, orders) around steps that do not know them; starting in the
    order that forks before it threads; stopping so that nothing is lost and nothing runs twice.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._intake = Intake(parts)
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._settled_all = threading.Event()
        self._idle = threading.Event()
        self._failure: BaseException | None = None
        self._recalling = threading.Lock()

    def run(self) -> int:
        """Work until :meth:`stop`; on the main thread, so that solo tasks and signals are there. Returns an exit code."""
        parts = self._parts
        parts.pool.start(parts.executor, self._done, self._report)
        try:
            parts.transport.open()
            self._check_durability()
            parts.backend.open()
            parts.transport.declare(list(parts.queues))
        except BaseException:
            parts.pool.stop(0)
            raise
        threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"dray-{loop.__name__[1:-5]}", daemon=True)
            for loop in (self._intake_loop, self._settler_loop, self._keeper_loop, self._orders_loop)
        ]
        for thread in threads:
            thread.start()
        if parts.hooks.worker_started is not None:
            parts.hooks.worker_started(worker=parts.name, queues=list(parts.queues))
        parts.on_ready()
        patience_s = parts.shutdown_timeout_s
        try:
            parts.pool.run(self._stopping)
        except Exception as error:
            log.critical("the pool failed: %s", error)
            self._failure, patience_s = error, 0.0
            self._warm()
        self._shut_down(threads, patience_s)
        return EXIT_FAILED if self._failure is not None else EXIT_WARM

    def stop(self) -> None:
        """Warm stop: take nothing more, give back what has not begun, finish what runs. Any thread, a signal handler too."""
        self._orders.put(self._warm)

    def stop_cold(self) -> None:
        """End at once: what runs is ended and given back; the process exits with ``EXIT_COLD``. As :meth:`stop`."""
        self._orders.put(self._cold)

    # --- the loops -----------------------------------------------------------------------------------------

    def _intake_loop(self) -> None:
        pause_s, intake, clock = 0.05, self._intake, self._parts.clock
        while not self._stopping.is_set():
            intake.room.clear()
            try:
                if not intake.step():
                    intake.room.wait(1.0)
                pause_s = 0.05
            except TransportError as error:
                log.warning("receiving failed, trying again in %.1f s: %s", pause_s, error)
                intake.disconnect()
                clock.wait(self._stopping, pause_s * self._parts.random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, 5.0)
        intake.disconnect()

    def _settler_loop(self) -> None:
        settler = self._parts.settler
        while not self._settled_all.is_set():
            pause_s = settler.step()
            self._intake.room.set()  # it may wait for a backlog to shrink
            if pause_s == NOTHING_TO_DO:
                settler.wake.wait(1.0)
            elif pause_s > 0:
                self._parts.clock.wait(self._settled_all, pause_s)

    def _keeper_loop(self) -> None:
        """Leases, revocations and surplus. Runs no user code and never waits for any."""
        parts, clock = self._parts, self._parts.clock
        lease_s = parts.transport.features.lease_s
        renew_s = lease_s / 3 if lease_s is not None else float("inf")
        renewed, crowded = clock.monotonic(), 0
        while not clock.wait(self._settled_all, min(1.0, renew_s)):
            try:
                if clock.monotonic() - renewed >= renew_s:
                    renewed = clock.monotonic()
                    self._renew()
                self._revoke()
                crowded = crowded + 1 if self._intake.surplus() > 0 else 0
                if crowded >= 2 and not self._stopping.is_set():
                    self._recall()
                    crowded = 0
            except TransportError as error:
                log.warning("keeping leases: %s", error)

    def _orders_loop(self) -> None:
        """Obeys: on its own thread, because a signal handler must take no lock, and a task may hold the main one."""
        while (order := self._orders.get()) is not None:
            order()

    def _guard(self, loop: Callable[[], None]) -> None:
        """A loop that dies takes the worker down in order: a supervisor starts a new one, leases bring the work back."""
        try:
            loop()
        except BaseException as error:
            log.critical("the worker's %s failed", loop.__name__, exc_info=True)
            self._failure = error
            self._warm()

    def _check_durability(self) -> None:
        required, features = self._parts.require_durability, self._parts.transport.features
        if required is not None and features.durability < required:
            raise ConfigError(
                f"require_durability is {required.name}, and the transport {self._parts.transport.context.name!r} keeps "
                f"{features.durability.name} as it is set up here"
            )

    # --- pieces --------------------------------------------------------------------------------------------

    def _done(self, outcomes: Sequence[Outcome]) -> None:
        self._parts.settler.collect(outcomes)
        self._intake.done(len(outcomes))
        if self._stopping.is_set() and self._intake.held <= 0:
            self._idle.set()

    def _report(self, results: Sequence[StoredResult]) -> None:
        self._parts.settler.report(results)

    def _renew(self) -> None:
        lost = self._parts.settler.renew()
        for delivery in lost:
            log.warning("the lease of task %s was lost: another worker may run it", delivery.id)
            if self._parts.pool.cancel(delivery):
                self._intake.returned(1)

    def _revoke(self) -> None:
        parts = self._parts
        if not isinstance(parts.transport, Tombstones):
            return
        held = parts.settler.in_flight()
        marks = parts.transport.buried([delivery.id for delivery in held]) if held else {}
        for delivery in held:
            mark = marks.get(delivery.id)
            if mark in ("revoked", "terminate"):
                if parts.pool.cancel(delivery):
                    self._intake.returned(1)
                    parts.settler.collect([parts.executor.revoked(delivery)])
                elif mark == "terminate":
                    parts.pool.cancel(delivery, kill=True)

    def _recall(self) -> None:
        with self._recalling:
            recalled = self._parts.pool.recall()
        if recalled:
            log.debug("%d tasks that have not begun are given back", len(recalled))
            self._intake.returned(len(recalled))
            self._parts.settler.give_back(recalled)

    def _shut_down(self, threads: list[threading.Thread], patience_s: float) -> None:
        parts = self._parts
        intake, settler, *_ = threads
        if parts.hooks.worker_stopping is not None:
            parts.hooks.worker_stopping(worker=parts.name)
        intake.join(RECEIVE_S + 5)
        self._recall()
        if parts.faults is not None:
            parts.faults.hit("draining")
        self._idle.clear()  # the last step of the intake may have begun another one since it was set
        if self._intake.held > 0:
            running = parts.pool.running()
            log.info("stopping: up to %.0f s for %d running tasks", patience_s, len(running))
            self._idle.wait(patience_s)
        parts.settler.give_back(parts.pool.stop(0))
        self._flush(settler)
        if parts.hooks.worker_stopped is not None:
            parts.hooks.worker_stopped(worker=parts.name)

    def _flush(self, thread: threading.Thread) -> None:
        """Settle what is left, then end the settler's and the keeper's thread."""
        clock, settler = self._parts.clock, self._parts.settler
        deadline, nobody = clock.monotonic() + FLUSH_S, threading.Event()
        while settler.backlog and thread.is_alive() and clock.monotonic() < deadline:
            clock.wait(nobody, 0.005)
        self._settled_all.set()
        settler.wake.set()
        thread.join(FLUSH_S)
        self._orders.put(None)
        if settler.backlog:
            log.error("%d outcomes could not be settled; their tasks run again when their leases end", settler.backlog)

    def _warm(self) -> None:
        self._stopping.set()
        self._intake.wake()

    def _cold(self) -> None:
        parts = self._parts
        self._warm()
        unfinished = parts.pool.stop(0)
        log.warning("cold stop: %d running tasks are given back", len(unfinished))
        parts.settler.give_back(unfinished)
        deadline, nobody = parts.clock.monotonic() + FLUSH_S, threading.Event()
        while parts.settler.backlog and parts.clock.monotonic() < deadline:
            parts.clock.wait(nobody, 0.005)
        logging.shutdown()
        os._exit(EXIT_COLD)
