"""The conformance kit for transports: what :class:`~dray.core.contracts.Transport` promises, as tests.

A plugin's test module holds a subclass with one method::

    class TestMine(TransportConformance):
        def make(self, clock):
            return MyTransport(MyOptions(url=...), plugin_context("mine", clock))

Each test gets an empty store and uses the contract alone. A test for an ability that the plugin does not declare is
reported as not applicable; a declared one must hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import (
    Consumer,
    DeadLetters,
    Durability,
    Inspectable,
    Tombstones,
    Transport,
)
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.testing.clock import FakeClock
from dray.testing.transport_abilities import AbilityTests
from dray.testing.transport_delivery import DeliveryTests


class TransportHarness:
    """What the tests of the kit call; a subclass gives ``make``, and overrides the rest where a server needs it."""

    patience_s = 0.0
    """How long a message may take to become visible; an embedded store has it at once."""
    tmp_path: Path
    clock: FakeClock

    def make(self, clock: Clock) -> Transport:
        """A new transport, not yet opened, over this test's store: each call stands for another process."""
        raise NotImplementedError

    def restart(self) -> None:
        """Restart the server. Without one there is nothing to do."""

    def advance(self, seconds: float) -> None:
        """Let time pass. A transport that lives by its server's clock overrides this."""
        self.clock.advance(seconds)

    @pytest.fixture(autouse=True)
    def dray_kit(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
        """Give the test its clock and folder, see that it applies, and close what it opened."""
        self.tmp_path = tmp_path
        self.clock = FakeClock()
        self._transports: list[Transport] = []
        for ability in getattr(request.function, "dray_needs", ()):
            if not self._has(ability):
                pytest.skip(f"not applicable: {type(self).__name__} does not declare {ability}")
        yield
        for transport in self._transports:
            transport.close()

    def _has(self, ability: str) -> bool:
        transport: Transport = self.open()
        features = transport.features
        declared: dict[str, bool] = {
            "durable": features.durability >= Durability.D1,
            "leases": features.lease_s is not None,
            "delays": features.max_delay_s > 0,
            "priorities": features.priorities > 1,
            "dead_letter": features.dead_letter,
            "release": features.release,
            "inspectable": isinstance(transport, Inspectable),
            "tombstones": isinstance(transport, Tombstones),
        }
        return declared[ability]

    def open(self, clock: Clock | None = None) -> Any:
        """An opened transport (any ability may be called on it: the tests say what they need)."""
        transport = self.make(clock or self.clock)
        self._transports.append(transport)
        transport.open()
        return transport

    def open_now(self) -> Any:
        """The same on the machine's clock, for what blocks."""
        return self.open(SystemClock())

    def consume(self, transport: Transport, *queues: str) -> Consumer:
        transport.declare(queues or ("q",))
        return transport.consumer(queues or ("q",), buffer=1000)

    def lease_s(self) -> float:
        """The length of a lease, for a test that needs leases."""
        lease_s = self._transports[0].features.lease_s
        assert lease_s is not None
        return lease_s

    def take(self, consumer: Consumer, count: int) -> list[Delivery]:
        """``count`` deliveries, or what there is."""
        found: list[Delivery] = []
        deadline = time.monotonic() + self.patience_s
        while len(found) < count:
            more = consumer.receive(count - len(found), 0)
            found += more
            if not more and time.monotonic() >= deadline:
                break
        return found

    def take_one(self, consumer: Consumer) -> Delivery:
        """The only delivery that is there."""
        found = self.take(consumer, 2)
        assert len(found) == 1, f"one delivery expected, {len(found)} came: {[delivery.id for delivery in found]}"
        return found[0]

    def ids(self, consumer: Consumer) -> list[str]:
        """The ids of all that is there, in the order it is handed out."""
        return [delivery.id for delivery in self.take(consumer, 10_000)]

    @staticmethod
    def message(id_: str = "m", queue: str = "q", body: bytes = b"body", **fields: Any) -> Outgoing:
        return Outgoing(queue, id_, body, fields.pop("headers", {"task": "t"}), **fields)

    @staticmethod
    def settle(
        transport: Transport, deliveries: Sequence[Delivery], action: Action = Action.ACK, *then: Outgoing
    ) -> list[Delivery]:
        """Settle all alike; the first one carries ``then``."""
        return transport.settle(
            [
                Settlement(delivery, action, then if index == 0 else (), "why" if action is Action.DEAD else None)
                for index, delivery in enumerate(deliveries)
            ]
        )


class TransportConformance(DeliveryTests, AbilityTests, TransportHarness):
    """All that is pinned for transports. Subclass it, give ``make``."""

    def test_declared_features_fit_each_other(self) -> None:
        transport = self.open()
        features = transport.features
        assert transport.api == 1
        assert features.lease_s is None or 0 < features.lease_s < math.inf
        assert features.max_delay_s >= 0
        assert 1 <= features.priorities <= 10
        assert features.max_body_bytes >= 2**16
        assert features.dead_letter == isinstance(transport, DeadLetters)
