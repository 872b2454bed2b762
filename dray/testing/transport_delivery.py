"""The part of the transport kit that holds for every transport: send, receive, settle, leases, life and death."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from dray.core.errors import TooLarge, Unavailable
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.testing.harness import ODD_NAMES, PROMPT_S, Background, needs

if TYPE_CHECKING:
    from dray.core.contracts import Consumer, Transport
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object


class DeliveryTests(TransportHarness):
    """What every transport does."""

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
        delivery = self.take_one(self.consume(transport))
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

    # --- who owns what -------------------------------------------------------------------------------------

    def test_two_consumers_never_share_a_delivery(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(100)])
        consumers = [self.consume(transport), self.consume(self.open())]
        found = [delivery.id for _ in range(40) for consumer in consumers for delivery in self.take(consumer, 2)]
        assert sorted(found) == sorted(f"m{number}" for number in range(100))

    def test_senders_and_consumers_at_once_lose_and_share_nothing(self) -> None:
        sender_transport = self.open_now()
        sent = [f"{sender}-{number}" for sender in range(4) for number in range(100)]
        done: list[str] = []
        stop = threading.Event()

        def send(sender: int) -> None:
            for start in range(0, 100, 10):
                sender_transport.send([self.message(f"{sender}-{number}") for number in range(start, start + 10)])

        def consume(transport: Transport) -> None:
            consumer = self.consume(transport)
            while not stop.is_set():
                deliveries = consumer.receive(7, 0.05)
                assert self.settle(transport, deliveries) == []
                done.extend(delivery.id for delivery in deliveries)
                if len(done) >= len(sent):
                    stop.set()
            consumer.close()

        background = Background()
        for transport in (sender_transport, self.open_now()):
            background.start(consume, transport)
        for sender in range(4):
            background.start(send, sender)
        stop.wait(60)
        stop.set()
        background.join()
        assert Counter(done) == Counter(sent)

    @needs("leases")
    def test_an_unsettled_delivery_comes_back_when_its_lease_ends(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        first = self.take_one(self.consume(transport))
        assert first.lease_until == pytest.approx(self.clock.time() + self.lease_s(), abs=1)
        other = self.consume(self.open())
        self.advance(self.lease_s() * 0.9)
        assert self.ids(other) == []
        self.advance(self.lease_s() * 0.2)
        again = self.take_one(other)
        assert (again.id, again.body, dict(again.headers)) == (first.id, first.body, dict(first.headers))

    @needs("leases")
    def test_the_delivery_count_rises_with_each_delivery_and_survives_reopening(self) -> None:
        counts = []
        self.open().send([self.message()])
        for _ in range(4):
            transport = self.open()
            counts.append(self.take_one(self.consume(transport)).delivery_count)
            transport.close()
            self.advance(self.lease_s() + 1)
        assert counts == [1, 2, 3, 4]

    @needs("leases")
    def test_extend_keeps_a_delivery(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        delivery = self.take_one(self.consume(transport))
        other = self.consume(self.open())
        for _ in range(5):
            self.advance(self.lease_s() * 0.8)
            assert transport.extend([delivery], self.lease_s()) == []
            assert self.ids(other) == []
        assert self.settle(transport, [delivery]) == []
        self.advance(self.lease_s() * 3)
        assert self.ids(other) == []

    @needs("leases")
    def test_an_extended_lease_ends_too(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        assert transport.extend([self.take_one(consumer)], self.lease_s() * 3) == []
        self.advance(self.lease_s() * 2)
        assert self.ids(consumer) == []
        self.advance(self.lease_s() * 1.1)
        assert self.take_one(consumer).delivery_count == 2

    @needs("leases")
    def test_stale_receipts_are_reported_and_change_nothing(self) -> None:
        transport, thief = self.open(), self.open()
        transport.send([self.message("lost"), self.message("kept")])
        consumer = self.consume(transport)
        lost, kept = self.take(consumer, 2)
        self.advance(self.lease_s() * 0.6)
        assert transport.extend([kept], self.lease_s()) == []
        self.advance(self.lease_s() * 0.6)
        stolen = self.take_one(self.consume(thief))
        assert stolen.id == "lost"
        assert transport.extend([lost, kept], self.lease_s()) == [lost]
        follow_ups = [self.message("of lost"), self.message("of kept")]
        settlements = [Settlement(lost, Action.ACK, (follow_ups[0],)), Settlement(kept, Action.ACK, (follow_ups[1],))]
        assert transport.settle(settlements) == [lost]
        assert self.ids(consumer) == ["of kept"]
        assert thief.extend([stolen], self.lease_s()) == []
        assert self.settle(thief, [stolen]) == []

    @needs("leases")
    @pytest.mark.parametrize("action", list(Action))
    def test_a_stale_settlement_of_any_kind_is_refused(self, action: Action) -> None:
        transport, thief = self.open(), self.open()
        transport.send([self.message()])
        lost = self.take_one(self.consume(transport))
        self.advance(self.lease_s() + 1)
        stolen = self.take_one(self.consume(thief))
        assert self.settle(transport, [lost], action) == [lost]
        assert self.ids(self.consume(transport)) == []
        assert self.settle(thief, [stolen]) == []

    # --- settle --------------------------------------------------------------------------------------------

    def test_what_is_acknowledged_never_returns(self) -> None:
        transport = self.open()
        transport.send([self.message("a"), self.message("b")])
        consumer = self.consume(transport)
        assert self.settle(transport, self.take(consumer, 2)) == []
        self.advance((transport.features.lease_s or 0) * 2 + 1)
        transport.close()
        assert self.ids(self.consume(self.open())) == []

    def test_settling_twice_is_harmless(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        delivery = self.take_one(consumer)
        then = self.message("next")
        assert self.settle(transport, [delivery], Action.ACK, then) == []
        assert self.settle(transport, [delivery], Action.ACK, then) == [delivery]
        assert self.ids(consumer) == ["next"]

    def test_the_same_delivery_twice_in_a_batch_counts_once(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        delivery = self.take_one(consumer)
        settlement = Settlement(delivery, Action.ACK, (self.message("next"),))
        assert transport.settle([settlement, settlement]) == [delivery]
        assert self.ids(consumer) == ["next"]

    def test_empty_batches_do_nothing(self) -> None:
        transport = self.open()
        transport.declare([])
        assert transport.settle([]) == []
        assert transport.extend([], 10) == []

    def test_follow_ups_appear_if_and_only_if_settled(self) -> None:
        transport = self.open()
        transport.send([self.message("a"), self.message("b")])
        consumer, elsewhere = self.consume(transport), self.consume(transport, "elsewhere")
        a, b = self.take(consumer, 2)
        assert self.ids(elsewhere) == []
        then = (self.message("a1", "elsewhere", b"\x00\xff", headers={"é": "ü"}), self.message("a2", "elsewhere"))
        assert transport.settle([Settlement(a, Action.ACK, then), Settlement(b, Action.ACK)]) == []
        follow_ups = self.take(elsewhere, 3)
        assert [delivery.id for delivery in follow_ups] == ["a1", "a2"]
        assert (follow_ups[0].body, dict(follow_ups[0].headers)) == (b"\x00\xff", {"é": "ü"})

    def test_a_follow_up_may_carry_the_id_of_what_it_replaces(self) -> None:
        transport = self.open()
        transport.send([self.message("same", body=b"0")])
        consumer = self.consume(transport)
        for attempt in range(1, 4):
            delivery = self.take_one(consumer)
            assert (delivery.id, delivery.body, delivery.delivery_count) == ("same", b"%d" % (attempt - 1), 1)
            retry = self.message("same", body=b"%d" % attempt)
            assert self.settle(transport, [delivery], Action.ACK, retry) == []
        assert self.settle(transport, [self.take_one(consumer)]) == []
        assert self.ids(consumer) == []

    @needs("delays")
    def test_a_follow_up_may_be_delayed(self) -> None:
        transport = self.open()
        transport.send([self.message("same")])
        consumer = self.consume(transport)
        retry = self.message("same", body=b"again", not_before=self.clock.time() + 60)
        assert self.settle(transport, [self.take_one(consumer)], Action.ACK, retry) == []
        self.advance(59)
        assert self.ids(consumer) == []
        self.advance(2)
        assert self.take_one(consumer).body == b"again"

    def test_a_follow_up_over_the_limit_is_refused_and_nothing_settled(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        delivery = self.take_one(self.consume(transport))
        large = self.message("large", body=b"x" * (transport.features.max_body_bytes + 1))
        with pytest.raises(TooLarge):
            self.settle(transport, [delivery], Action.ACK, large)
        assert self.settle(transport, [delivery]) == []

    # --- names ---------------------------------------------------------------------------------------------

    def test_odd_queue_names_are_told_apart(self) -> None:
        transport = self.open()
        transport.declare(ODD_NAMES)
        transport.send([self.message(f"in {name}", name) for name in ODD_NAMES])
        for name in ODD_NAMES:
            delivery = self.take_one(self.consume(transport, name))
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
        delivery = self.take_one(consumer)
        transport.close()
        calls: list[Callable[[], object]] = [
            lambda: transport.send([self.message()]),
            lambda: self.settle(transport, [delivery]),
            lambda: transport.extend([delivery], 10),
            lambda: consumer.receive(1, 0),
            lambda: transport.consumer(["q"], 1).receive(1, 0),
        ]
        for call in calls:
            with pytest.raises(Unavailable):
                call()
        consumer.wake()
        consumer.close()
        consumer.close()

    @needs("durable")
    def test_messages_survive_reopening(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(3)])
        transport.close()
        self.restart()
        assert self.ids(self.consume(self.open())) == ["m0", "m1", "m2"]

    @needs("durable", "leases")
    def test_outstanding_deliveries_survive_reopening(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        self.take_one(consumer)
        consumer.close()
        transport.close()
        self.restart()
        self.advance(self.lease_s() + 1)
        assert self.take_one(self.consume(self.open())).delivery_count == 2
