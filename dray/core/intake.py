"""Demand -> receive -> submit: how messages get into a worker's pool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from dray.core.contracts import Consumer, Tombstones
from dray.core.demand import Demand
from dray.core.errors import CodecError, TransportError
from dray.core.executor import attempt_of
from dray.core.message import Delivery, Outcome
from dray.core.parts import WorkerParts

log = logging.getLogger(__name__)
RECEIVE_S = 5.0
BACKLOG_MAX = 2000


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
        """Set when there may be room for more."""

    def step(self) -> bool:
        """Receive and submit once; False when there is no room: wait for :attr:`room`. Raises ``TransportError``."""
        parts = self._parts
        self._target = self._demand.target(self._done, parts.clock.monotonic())
        wanted = self._demand.wanted(self.held, self._target)
        if wanted <= 0 or parts.settler.backlog > BACKLOG_MAX or parts.settler.store_is_away:
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
            elif parts.fallback.rearms:
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
        self.look()

    def returned(self, count: int) -> None:
        """The pool gave this many back: they say nothing about its speed."""
        with self._lock:
            self._returned += count
        self.look()

    def look(self) -> None:
        """Set :attr:`room` if there is some. Not otherwise: waking a thread costs more than running several tasks."""
        if self._demand.wanted(self.held, self._target) > 0:
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
