"""The part of the transport kit that holds for every transport: send, receive, wait, names."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from dray.core.errors import TooLarge
from dray.core.message import Action, Delivery, Outgoing
from dray.testing.harness import ODD_NAMES, PROMPT_S, Background, needs

if TYPE_CHECKING:
    from dray.core.contracts import Consumer
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object


class DeliveryTests(TransportHarness):
    """What every transport does with messages."""

    # --- send and receive ----------------------------------------------------------------------------------

    def test_a_message_arrives_as_it_was_sent(self) -> None:
        transport = self.open()
        headers = {"task": "mail.send", "note": "ünïcode 日本 🚚", "empty": "", "equals": "a=b&c", "lines": "a\nb\r\n"}
        body = bytes(range(256)) * 3
        transport.send([Outgoing("q", "id-1", body, headers)])
        delivery = self.take_one(self.consume(transport))
        assert (delivery.queue, delivery.id, delivery.body) == ("q", "id-1", body)
        assert dict(delivery.headers) == headers
        assert delivery.delivery_count == 1

    def test_an_empty_body_without_headers_arrives(self) -> None:
        transport = self.open()
        transport.send([Outgoing("q", "empty", b"", {})])
        delivery = self.take_one(self.consume(transport))
        assert (delivery.body, dict(delivery.headers)) == (b"", {})

    @pytest.mark.parametrize("count", [0, 1, 1000])
    def test_a_batch_arrives_whole_and_in_order(self, count: int) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}", body=b"%d" % number) for number in range(count)])
        consumer = self.consume(transport)
        deliveries = self.take(consumer, count + 1)
        assert [delivery.body for delivery in deliveries] == [b"%d" % number for number in range(count)]
        assert self.settle(transport, deliveries) == []
        assert self.ids(consumer) == []

    def test_order_is_kept_for_each_queue_of_a_call(self) -> None:
        transport = self.open()
        transport.send([self.message(f"{number}", "ab"[number % 2]) for number in range(20)])
        assert self.ids(self.consume(transport, "b")) == [str(number) for number in range(1, 20, 2)]
        assert self.ids(self.consume(transport, "a")) == [str(number) for number in range(0, 20, 2)]

    def test_receive_takes_at_most_its_limit(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(10)])
        consumer = self.consume(transport)
        assert len(self.take(consumer, 1)) == 1
        assert len(consumer.receive(4, 0)) <= 4
        assert consumer.receive(0, 0) == []

    def test_earlier_queues_come_first(self) -> None:
        transport = self.open()
        transport.send([self.message("late", "second"), self.message("soon", "first"), self.message("other", "third")])
        assert self.ids(self.consume(transport, "first", "second")) == ["soon", "late"]

    def test_the_same_id_may_be_sent_again(self) -> None:
        transport = self.open()
        transport.send([self.message("same")])
        transport.send([self.message("same", "other")])
        assert set(self.ids(self.consume(transport, "q", "other"))) == {"same"}

    def test_other_instances_see_what_was_sent(self) -> None:
        self.open().send([self.message()])
        assert self.take_one(self.consume(self.open())).id == "m"

    @pytest.mark.parametrize("over", [0, 1])
    def test_the_size_limit_counts_body_and_headers(self, over: int) -> None:
        transport = self.open()
        limit = transport.features.max_body_bytes
        large = Outgoing("q", "large", b"x" * (limit - 10 + over), {"k" * 4: "v" * 6})
        consumer = self.consume(transport)
        if not over:
            transport.send([large])
            assert self.take_one(consumer).body == large.body
            return
        with pytest.raises(TooLarge):
            transport.send([self.message("small"), large])
        assert self.ids(consumer) == [], "part of a refused batch was stored"

    # --- waiting -------------------------------------------------------------------------------------------

    def test_receive_returns_nothing_after_its_timeout(self) -> None:
        consumer = self.consume(self.open_now())
        started = time.monotonic()
        assert consumer.receive(1, 0.1) == []
        assert 0.09 <= time.monotonic() - started < PROMPT_S

    def test_wake_ends_a_receive_that_waits(self) -> None:
        consumer = self.consume(self.open_now())
        with self._blocked(consumer) as found:
            consumer.wake()
        assert found == []

    def test_a_wake_before_receive_is_not_lost(self) -> None:
        consumer = self.consume(self.open_now())
        consumer.wake()
        started = time.monotonic()
        assert consumer.receive(1, 30) == []
        assert time.monotonic() - started < PROMPT_S

    @pytest.mark.parametrize("sender", ["same instance", "another instance"])
    def test_a_message_ends_a_receive_that_waits(self, sender: str) -> None:
        transport = self.open_now()
        other = transport if sender == "same instance" else self.open_now()
        with self._blocked(self.consume(transport)) as found:
            other.send([self.message()])
        assert [delivery.id for delivery in found] == ["m"]

    @needs("delays")
    def test_a_delayed_message_ends_a_receive_that_waits(self) -> None:
        transport = self.open_now()
        due = time.time() + 0.3
        with self._blocked(self.consume(transport)) as found:
            transport.send([self.message(not_before=due)])
        assert [delivery.id for delivery in found] == ["m"]
        assert time.time() >= due

    def test_others_settle_while_one_waits(self) -> None:
        transport = self.open_now()
        transport.send([self.message()])
        delivery = self.take_and_close(transport)
        with self._blocked(self.consume(transport)) as found:
            assert transport.extend([delivery], 10) == []
            assert self.settle(transport, [delivery], Action.ACK, self.message("next")) == []
        assert [received.id for received in found] == ["next"]

    @contextlib.contextmanager
    def _blocked(self, consumer: Consumer) -> Iterator[list[Delivery]]:
        """A thread in ``receive(1, 30)``; at the end of the block it must return promptly; yields what it received."""
        found: list[Delivery] = []
        about_to_wait = threading.Event()

        def wait() -> None:
            about_to_wait.set()
            found.extend(consumer.receive(1, 30))

        background = Background()
        background.start(wait)
        assert about_to_wait.wait(PROMPT_S)
        # Let it get into the wait as a rule; the test holds either way.
        threading.Event().wait(0.05)
        yield found
        background.join(PROMPT_S)

    # --- names ---------------------------------------------------------------------------------------------

    def test_odd_queue_names_are_told_apart(self) -> None:
        transport = self.open()
        transport.declare(ODD_NAMES)
        transport.send([self.message(f"in {name}", name) for name in ODD_NAMES])
        for name in ODD_NAMES:
            [delivery] = self.take(self.consume(transport, name), 1)
            assert (delivery.queue, delivery.id) == (name, f"in {name}")
            assert self.settle(transport, [delivery]) == []

    def test_odd_ids_are_told_apart(self) -> None:
        transport = self.open()
        transport.send([self.message(name, body=name.encode()) for name in ODD_NAMES])
        consumer = self.consume(transport)
        deliveries = self.take(consumer, len(ODD_NAMES) + 1)
        assert [(delivery.id, delivery.body) for delivery in deliveries] == [
            (name, name.encode()) for name in ODD_NAMES
        ]
        assert self.settle(transport, deliveries) == []
        assert self.ids(consumer) == []

    # --- expiry --------------------------------------------------------------------------------------------

    def test_an_expired_message_is_never_dropped_in_silence(self) -> None:
        """Handed out as ever, or among the dead letters with a reason: the worker decides by the signed header."""
        transport = self.open()
        now = self.clock.time()
        transport.send([self.message("expired", expires_at=now + 5), self.message("later", expires_at=now + 10**6)])
        consumer = self.consume(transport)
        self.advance(6)
        found = self.ids(consumer)
        assert "later" in found
        if "expired" not in found:
            assert transport.features.dead_letter, "an expired message is gone"
            (letter,) = transport.dead_get(["expired"])
            assert letter.reason
