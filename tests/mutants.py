"""Transports that are wrong in one way each.

Each is a bug that real task queues have had. The reference they are made from is right, and passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dray.core.clock import Clock
from dray.core.contracts import Transport
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.plugins._memory import Lease, MemoryStore
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing import TransportConformance, plugin_context


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
        with self.opened().lock:
            self.store.put([message for settlement in settlements for message in settlement.then], self._now())
        return []

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        self.opened()
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
        holders = {lease.message[:3]: receipt for receipt, lease in self.store.leases.items()}
        current = [
            settlement._replace(delivery=settlement.delivery._replace(receipt=holders.get(settlement.delivery[:3])))
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
        return [delivery for delivery in deliveries if delivery.receipt not in self.opened().leases]


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


class BuriedForGood(Reference):
    """Removes the waiting messages of buried ids, whose callers then wait for ever."""

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        super().bury(marks, expires_at, hasten)
        for queue in self.store.queues.values():
            for level in queue.levels:
                kept = [entry for entry in level if entry[0].id not in marks]
                level.clear()
                level.extend(kept)


class NeverHastened(Reference):
    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        super().bury(marks, expires_at)


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
    "buried for good": kit_of(BuriedForGood),
    "never hastened": kit_of(NeverHastened),
    "expired dropped": kit_of(store=DropsExpired),
    "half atomic": kit_of(HalfAtomic),
    "removes first": kit_of(RemovesFirst),
}
NOT_FOR_THE_MACHINE = {"half atomic", "never hastened"}
"""What needs two threads to be seen, and what the machine's model allows: a hastened message may come late."""
