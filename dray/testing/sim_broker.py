"""The reference transport and result back end, shared by the processes of a simulated world, behind injected faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dray.core.contracts import Consumer, NoOptions, PluginContext, ResultBackend, Transport, TransportFeatures
from dray.core.errors import TransportError, Unavailable
from dray.core.fallback import DEAD_SUFFIX
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.plugins._memory import MemoryStore
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing.sim_audit import Audit
from dray.testing.sim_faults import Chaos
from dray.testing.sim_kernel import EPOCH, Fiber, Process

LEASE_S = 9.0
POOR_DELAY_S = 12.0


class SimTransport(Transport):
    """One process's connection to the world's broker.

    ``poor``: a broker without dead letters, releases, priorities, long delays and transactions, so that the core
    emulates them, and a follow-up may be published whose delivery is not removed.
    """

    api = 1

    def __init__(
        self, process: Process, chaos: Chaos, audit: Audit, store: MemoryStore, context: PluginContext, poor: bool
    ) -> None:
        super().__init__(MemoryOptions(lease=LEASE_S), context)
        self.process = process
        self.chaos = chaos
        self.audit = audit
        self.inner = MemoryTransport(MemoryOptions(lease=LEASE_S), context, store)
        self.features: TransportFeatures = self.inner.features
        self.stopping = False
        """The worker was told to stop: it may give back what was begun."""
        self.sent: list[Outgoing] = []
        """What this process sent: an eavesdropper may send it again."""
        self._on_wire = ""
        if poor:
            self.features = replace(
                self.features,
                dead_letter=False,
                release=False,
                max_delay_s=POOR_DELAY_S,
                priorities=3,
                atomic_then=False,
            )

    def open(self) -> None:
        self.chaos.call(self.process, "transport.open", (), lambda _: self.inner.open())

    def send(self, messages: Sequence[Outgoing]) -> None:
        self._check(messages)
        self.chaos.call(self.process, "transport.send", messages, self._send, cut=self._send)

    def _send(self, messages: Sequence[Outgoing]) -> None:
        self.inner.send(messages)
        self.audit.published(messages)
        self.sent.extend(messages)
        self.chaos.kernel.note(f"sent {[message.id for message in messages]}")

    def consumer(self, queues: Sequence[str], buffer: int) -> SimConsumer:
        return SimConsumer(self, queues)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        for settlement in settlements:
            self._check(settlement.then)
            if not self.features.release and settlement.action is not Action.ACK:
                self.audit.broken("fallback", f"{settlement.action} on a transport that cannot")
        self._enter("settle")
        try:
            return self.chaos.call(self.process, "transport.settle", settlements, self._settle, cut=self._cut)
        finally:
            self._on_wire = ""

    def _settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost = self.inner.settle(settlements)
        gone = {id(delivery) for delivery in lost}
        for settlement in settlements:
            delivery = settlement.delivery
            if id(delivery) not in gone:
                letters = [message for message in settlement.then if message.queue.endswith(DEAD_SUFFIX)]
                for letter in letters:
                    self.audit.put_aside(letter)
                self.audit.settled(settlement, self.stopping)
                self.chaos.kernel.note(f"settled {delivery.id} {settlement.action.value} then {len(settlement.then)}")
        return lost

    def _cut(self, settlements: Sequence[Settlement]) -> None:
        """Interrupted: the last one's follow-ups may be there already, where that is not one transaction."""
        if settlements and not self.features.atomic_then and self.chaos.kernel.random.random() < 0.5:
            *settlements, torn = settlements
            if torn.delivery.receipt in self.inner.store.leases and torn.then:
                self.inner.send(torn.then)
                self.audit.doubled(torn.delivery.id)
        self._settle(settlements)

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        def apply(some: Sequence[Delivery]) -> list[Delivery]:
            return self.inner.extend(some, lease_s)

        self._enter("extend")
        try:
            return self.chaos.call(self.process, "transport.extend", deliveries, apply, cut=apply)
        finally:
            self._on_wire = ""

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        def apply(ids: Sequence[str]) -> None:
            some = {task_id: marks[task_id] for task_id in ids}
            self.audit.barred(some)
            self.chaos.kernel.note(f"buried {some}")
            self.inner.bury(some, expires_at, hasten)

        self.chaos.call(self.process, "transport.bury", list(marks), apply, cut=apply)

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        return self.chaos.call(self.process, "transport.buried", ids, self.inner.buried)

    def exhume(self, ids: Sequence[str]) -> None:
        self.chaos.call(self.process, "transport.exhume", ids, self.inner.exhume, cut=self.inner.exhume)

    def _enter(self, what: str) -> None:
        if self._on_wire:
            self.audit.broken("contract", f"{what} while {self._on_wire} runs")
        self._on_wire = what

    def _check(self, messages: Sequence[Outgoing]) -> None:
        latest = EPOCH + self.chaos.kernel.now + self.features.max_delay_s
        for message in messages:
            if message.not_before is not None and message.not_before > latest:
                self.audit.broken("fallback", f"{message.id}: a longer delay than the transport keeps")
            if message.priority and self.features.priorities == 1:
                self.audit.broken("fallback", f"{message.id}: a priority, and the transport knows none")


class SimConsumer(Consumer):
    """Waits for messages in virtual time."""

    def __init__(self, transport: SimTransport, queues: Sequence[str]) -> None:
        self.queues = tuple(queues)
        self._transport = transport
        self._store = transport.inner.store
        self._inner = transport.inner.consumer(queues, 0)
        self._number = transport.chaos.kernel.random.getrandbits(30)
        self._poked = False
        self._woken = False
        self._broken = False
        self._waiting: Fiber | None = None

    def __hash__(self) -> int:
        """Not its address: the store keeps consumers in a set, whose order must not differ between two runs."""
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        transport, kernel = self._transport, self._transport.chaos.kernel
        if self._broken:
            transport.audit.broken("contract", "a consumer is used after it failed")
        deadline = kernel.now + timeout_s
        while True:
            found = self._claim(limit)
            if found or self._woken or kernel.now >= deadline:
                self._woken = False
                return found
            if not self._poked:
                self._waiting = kernel.current
                kernel.pause(min(deadline, self._store.next_event_at(self.queues) - EPOCH + 0.001))
                self._waiting = None

    def _claim(self, limit: int) -> list[Delivery]:
        transport, handed_out = self._transport, list[Delivery]()

        def apply(_: Sequence[None]) -> list[Delivery]:
            now = transport.context.clock.time()
            transport.audit.expired([number for number, lease in self._store.leases.items() if lease.until <= now])
            self._store.waiters.discard(self)
            self._poked = False
            handed_out.extend(self._inner.receive(limit, 0))
            transport.audit.claimed(transport.process, handed_out)
            if handed_out:
                transport.chaos.kernel.note(f"claimed {[(d.id, d.delivery_count) for d in handed_out]}")
            else:
                self._store.waiters.add(self)
            return handed_out

        try:
            return transport.chaos.call(transport.process, "transport.receive", (), apply, lost=Unavailable)
        except Unavailable:
            self._broken = True
            transport.audit.orphaned(handed_out)
            raise

    def poke(self) -> None:
        self._poked = True
        if self._waiting is not None:
            self._transport.chaos.kernel.wake(self._waiting)

    def wake(self) -> None:
        self._woken = True
        self.poke()

    def close(self) -> None:
        self._store.waiters.discard(self)


class SimBackend(ResultBackend):
    """One process's connection to the world's result store."""

    api = 1

    def __init__(self, process: Process, chaos: Chaos, audit: Audit, inner: MemoryBackend) -> None:
        super().__init__(NoOptions(), inner.context)
        self.features = inner.features
        self._process = process
        self._chaos = chaos
        self._audit = audit
        self._inner = inner

    def open(self) -> None:
        self._chaos.call(self._process, "backend.open", (), lambda _: None)

    def store(self, results: Sequence[StoredResult]) -> None:
        try:
            self._chaos.call(self._process, "backend.store", results, self._store, cut=self._store)
        except TransportError:
            self._audit.store_failed(results)
            raise

    def _store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            if result.id.startswith("cursed") and result.state is State.SUCCESS:
                raise ValueError("simulated: an error that the back end should not raise")
        self._inner.store(results)
        self._audit.stored(self._inner.fetch([result.id for result in results]))
        self._chaos.kernel.note(f"stored {[(result.id, result.state.value) for result in results]}")

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        return self._chaos.call(self._process, "backend.fetch", ids, self._inner.fetch)

    def delete(self, ids: Sequence[str]) -> None:
        self._chaos.call(self._process, "backend.delete", ids, self._inner.delete, cut=self._inner.delete)
