"""The least that a transport can be, right and wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dray.core.clock import Clock
from dray.core.contracts import Consumer, Transport, TransportFeatures
from dray.core.errors import NotSupported, TooLarge
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.plugins._memory import Lease
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing import TransportConformance, plugin_context
from tests.mutants import ReferenceKit


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
