"""The part of the transport kit about who owns a message: deliveries, leases, settlements."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from dray.core.errors import TooLarge
from dray.core.message import Action, Settlement
from dray.testing.harness import Background, needs

if TYPE_CHECKING:
    from dray.core.contracts import Transport
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object

SENDERS, CONSUMERS, EACH = 8, 4, 100


class OwnershipTests(TransportHarness):
    """What every transport does with deliveries."""

    # --- who owns what -------------------------------------------------------------------------------------

    def test_two_consumers_never_share_a_delivery(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(100)])
        consumers = [self.consume(transport), self.consume(self.open())]
        found: list[str] = []
        for _ in range(200):
            more = [delivery for consumer in consumers for delivery in consumer.receive(2, 0)]
            more = more or [delivery for consumer in consumers for delivery in self.take(consumer, 2)]
            found += [delivery.id for delivery in more]
            if not more:
                break
        assert sorted(found) == sorted(f"m{number}" for number in range(100))

    def test_senders_and_consumers_at_once_lose_and_share_nothing(self) -> None:
        transports = [self.open_now() for _ in range(2)]
        sent = [f"{sender}-{number}" for sender in range(SENDERS) for number in range(EACH)]
        done: list[str] = []
        stop = threading.Event()

        def send(sender: int) -> None:
            for start in range(0, EACH, 10):
                batch = [self.message(f"{sender}-{number}") for number in range(start, start + 10)]
                transports[0].send(batch)

        def consume(transport: Transport, turn: threading.Lock) -> None:
            consumer = self.consume(transport)
            while not stop.is_set():
                deliveries = consumer.receive(7, 0.05)
                with turn:  # one thread at a time settles, says the contract
                    assert self.settle(transport, deliveries) == []
                done.extend(delivery.id for delivery in deliveries)
                if len(done) >= len(sent):
                    stop.set()
            consumer.close()

        background = Background()
        turns = [threading.Lock() for _ in transports]
        for number in range(CONSUMERS):
            background.start(consume, transports[number % 2], turns[number % 2])
        for sender in range(SENDERS):
            background.start(send, sender)
        stop.wait(60)
        stop.set()
        background.join()
        assert Counter(done) == Counter(sent)

    def test_an_unsettled_delivery_comes_back_after_close(self) -> None:
        other, transport = self.open(), self.open()
        transport.send([self.message("outstanding"), self.message("done")])
        consumer = self.consume(transport)
        _, done = self.take(consumer, 2)
        assert self.settle(transport, [done]) == []
        consumer.close()
        transport.close()
        self.advance((transport.features.lease_s or 0) + 1)
        assert self.take_one(self.consume(other)).id == "outstanding"

    @needs("no_leases")
    def test_without_leases_there_is_nothing_to_extend(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        delivery = self.take_one(self.consume(transport))
        assert delivery.lease_until is None
        assert transport.extend([delivery], 10) == []
        assert self.settle(transport, [delivery]) == []

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
    def test_a_lost_delivery_does_not_stand_in_the_way_of_the_current_one(self) -> None:
        """A worker that got back what it had lost holds both."""
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        lost = self.take_one(consumer)
        self.advance(self.lease_s() + 1)
        current = self.take_one(consumer)
        assert transport.extend([lost, current], self.lease_s()) == [lost]
        settlements = [Settlement(delivery, Action.ACK, (self.message("next"),)) for delivery in (lost, current)]
        assert transport.settle(settlements) == [lost]
        assert self.ids(consumer) == ["next"]

    @needs("leases")
    @pytest.mark.parametrize("action", list(Action))
    def test_a_stale_settlement_of_any_kind_is_refused(self, action: Action) -> None:
        transport, thief = self.open(), self.open()
        transport.send([self.message()])
        lost = self.take_one(self.consume(transport))
        self.advance(self.lease_s() + 1)
        stolen = self.take_one(self.consume(thief))
        assert self.settle(transport, [lost], self.possible(action)) == [lost]
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

    @needs("dead_letter")
    def test_putting_aside_twice_is_harmless(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        delivery = self.take_one(self.consume(transport))
        assert self.settle(transport, [delivery], Action.DEAD) == []
        assert self.settle(transport, [delivery], Action.DEAD) == [delivery]
        (letter,) = transport.dead_get(["m"])
        assert letter.reason == "why"

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
