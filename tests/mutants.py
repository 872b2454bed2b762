"""Plugins that are wrong in one way each, and the means to run a kit against them in this process.

Each is a bug that real task queues have had. The reference they are made from is right, and passes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dray.core.clock import Clock
from dray.core.contracts import Consumer, NoOptions, Pool, Transport, TransportFeatures
from dray.core.errors import NotSupported, TooLarge
from dray.core.message import TERMINAL, Action, Delivery, Outcome, Outgoing, Settlement, StoredResult
from dray.plugins._memory import Lease, MemoryStore
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.pools.threads import ThreadsOptions, ThreadsPool
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing import PoolConformance, ResultBackendConformance, TransportConformance, plugin_context
from dray.testing.kit import Conformance
from dray.testing.pool_kit import pool_context

# --- running a kit -----------------------------------------------------------------------------------------


def first_failure(kit_class: type[Conformance], folder: Path, *, leave_out: Sequence[str] = ()) -> str | None:
    """Run a kit's tests, as pytest would; the name of the first one that fails."""
    for name in kit_class.kit_tests():
        if name in leave_out:
            continue
        test = getattr(kit_class, name)
        for number, arguments in enumerate(_arguments(test)):
            kit = kit_class()
            place = folder / f"{name}-{number}"
            place.mkdir(parents=True)
            kit.begin(place)
            try:
                if not kit.undeclared(test):
                    test(kit, **arguments, **_fixtures(kit, test))
            except (Exception, pytest.fail.Exception):
                return name
            finally:
                kit.end()
    return None


def _arguments(test: Any) -> Iterator[dict[str, Any]]:
    """What ``parametrize`` asks for."""
    columns = [
        [{mark.args[0]: value} for value in mark.args[1]]
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "parametrize"
    ]
    for row in itertools.product(*columns):
        yield {key: value for cell in row for key, value in cell.items()}


def _fixtures(kit: Any, test: Any) -> dict[str, Any]:
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    offered = {"start": lambda: kit.started, "harness": lambda: kit.started(2)}
    return {name: make() for name, make in offered.items() if name in wanted}


# --- transports --------------------------------------------------------------------------------------------


class Reference(MemoryTransport):
    """The memory transport, whose store outlives it: the store stands for a server."""


class ReferenceKit(TransportConformance):
    """The kit over a variant of the reference."""

    transport: type[MemoryTransport] = Reference
    store_class: type[MemoryStore] = MemoryStore

    def begin(self, tmp_path: Path) -> None:
        self.store = self.store_class()
        super().begin(tmp_path)

    def make(self, clock: Clock) -> Transport:
        return self.transport(MemoryOptions(), plugin_context("memory", clock), self.store)

    def abilities(self) -> Mapping[str, bool]:
        return {**super().abilities(), "durable": True}


def kit_of(transport: type[MemoryTransport] = Reference, store: type[MemoryStore] = MemoryStore) -> type[ReferenceKit]:
    return type("Kit", (ReferenceKit,), {"transport": transport, "store_class": store})


class AckOnReceive(Reference):
    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        with self.store.lock:
            self.store.put([message for settlement in settlements for message in settlement.then], self._now())
        return []

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        return []

    def _now(self) -> float:
        return self.context.clock.time()


class AckOnReceiveStore(MemoryStore):
    def claim(self, queues: Sequence[str], limit: int, now: float, lease_s: float) -> list[Delivery]:
        found = super().claim(queues, limit, now, lease_s)
        for delivery in found:
            del self.leases[delivery.receipt]
        return found


class SettleById(Reference):
    """Whoever held a message once can settle it, whoever holds it now."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        holders = {lease.message.body: receipt for receipt, lease in self.store.leases.items()}
        current = [
            settlement._replace(delivery=settlement.delivery._replace(receipt=holders.get(settlement.delivery.body)))
            for settlement in settlements
        ]
        lost = super().settle(current)
        return [
            old.delivery
            for old, new in zip(settlements, current, strict=True)
            if any(new.delivery is one for one in lost)
        ]


class NoExpiry(MemoryStore):
    def _expire(self, now: float) -> None:
        return


class CountReset(MemoryStore):
    def give_back(self, leases: Sequence[Lease], now: float, taken_back: int) -> None:
        super().give_back([lease._replace(deliveries=taken_back) for lease in leases], now, taken_back)


class VolatileLeases(Reference):
    """What is handed out is known to the process alone."""

    def close(self) -> None:
        super().close()
        self.store.leases.clear()


class EarlyDelay(MemoryStore):
    def claim(self, queues: Sequence[str], limit: int, now: float, lease_s: float) -> list[Delivery]:
        for name in queues:
            self.queue(name).promote(now + 4)
        return super().claim(queues, limit, now, lease_s)


class RejectDrops(Reference):
    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return super().settle(
            [item._replace(action=Action.ACK) if item.action is Action.DEAD else item for item in settlements]
        )


class DuplicateThen(Reference):
    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return super().settle([item._replace(then=item.then * 2) for item in settlements])


class ForgottenThen(Reference):
    """Only what is acknowledged has follow-ups."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return super().settle([item if item.action is Action.ACK else item._replace(then=()) for item in settlements])


class ThenOfLost(Reference):
    """Publishes ``then`` before it looks whose the delivery is."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost = super().settle(settlements)
        with self.store.lock:
            for item in settlements:
                if item.delivery in lost:
                    self.store.put(item.then, self.context.clock.time())
        return lost


class SharedDelivery(MemoryStore):
    def claim(self, queues: Sequence[str], limit: int, now: float, lease_s: float) -> list[Delivery]:
        found = super().claim(queues, limit, now, lease_s)
        for delivery in found[:1]:
            lease = self.leases[delivery.receipt]
            self.queue(delivery.queue).levels[-1].append((lease.message, lease.deliveries, now))
        return found


class ExtendsTheLost(Reference):
    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        super().extend(deliveries, lease_s)
        return []


class ExtendsNothing(Reference):
    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        return [delivery for delivery in deliveries if delivery.receipt not in self.store.leases]


class ReleaseCharges(MemoryStore):
    def give_back(self, leases: Sequence[Lease], now: float, taken_back: int) -> None:
        super().give_back(leases, now, 0)


class PrioritiesIgnored(MemoryStore):
    def put(self, messages: Iterable[Outgoing], now: float) -> None:
        super().put([message._replace(priority=0) for message in messages], now)


class TombstonesForgotten(Reference):
    """Kept until somebody restarts."""

    def open(self) -> None:
        super().open()
        self.store._marks.clear()


class BuriedAlive(Reference):
    """Says that it removed what it did not."""

    def bury(self, marks: Mapping[str, str], expires_at: float, remove_waiting: bool = True) -> set[str]:
        removed = super().bury(marks, expires_at, remove_waiting=False)
        waiting = {message.id for queue in self.store.queues.values() for message in queue.waiting()}
        return waiting & set(marks) if remove_waiting else removed


class DropsExpired(MemoryStore):
    def claim(self, queues: Sequence[str], limit: int, now: float, lease_s: float) -> list[Delivery]:
        found = super().claim(queues, limit, now, lease_s)
        gone = [item for item in found if (self.leases[item.receipt].message.expires_at or math.inf) <= now]
        for item in gone:
            del self.leases[item.receipt]
        return [item for item in found if item not in gone]


class HalfAtomic(Reference):
    """Publishes first and removes second, and calls it atomic."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        ours = [item for item in settlements if item.delivery.receipt in self.store.leases]
        with self.store.lock:
            self.store.put([message for item in ours for message in item.then], self.context.clock.time())
        time.sleep(0.001)
        return super().settle([item._replace(then=()) for item in settlements])


class Stepwise(Reference):
    """Right: not atomic, publishes first and removes second, and says so."""

    features = replace(MemoryTransport.features, atomic_then=False)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost = []
        for item in settlements:
            self._check_sizes(item.then)
            if self.opened() and item.then and item.delivery.receipt in self.store.leases:
                with self.store.lock:
                    self.store.put(item.then, self.context.clock.time())
                if self.context.faults is not None:
                    self.context.faults.hit("follow_ups_sent")
            lost += super().settle([item._replace(then=())])
        return lost


class RemovesFirst(Stepwise):
    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost = MemoryTransport.settle(self, [item._replace(then=()) for item in settlements])
        for item in settlements:
            if item.then and item.delivery not in lost:
                if self.context.faults is not None:
                    self.context.faults.hit("follow_ups_sent")
                with self.store.lock:
                    self.store.put(item.then, self.context.clock.time())
        return lost


TRANSPORT_MUTANTS: dict[str, type[ReferenceKit]] = {
    "ack on receive": kit_of(AckOnReceive, AckOnReceiveStore),
    "settle by id": kit_of(SettleById),
    "no expiry": kit_of(store=NoExpiry),
    "count reset": kit_of(store=CountReset),
    "volatile leases": kit_of(VolatileLeases),
    "early delay": kit_of(store=EarlyDelay),
    "reject drops": kit_of(RejectDrops),
    "duplicate then": kit_of(DuplicateThen),
    "forgotten then": kit_of(ForgottenThen),
    "then of the lost": kit_of(ThenOfLost),
    "shared delivery": kit_of(store=SharedDelivery),
    "extends the lost": kit_of(ExtendsTheLost),
    "extends nothing": kit_of(ExtendsNothing),
    "release charges": kit_of(store=ReleaseCharges),
    "priorities ignored": kit_of(store=PrioritiesIgnored),
    "tombstones forgotten": kit_of(TombstonesForgotten),
    "buried alive": kit_of(BuriedAlive),
    "expired dropped": kit_of(store=DropsExpired),
    "half atomic": kit_of(HalfAtomic),
    "removes first": kit_of(RemovesFirst),
}
NOT_FOR_THE_MACHINE = {"half atomic"}
"""What needs two threads at once to be seen."""


# --- the least that a transport can be ---------------------------------------------------------------------


class Least(Transport):
    """Right: declares nothing that a transport may leave out, and refuses it; pushes, so that buffers matter."""

    api = 1
    features = TransportFeatures(push=True, shared=False, max_body_bytes=2**24)
    listeners: dict[str, list[Callable[[bytes], None]]]

    def __init__(self, inner: MemoryTransport, listeners: dict[str, list[Callable[[bytes], None]]]) -> None:
        super().__init__(inner.options, inner.context)
        self.inner = inner
        self.held: dict[int, Lease] = {}
        self.listeners = listeners

    def open(self) -> None:
        self.inner.open()

    def close(self) -> None:
        """Its connection ends, and with it its deliveries."""
        store = self.inner.store
        with store.lock:
            mine = [receipt for receipt in self.held if receipt in store.leases]
            store.give_back([store.leases.pop(receipt) for receipt in mine], self.context.clock.time(), 0)
        self.inner.close()

    def send(self, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            if message.priority or (message.not_before or 0) > self.context.clock.time():
                raise NotSupported("neither priorities nor delays")
        self.inner.send(messages)

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        return LeastConsumer(self, self.inner.consumer(queues, buffer), buffer)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        if any(item.action is not Action.ACK for item in settlements):
            raise NotSupported("neither dead letters nor release")
        lost = []
        for item in settlements:
            for message in item.then:
                if len(message.body) > self.features.max_body_bytes:
                    raise TooLarge(message.id)
        for item in settlements:
            if item.then and self.inner.opened() and item.delivery.receipt in self.inner.store.leases:
                self.send(item.then)
                if self.context.faults is not None:
                    self.context.faults.hit("follow_ups_sent")
            lost += self.inner.settle([item._replace(then=())])
        return lost

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        self.inner.opened()
        return []

    def broadcast(self, channel: str, payload: bytes) -> None:
        for deliver in self.listeners.get(channel, []):
            deliver(payload)

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        self.listeners.setdefault(channel, []).append(deliver)
        return lambda: self.listeners[channel].remove(deliver)


class LeastConsumer(Consumer):
    """Takes more than it was asked for, up to its buffer."""

    def __init__(self, transport: Least, inner: Consumer, buffer: int) -> None:
        self.transport, self.inner, self.buffer = transport, inner, buffer
        self.waiting: list[Delivery] = []

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        self.transport.inner.opened()
        if len(self.waiting) < limit:
            wanted = max(limit, self.buffer) - len(self.waiting)
            found = self.inner.receive(wanted, 0 if self.waiting else timeout_s)
            self.transport.held.update(
                (item.receipt, self.transport.inner.store.leases[item.receipt]) for item in found
            )
            self.waiting += [item._replace(lease_until=None) for item in found]
        found, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return found

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        waiting, self.waiting = self.waiting, []
        with contextlib.suppress(Exception):
            self.transport.inner.settle([Settlement(item, Action.RELEASE) for item in waiting])
        self.inner.close()


class LeastKit(ReferenceKit):
    """The kit over :class:`Least`."""

    least: type[Least] = Least

    def begin(self, tmp_path: Path) -> None:
        self.listeners: dict[str, list[Callable[[bytes], None]]] = {}
        super().begin(tmp_path)

    def make(self, clock: Clock) -> Transport:
        inner = MemoryTransport(MemoryOptions(lease=1e12), plugin_context("least", clock), self.store)
        return self.least(inner, self.listeners)

    def abilities(self) -> Mapping[str, bool]:
        return TransportConformance.abilities(self)


class DropsSilently(Least):
    """Takes a dead letter that it cannot keep."""

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return super().settle([item._replace(action=Action.ACK) for item in settlements])


class KeepsBuffer(Least):
    """Never gives back what it buffered."""

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        consumer = LeastConsumer(self, self.inner.consumer(queues, buffer), buffer)
        consumer.close = lambda: None  # type: ignore[method-assign]
        return consumer


class DeafBroadcast(Least):
    def broadcast(self, channel: str, payload: bytes) -> None:
        for deliver in self.listeners.get(channel, [])[:1]:
            deliver(payload)


LEAST_MUTANTS: dict[str, tuple[type[Least], str]] = {
    "drops silently": (DropsSilently, "test_a_dead_letter_that_nobody_keeps_is_refused"),
    "keeps its buffer": (KeepsBuffer, "test_a_consumer_holds_back_no_more_than_its_buffer"),
}


# --- result back ends --------------------------------------------------------------------------------------


class BackendKit(ResultBackendConformance):
    backend: type[MemoryBackend] = MemoryBackend

    def make(self, clock: Clock) -> MemoryBackend:
        return self.backend(NoOptions(), plugin_context("memory", clock))


class TerminalReplaced(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        self.delete([result.id for result in results if result.state in TERMINAL])
        super().store(results)


class ExpiredReturned(MemoryBackend):
    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        self._check()
        return {key: self._results[key] for key in ids if key in self._results}


class HalfWritten(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            super().store([result])


class LostBatchEnd(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        super().store(results[:500])


class CountingBarrier(MemoryBackend):
    """A counter, where it takes a set."""

    def arrive(self, group: str, member: str, size: int) -> bool:
        count = self.__dict__.setdefault("counts", {})
        count[group] = count.get(group, 0) + 1
        return bool(count[group] >= size)


class FalsePush(MemoryBackend):
    wait = MemoryBackend.__mro__[1].wait  # type: ignore[attr-defined]


BACKEND_MUTANTS: dict[str, type[MemoryBackend]] = {
    "terminal replaced": TerminalReplaced,
    "expired returned": ExpiredReturned,
    "batch half-written": HalfWritten,
    "end of a batch lost": LostBatchEnd,
    "barrier counts": CountingBarrier,
    "push that polls": FalsePush,
}


# --- pools -------------------------------------------------------------------------------------------------


class PoolKit(PoolConformance):
    pool: type[ThreadsPool] = ThreadsPool

    def make(self, capacity: int) -> Pool:
        return self.pool(ThreadsOptions(size=capacity), pool_context("threads"))


class LostOutcome(ThreadsPool):
    def start(self, executor: Any, done: Callable[[Sequence[Outcome]], None], report: Any) -> None:
        super().start(executor, lambda batch: done(batch[:-1] if len(batch) > 3 else batch), report)


class DoubleOutcome(ThreadsPool):
    def start(self, executor: Any, done: Callable[[Sequence[Outcome]], None], report: Any) -> None:
        super().start(executor, lambda batch: done([*batch, batch[0]]), report)


class RecallReturnsBegun(ThreadsPool):
    def recall(self) -> list[Delivery]:
        begun = [runner.delivery for runner in self._runners if runner.delivery is not None]
        return [*begun, *super().recall()]


class FalseGreen(ThreadsPool):
    features = replace(ThreadsPool.features, green=True)


POOL_MUTANTS: dict[str, type[ThreadsPool]] = {
    "lost outcome": LostOutcome,
    "double outcome": DoubleOutcome,
    "recall returns begun": RecallReturnsBegun,
    "green by name alone": FalseGreen,
}
