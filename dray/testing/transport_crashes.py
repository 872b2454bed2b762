"""The part of the transport kit about life and death: close, restarts, forks, kills, stores that fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from dray.core.contracts import DeadLetters, Inspectable, Tombstones
from dray.core.errors import TransportError, Unavailable
from dray.core.faults import Faults
from dray.core.message import Action, Delivery, Settlement
from dray.testing.harness import Background, in_child, needs

if TYPE_CHECKING:
    from dray.core.contracts import Consumer
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object

Call = Callable[[], object]


class CrashTests(TransportHarness):
    """What survives, and what is said when nothing works any more."""

    # --- life ----------------------------------------------------------------------------------------------

    def test_close_may_come_before_open_and_twice(self) -> None:
        transport = self.make(self.clock)
        transport.close()
        transport.open()
        transport.open()
        transport.send([self.message()])
        transport.close()
        transport.close()

    def test_after_close_every_call_says_unavailable(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        calls = self._calls(transport, consumer, self.take_one(consumer))
        transport.close()
        for name, call in calls.items():
            with pytest.raises(Unavailable):
                call()
                pytest.fail(f"{name} worked after close")
        consumer.wake()
        consumer.close()
        consumer.close()

    @needs("driver_errors")
    def test_no_driver_exception_escapes(self) -> None:
        transport = self.open_now()
        transport.send([self.message()])
        consumer = self.consume(transport)
        calls = self._calls(transport, consumer, self.take_one(consumer))
        self.break_store()
        failed = 0
        calls["open"] = self.open_now
        for call in calls.values():
            try:
                call()
            except TransportError as error:
                assert str(error)
                failed += 1
        assert failed, "break_store() broke nothing"
        consumer.wake()
        consumer.close()
        transport.close()

    def _calls(self, transport: Any, consumer: Consumer, delivery: Delivery) -> dict[str, Call]:
        """All that can be asked of a transport, by name."""
        calls: dict[str, Call] = {
            "extend": lambda: transport.extend([delivery], 10),
            "settle": lambda: self.settle(transport, [delivery]),
            "settle with then": lambda: self.settle(transport, [delivery], Action.ACK, self.message()),
            "send": lambda: transport.send([self.message()]),
            "receive": lambda: consumer.receive(1, 0),
            "consumer": lambda: transport.consumer(["q"], 1).receive(1, 0),
        }
        if isinstance(transport, Inspectable):
            calls["queues"] = transport.queues
            calls["stats"] = lambda: transport.stats(["q"])
            calls["peek"] = lambda: transport.peek("q", 1)
            calls["purge"] = lambda: transport.purge("q")
        if isinstance(transport, DeadLetters):
            calls["dead_list"] = lambda: transport.dead_list(None, 1)
            calls["dead_get"] = lambda: transport.dead_get(["m"])
            calls["dead_purge"] = lambda: transport.dead_purge(["m"])
        if isinstance(transport, Tombstones):
            calls["bury"] = lambda: transport.bury({"m": "revoked"}, time.time() + 10)
            calls["buried"] = lambda: transport.buried(["m"])
            calls["exhume"] = lambda: transport.exhume(["m"])
        return calls

    # --- restarts ------------------------------------------------------------------------------------------

    @needs("durable")
    def test_messages_survive_reopening(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(3)])
        transport.close()
        self.restart()
        assert self.ids(self.consume(self.open())) == ["m0", "m1", "m2"]

    @needs("durable", "leases")
    def test_outstanding_deliveries_and_their_count_survive_restarts(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        for count in (1, 2, 3):
            consumer = self.consume(transport)
            assert self.take_one(consumer).delivery_count == count
            consumer.close()
            transport.close()
            self.restart()
            self.advance(self.lease_s() + 1)
            transport = self.open()

    # --- between the follow-up and the removal -------------------------------------------------------------

    @needs("stepwise_then")
    @pytest.mark.parametrize("action", list(Action))
    def test_a_crash_between_then_and_removal_loses_nothing(self, action: Action) -> None:
        """The transport passes ``context.faults.hit("follow_ups_sent")`` between the two steps."""
        action = self.possible(action)
        transport, other = self.open(), self.open()
        transport.send([self.message()])
        delivery = self.take_and_close(transport)
        faults = Faults({"follow_ups_sent": ("raise", 1)})
        transport.context = replace(transport.context, faults=faults)
        settlement = Settlement(delivery, action, (self.message("next"),), "why")
        with pytest.raises(TransportError):
            transport.settle([settlement])
        consumer = self.consume(other)
        assert self.ids(consumer) == ["next"]
        # The same batch comes again; what it sends twice has the same id.
        assert transport.settle([settlement]) == []
        self.advance((transport.features.lease_s or 0) * 2)
        assert set(self.ids(consumer)) <= {"next", "m"} - ({"m"} if action is not Action.RELEASE else set())

    @needs("stepwise_then", "leases")
    def test_who_dies_between_then_and_removal_leaves_both(self) -> None:
        transport, other = self.open(), self.open()
        transport.send([self.message()])
        delivery = self.take_one(self.consume(transport))
        transport.context = replace(transport.context, faults=Faults({"follow_ups_sent": ("raise", 1)}))
        with pytest.raises(TransportError):
            self.settle(transport, [delivery], Action.ACK, self.message("next"))
        transport.close()
        self.advance(self.lease_s() * 2 + 1)
        assert sorted(self.ids(self.consume(other))) == ["m", "next"]

    @needs("atomic_then", "inspectable")
    def test_nobody_sees_half_of_an_atomic_swap(self) -> None:
        transport, observer = self.open_now(), self.open_now()
        transport.send([self.message("0")])
        over = threading.Event()

        def swap() -> None:
            consumer = self.consume(transport)
            for number in range(150):
                (delivery,) = consumer.receive(1, 10)
                assert self.settle(transport, [delivery], Action.ACK, self.message(f"{number + 1}")) == []

        def observe() -> None:
            while not over.is_set():
                seen = observer.stats(["q"])["q"]
                if None not in (seen.leased, seen.delayed):
                    assert seen.ready + seen.leased + seen.delayed == 1, f"half of a swap was seen: {seen}"

        background, watch = Background(), Background()
        watch.start(observe)
        background.start(swap)
        try:
            background.join()
        finally:
            over.set()
        watch.join()

    # --- other processes -----------------------------------------------------------------------------------

    @needs("shared")
    def test_a_forked_child_and_its_parent_go_on_side_by_side(self) -> None:
        transport = self.open_now()
        transport.send([self.message("before")])
        consumer = self.consume(transport)
        before = self.take_one(consumer)

        def child() -> None:
            own = self.make(transport.context.clock)
            own.open()
            own.send([self.message(f"child {number}") for number in range(20)])
            own.close()

        def parent() -> None:
            transport.send([self.message(f"parent {number}") for number in range(20)])

        assert in_child(child, parent) == 0
        assert self.settle(transport, [before], Action.ACK, self.message("after")) == []
        wanted = {"after", *(f"{who} {number}" for who in ("child", "parent") for number in range(20))}
        assert set(self.ids(consumer)) == wanted
        assert self.ids(self.consume(self.open_now())) == []

    @needs("shared", "survives_sigkill")
    def test_what_was_confirmed_survives_sigkill(self) -> None:
        transport = self.open_now()

        def child() -> None:
            own = self.make(transport.context.clock)
            own.open()
            own.send([self.message(f"m{number}") for number in range(20)])
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(child) == -signal.SIGKILL
        self.restart()
        assert self.ids(self.consume(self.open_now())) == [f"m{number}" for number in range(20)]

    @needs("shared", "survives_sigkill", "leases")
    def test_what_a_killed_process_held_comes_back_counted(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        transport.close()

        def child() -> None:
            own = self.make(self.clock)
            own.open()
            assert self.take_one(self.consume(own)).delivery_count == 1
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(child) == -signal.SIGKILL
        self.restart()
        self.advance(self.lease_s() + 1)
        assert self.take_one(self.consume(self.open())).delivery_count == 2
