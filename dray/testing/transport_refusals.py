"""The part of the transport kit for what a transport does not declare: it says no, or it does what costs nothing.

The core emulates what is missing (``dray.core.fallback``) and so never asks for it; a user of the transport alone must
not lose a message by asking.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from dray.core.errors import NotSupported
from dray.core.message import Action, Outgoing
from dray.testing.harness import PROMPT_S, needs

if TYPE_CHECKING:
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object


class RefusalTests(TransportHarness):
    """What every transport does when asked for more than it can."""

    @needs("no_delays")
    def test_a_delay_that_is_not_declared_loses_nothing(self) -> None:
        self._refused_or_delivered(self.message(not_before=self.clock.time() + 60), 61)

    @needs("bounded_delays")
    def test_a_delay_beyond_the_longest_loses_nothing(self) -> None:
        delay_s = self.open().features.max_delay_s * 2
        self._refused_or_delivered(self.message(not_before=self.clock.time() + delay_s), delay_s + 1)

    @needs("no_priorities")
    def test_a_priority_that_is_not_declared_loses_nothing(self) -> None:
        self._refused_or_delivered(self.message(priority=9), 0)

    @needs("no_dead_letter")
    def test_a_dead_letter_that_nobody_keeps_is_refused(self) -> None:
        self._refused_settlement(Action.DEAD)

    @needs("no_release")
    def test_a_release_that_is_not_declared_is_refused(self) -> None:
        self._refused_settlement(Action.RELEASE)

    def _refused_or_delivered(self, message: Outgoing, wait_s: float) -> None:
        """``NotSupported`` and nothing stored; or stored, and delivered in the end."""
        transport = self.open()
        consumer = self.consume(transport)
        try:
            transport.send([message])
        except NotSupported as error:
            assert str(error)
            expected = []
        else:
            expected = [message.id]
        early = self.take(consumer, 10)
        assert self.settle(transport, early) == []
        self.advance(wait_s)
        assert [delivery.id for delivery in early] + self.ids(consumer) == expected

    def _refused_settlement(self, action: Action) -> None:
        """``NotSupported``, and the delivery is still ours."""
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        delivery = self.take_one(consumer)
        with pytest.raises(NotSupported):
            self.settle(transport, [delivery], action, self.message("next"))
        assert self.ids(consumer) == [], "a refused settlement was carried out in part"
        assert self.settle(transport, [delivery]) == []

    # --- what the broker pushes, what everybody hears ------------------------------------------------------

    @needs("push")
    def test_a_consumer_holds_back_no_more_than_its_buffer(self) -> None:
        transport = self.open_now()
        transport.declare(["q"])
        greedy, other = transport.consumer(["q"], buffer=2), transport.consumer(["q"], buffer=50)
        transport.send([self.message(f"m{number}") for number in range(10)])
        found = [delivery.id for delivery in greedy.receive(1, PROMPT_S)]
        assert len(found) == 1
        while len(found) < 8:
            deliveries = other.receive(10, PROMPT_S)
            assert deliveries, f"a consumer with a buffer of 2 keeps {10 - len(found)} of 10 messages from another"
            found += [delivery.id for delivery in deliveries]
        greedy.close()
        while len(found) < 10:
            deliveries = other.receive(10, PROMPT_S)
            assert deliveries, "what a consumer buffered and never handed out did not come back when it was closed"
            found += [delivery.id for delivery in deliveries]
        assert sorted(found) == sorted(f"m{number}" for number in range(10))

    @needs("broadcast")
    def test_a_broadcast_reaches_all_who_listen_and_nobody_else(self) -> None:
        one, other = self.open_now(), self.open_now()
        heard: list[tuple[str, bytes]] = []
        arrived = threading.Semaphore(0)

        def listen(transport: object, name: str, channel: str = "c") -> object:
            def deliver(payload: bytes) -> None:
                heard.append((name, payload))
                arrived.release()

            return transport.listen(channel, deliver)  # type: ignore[attr-defined]

        one.broadcast("c", b"before anybody listened")
        stop_one = listen(one, "one")
        listen(other, "other")
        listen(other, "elsewhere", "d")
        one.broadcast("c", b"\x00\xff")
        assert all(arrived.acquire(timeout=PROMPT_S) for _ in range(2))
        assert sorted(heard) == [("one", b"\x00\xff"), ("other", b"\x00\xff")]
        stop_one()  # type: ignore[operator]
        other.broadcast("c", b"again")
        assert arrived.acquire(timeout=PROMPT_S)
        assert heard[2:] == [("other", b"again")]
