"""The conformance kit for transports: what :class:`~dray.core.contracts.Transport` promises, as tests.

A plugin's test module holds a subclass; one method is enough where there is no server::

    from dray.testing import TransportConformance, plugin_context

    class TestMine(TransportConformance):
        patience_s = 2.0                                     # a message may take that long to be seen

        def make(self, clock):
            options = MyTransport.Options(url="mine://127.0.0.1:7777", prefix=self.tmp_path.name)
            return MyTransport(options, plugin_context("mine", clock))

        def restart(self):                                   # from D2 on: with SIGKILL
            subprocess.run(["docker", "restart", "--signal", "KILL", "mine"], check=True)

        def advance(self, seconds):                          # it lives by its server's clock
            time.sleep(seconds)

        address = ("127.0.0.1", 7777)

        def through(self, port):                             # the same server behind a proxy that makes trouble
            options = MyTransport.Options(url=f"mine://127.0.0.1:{port}", prefix=self.tmp_path.name, timeout=1)
            return MyTransport(options, plugin_context("mine", SystemClock()))

Each test gets an empty store (above: queues of its own, by their prefix) and uses the contract alone. A test for an
ability that the plugin does not declare is reported as not applicable; a declared one must hold, and none of the tests
can be left out. ``DRAY_CONFORMANCE_EXAMPLES=1000`` makes the state machine look longer. Run with
``DRAY_CONFORMANCE_REPORT=src/mine/conformance.json`` and ship that file beside the plugin's module: ``dray plugins
--conformance`` then shows what is proven. Durability is proven up to D2; for D3 and D4 the kit takes the plugin's word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import (
    API_VERSION,
    Broadcaster,
    Consumer,
    DeadLetters,
    Durability,
    Inspectable,
    Tombstones,
    Transport,
)
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.testing.clock import FakeClock
from dray.testing.kit import Conformance
from dray.testing.network import Network
from dray.testing.transport_abilities import AbilityTests
from dray.testing.transport_crashes import CrashTests
from dray.testing.transport_delivery import DeliveryTests
from dray.testing.transport_machine import run_machine
from dray.testing.transport_network import NetworkTests
from dray.testing.transport_ownership import OwnershipTests
from dray.testing.transport_refusals import RefusalTests


class TransportHarness(Network, Conformance):
    """What the tests of the kit call; a subclass gives ``make``, and overrides the rest where a server needs it."""

    kind = "transports"
    proofs: ClassVar[Mapping[str, str]] = {
        "durability": "durable",
        "lease_s": "leases",
        "max_delay_s": "delays",
        "priorities": "priorities",
        "atomic_then": "atomic_then",
        "dead_letter": "dead_letter",
        "release": "release",
        "max_body_bytes": "contract",
        "push": "push",
        "shared": "shared",
        "hastens": "hastens",
    }
    patience_s = 0.0
    """How long a message may take to become visible; an embedded store has it at once."""
    machine_examples = 40
    """How many runs the state machine tries; fewer where time really passes."""
    clock: FakeClock

    def make(self, clock: Clock) -> Transport:
        """A new transport, not yet opened, over this test's store: each call stands for another process."""
        raise NotImplementedError

    def through(self, port: int) -> Transport:
        """A new transport on the machine's clock, not yet opened, whose server is reached at 127.0.0.1:``port``.

        For a plugin that speaks to a server at :attr:`address`: a proxy listens at that port. With time-outs (or
        heartbeats) that notice a silent peer within :attr:`silence_s`.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Restart the server. Without one there is nothing to do."""

    def break_store(self) -> None:
        """Make this test's store fail from now on, as far as a test can: stop the server, spoil the files."""

    def advance(self, seconds: float) -> None:
        """Let time pass. A transport that lives by its server's clock overrides this."""
        self.clock.advance(seconds)

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)
        self.clock = FakeClock()
        self._transports: list[Transport] = []
        self.begin_network()

    def end(self) -> None:
        self.end_network()
        for transport in self._transports:
            transport.close()

    def sample(self) -> Transport:
        if not self._transports:
            self.open()
        return self._transports[0]

    def abilities(self) -> Mapping[str, bool]:
        transport = self.sample()
        features = transport.features
        optional = {
            "leases": features.lease_s is not None,
            "delays": features.max_delay_s > 0,
            "priorities": features.priorities > 1,
            "dead_letter": features.dead_letter,
            "release": features.release,
        }
        return {
            **optional,
            **{f"no_{ability}": not declared for ability, declared in optional.items()},
            "bounded_delays": 0 < features.max_delay_s < math.inf,
            "atomic_then": features.atomic_then,
            "stepwise_then": not features.atomic_then,
            "durable": features.durability >= Durability.D1,
            "survives_sigkill": features.durability >= Durability.D2,
            "push": features.push,
            "shared": features.shared,
            "hastens": features.hastens,
            "networked": type(self).through is not TransportHarness.through,
            "driver_errors": type(self).break_store is not TransportHarness.break_store,
            "inspectable": isinstance(transport, Inspectable),
            "sees_delayed": isinstance(transport, Inspectable) and transport.stats(["q"])["q"].delayed is not None,
            "tombstones": isinstance(transport, Tombstones),
            "broadcast": isinstance(transport, Broadcaster),
        }

    def open(self, clock: Clock | None = None) -> Any:
        """An opened transport (any ability may be called on it: the tests say what they need)."""
        transport = self.remember(self.make(clock or self.clock))
        transport.open()
        return transport

    def remember(self, transport: Transport) -> Any:
        """It is closed at the end."""
        self._transports.append(transport)
        return transport

    def forget_transports(self) -> None:
        """Those that were opened so far are closed."""
        self._transports.clear()

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

    def take_and_close(self, transport: Transport, *queues: str) -> Delivery:
        """The only delivery that is there. It stays ours; another consumer may follow.

        An open consumer of a transport that pushes may hold what comes next, although nobody asks it.
        """
        consumer = self.consume(transport, *queues)
        delivery = self.take_one(consumer)
        consumer.close()
        return delivery

    def ids(self, consumer: Consumer) -> list[str]:
        """The ids of all that is there, in the order it is handed out."""
        return [delivery.id for delivery in self.take(consumer, 10_000)]

    @staticmethod
    def message(id_: str = "m", queue: str = "q", body: bytes = b"body", **fields: Any) -> Outgoing:
        return Outgoing(queue, id_, body, fields.pop("headers", {"task": "t"}), **fields)

    def possible(self, action: Action) -> Action:
        """The action, or ``ACK`` in place of one that the transport does not declare."""
        features = self.sample().features
        declared = {Action.DEAD: features.dead_letter, Action.RELEASE: features.release}
        return action if declared.get(action, True) else Action.ACK

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


class TransportConformance(
    DeliveryTests, OwnershipTests, AbilityTests, CrashTests, RefusalTests, NetworkTests, TransportHarness
):
    """All that is pinned for transports. Subclass it, give ``make``."""

    def test_declared_features_fit_each_other(self) -> None:
        transport = self.open()
        features = transport.features
        assert transport.api == API_VERSION
        assert features.lease_s is None or 0 < features.lease_s < math.inf
        assert features.max_delay_s >= 0
        assert 1 <= features.priorities <= 10
        assert features.max_body_bytes >= 2**16
        assert features.dead_letter == isinstance(transport, DeadLetters)
        assert features.shared or features.durability == Durability.D0, "what no other process sees survives nothing"

    def test_state_machine(self) -> None:
        """Random calls, faults and restarts; at the end every message is accounted for."""
        run_machine(self)
