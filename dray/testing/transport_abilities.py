"""The part of the transport kit for what a transport may declare: delays, priorities, dead letters and the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dray.core.message import Action, Outgoing, Settlement
from dray.testing.harness import ODD_NAMES, needs

if TYPE_CHECKING:
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object

YEAR_S = 366 * 86400.0


class AbilityTests(TransportHarness):
    """What a transport does if it says so."""

    # --- delays --------------------------------------------------------------------------------------------

    @needs("delays")
    def test_a_delayed_message_is_not_early(self) -> None:
        transport = self.open()
        due = self.clock.time() + 10
        transport.send([self.message("later", not_before=due), self.message("now")])
        consumer = self.consume(transport)
        assert self.ids(consumer) == ["now"]
        self.advance(9.9)
        assert self.ids(consumer) == []
        self.advance(0.2)
        assert self.ids(consumer) == ["later"]

    @needs("delays")
    def test_a_due_time_in_the_past_means_now(self) -> None:
        transport = self.open()
        transport.send([self.message("a", not_before=0.0), self.message("b", not_before=self.clock.time())])
        assert self.ids(self.consume(transport)) == ["a", "b"]

    @needs("delays")
    def test_delayed_messages_come_in_the_order_they_are_due(self) -> None:
        transport = self.open()
        now = self.clock.time()
        transport.send([self.message(f"{seconds}", not_before=now + seconds) for seconds in (30, 10, 20.5, 20.25)])
        consumer = self.consume(transport)
        self.advance(31)
        assert self.ids(consumer) == ["10", "20.25", "20.5", "30"]

    @needs("delays")
    def test_the_longest_declared_delay_is_kept(self) -> None:
        transport = self.open()
        delay_s = min(transport.features.max_delay_s, 1000 * YEAR_S)
        transport.send([self.message(not_before=self.clock.time() + delay_s)])
        consumer = self.consume(transport)
        self.advance(delay_s / 2)
        assert self.ids(consumer) == []
        self.advance(delay_s / 2 + 1)
        assert self.ids(consumer) == ["m"]

    @needs("delays", "durable")
    def test_delayed_messages_survive_reopening(self) -> None:
        transport = self.open()
        transport.send([self.message(not_before=self.clock.time() + 100)])
        transport.close()
        self.restart()
        consumer = self.consume(self.open())
        assert self.ids(consumer) == []
        self.advance(101)
        assert self.ids(consumer) == ["m"]

    # --- priorities ----------------------------------------------------------------------------------------

    @needs("priorities")
    def test_higher_priorities_come_first(self) -> None:
        transport = self.open()
        told_apart = sorted(
            {round(9 * step / (transport.features.priorities - 1)) for step in range(10)} & set(range(10))
        )
        transport.send([self.message(f"{priority}", priority=priority) for priority in told_apart])
        transport.send([self.message("last", priority=0), self.message("9 again", priority=9)])
        expected = [str(priority) for priority in reversed(told_apart)]
        assert self.ids(self.consume(transport)) == ["9", "9 again", *expected[1:], "last"]

    @needs("priorities", "delays", "release")
    def test_a_priority_is_kept_by_delays_and_releases(self) -> None:
        transport = self.open()
        transport.send([self.message("high", priority=9, not_before=self.clock.time() + 1), self.message("low")])
        consumer = self.consume(transport)
        self.advance(2)
        deliveries = self.take(consumer, 2)
        assert [delivery.id for delivery in deliveries] == ["high", "low"]
        assert self.settle(transport, deliveries[::-1], Action.RELEASE) == []
        assert self.ids(consumer) == ["high", "low"]

    @needs("priorities", "delays", "leases")
    def test_a_priority_is_kept_when_leases_end(self) -> None:
        transport = self.open()
        due = self.clock.time() + self.lease_s() * 2
        transport.send([self.message("low"), self.message("high", priority=9)])
        transport.send([self.message("later", priority=9, not_before=due)])
        consumer = self.consume(transport)
        assert self.ids(consumer) == ["high", "low"]
        self.advance(self.lease_s() * 2 + 1)
        assert self.ids(consumer)[2:] == ["low"]

    # --- release -------------------------------------------------------------------------------------------

    @needs("release")
    def test_a_released_message_returns_at_once_at_no_charge(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        for _ in range(3):
            delivery = self.take_one(consumer)
            assert delivery.delivery_count == 1
            assert self.settle(transport, [delivery], Action.RELEASE) == []
        consumer.close()
        assert self.take_one(self.consume(self.open())).body == b"body"

    @needs("release", "leases")
    def test_a_release_takes_back_one_delivery_only(self) -> None:
        transport = self.open()
        transport.send([self.message()])
        consumer = self.consume(transport)
        self.take_one(consumer)
        self.advance(self.lease_s() + 1)
        second = self.take_one(consumer)
        assert second.delivery_count == 2
        assert self.settle(transport, [second], Action.RELEASE) == []
        assert self.settle(transport, [second], Action.RELEASE) == [second]
        assert self.take_one(consumer).delivery_count == 2

    # --- dead letters --------------------------------------------------------------------------------------

    @needs("dead_letter")
    def test_a_dead_letter_keeps_all_and_is_not_delivered(self) -> None:
        transport = self.open()
        transport.send([self.message("bad", "dq", b"\x00\xfe", headers={"task": "é"}), self.message("fine", "dq")])
        consumer = self.consume(transport, "dq")
        bad, fine = self.take(consumer, 2)
        then = (self.message("told", "dq"),)
        reason = "it does not parse: 'é' \U0001f69a"
        assert transport.settle([Settlement(bad, Action.DEAD, then, reason), Settlement(fine, Action.ACK)]) == []
        self.advance((transport.features.lease_s or 0) * 2)
        assert self.ids(consumer) == ["told"]
        [letter] = self.open().dead_list("dq", 10)
        assert (letter.id, letter.queue, letter.body, dict(letter.headers)) == ("bad", "dq", b"\x00\xfe", {"task": "é"})
        assert (letter.reason, letter.delivery_count) == (reason, 1)
        assert letter.died_at == pytest.approx(self.clock.time() - (transport.features.lease_s or 0) * 2, abs=1)
        assert transport.dead_get(["bad", "unknown"]) == [letter]

    @needs("dead_letter")
    def test_dead_letters_are_listed_newest_first(self) -> None:
        transport = self.open()
        for number in range(5):
            transport.send([self.message(f"d{number}", "ab"[number % 2])])
            self.settle(transport, [self.take_and_close(transport, "a", "b")], Action.DEAD)
            self.advance(1)
        assert [letter.id for letter in transport.dead_list(None, 3)] == ["d4", "d3", "d2"]
        assert [letter.id for letter in transport.dead_list("b", 10)] == ["d3", "d1"]
        assert transport.dead_list("unknown", 10) == []

    @needs("dead_letter")
    def test_a_dead_letter_can_be_sent_again(self) -> None:
        """As the core does it: sent, then purged."""
        transport = self.open()
        transport.send([self.message("bad", body=b"data", headers={"a": "b"})])
        consumer = self.consume(transport)
        for _ in range(3):
            delivery = self.take_one(consumer)
            assert (delivery.body, dict(delivery.headers), delivery.delivery_count) == (b"data", {"a": "b"}, 1)
            assert self.settle(transport, [delivery], Action.DEAD) == []
            (letter,) = transport.dead_get(["bad", "unknown"])
            transport.send([Outgoing(letter.queue, letter.id, letter.body, letter.headers)])
            assert transport.dead_purge([letter.id]) == ["bad"]
            assert transport.dead_list(None, 10) == []

    @needs("dead_letter")
    def test_a_purged_dead_letter_is_gone(self) -> None:
        transport = self.open()
        transport.send([self.message("bad"), self.message("worse")])
        self.settle(transport, self.take(self.consume(transport), 2), Action.DEAD)
        assert transport.dead_purge(["bad", "unknown"]) == ["bad"]
        assert [letter.id for letter in transport.dead_list(None, 10)] == ["worse"]
        assert transport.dead_purge(["bad"]) == []

    @needs("dead_letter", "durable")
    def test_dead_letters_survive_reopening(self) -> None:
        transport = self.open()
        transport.send([self.message("bad")])
        self.settle(transport, self.take(self.consume(transport), 1), Action.DEAD)
        transport.close()
        self.restart()
        transport = self.open()
        assert [letter.id for letter in transport.dead_get(["bad"])] == ["bad"]

    @needs("dead_letter")
    def test_dead_letters_with_odd_names_are_found(self) -> None:
        transport = self.open()
        transport.send([self.message(name, name) for name in ODD_NAMES])
        self.settle(transport, self.take(self.consume(transport, *ODD_NAMES), len(ODD_NAMES)), Action.DEAD)
        assert {(letter.id, letter.queue) for letter in transport.dead_list(None, 1000)} == {(n, n) for n in ODD_NAMES}
        assert [letter.id for letter in transport.dead_list("../x", 10)] == ["../x"]
        assert {letter.id for letter in transport.dead_get(ODD_NAMES)} == set(ODD_NAMES)
        assert set(transport.dead_purge(ODD_NAMES)) == set(ODD_NAMES)

    # --- tombstones ----------------------------------------------------------------------------------------

    @needs("tombstones")
    def test_a_buried_id_is_remembered_until_it_expires(self) -> None:
        transport = self.open()
        expires_at = self.clock.time() + 100
        transport.bury({"a": "revoked", "b": "ended é"}, expires_at)
        other = self.open()
        assert other.buried(["a", "b", "c"]) == {"a": "revoked", "b": "ended é"}
        other.exhume(["b", "unknown"])
        assert transport.buried(["a", "b"]) == {"a": "revoked"}
        self.advance(99)
        assert transport.buried(["a"]) == {"a": "revoked"}
        self.advance(2)
        assert transport.buried(["a"]) == {}
        transport.bury({}, expires_at)
        assert transport.buried([]) == {}

    @needs("tombstones")
    def test_a_later_mark_replaces_the_earlier(self) -> None:
        transport = self.open()
        transport.bury({"a": "old"}, self.clock.time() + 10)
        transport.bury({"a": "new"}, self.clock.time() + 100)
        self.advance(20)
        transport.bury({"b": "x"}, self.clock.time() + 100)
        assert transport.buried(["a", "b"]) == {"a": "new", "b": "x"}

    @needs("tombstones")
    def test_a_buried_message_is_handed_out_as_any_other(self) -> None:
        """It is the worker that settles it: a message that just vanished would leave its caller waiting for ever."""
        transport = self.open()
        consumer = self.consume(transport)
        transport.send([self.message("running")])
        running = self.take_one(consumer)
        transport.send([self.message("waiting")])
        transport.bury({"running": "r", "waiting": "r", "unknown": "r"}, self.clock.time() + 100, hasten=True)
        assert self.settle(transport, [running]) == []
        assert self.ids(consumer) == ["waiting"]

    @needs("tombstones", "delays", "hastens")
    def test_burying_can_hasten_delayed_messages(self) -> None:
        transport = self.open()
        consumer = self.consume(transport)
        due = self.clock.time() + 1000
        transport.send([self.message(id_, not_before=due) for id_ in ("kept", "plain", "hastened")])
        transport.bury({"plain": "r"}, due)
        assert self.ids(consumer) == []
        transport.bury({"hastened": "r"}, due, hasten=True)
        hastened = self.take_one(consumer)
        assert hastened.id == "hastened"
        assert self.settle(transport, [hastened]) == []
        assert self.ids(consumer) == []
        self.advance(1001)
        assert sorted(self.ids(consumer)) == ["kept", "plain"]

    @needs("tombstones", "durable")
    def test_tombstones_survive_reopening(self) -> None:
        transport = self.open()
        transport.bury({"a": "revoked"}, self.clock.time() + 100)
        transport.close()
        self.restart()
        assert self.open().buried(["a"]) == {"a": "revoked"}

    @needs("tombstones")
    def test_odd_ids_can_be_buried(self) -> None:
        transport = self.open()
        transport.send([self.message(name) for name in ODD_NAMES])
        marks = {name: f"mark of {name}" for name in ODD_NAMES}
        transport.bury(marks, self.clock.time() + 100, hasten=True)
        assert transport.buried(ODD_NAMES) == marks
        transport.exhume(ODD_NAMES)
        assert transport.buried(ODD_NAMES) == {}

    # --- looking inside ------------------------------------------------------------------------------------

    @needs("inspectable")
    def test_stats_count_what_is_there(self) -> None:
        transport = self.open()
        transport.send([self.message(f"m{number}") for number in range(3)])
        self.advance(5)
        stats = transport.stats(["q", "unknown"])
        assert stats["q"].ready == 3
        assert not any(stats["q"][1:4]), f"nothing was taken, delayed or dead: {stats['q']}"
        assert stats["q"].oldest_age_s is None or stats["q"].oldest_age_s == pytest.approx(5, abs=1)
        assert not any(stats["unknown"])
        self.take(self.consume(transport), 2)
        seen = transport.stats(["q"])["q"]
        assert seen.ready == 1
        assert seen.leased in {2, None}

    @needs("inspectable", "delays", "dead_letter")
    def test_stats_count_the_delayed_and_the_dead(self) -> None:
        transport = self.open()
        transport.send([self.message("dead"), self.message("later", not_before=self.clock.time() + 60)])
        self.settle(transport, self.take(self.consume(transport), 1), Action.DEAD)
        seen = transport.stats(["q"])["q"]
        assert seen.ready == 0
        assert not seen.leased
        assert seen.delayed in {1, None}
        assert seen.dead in {1, None}
        assert seen.oldest_age_s is None

    @needs("inspectable")
    def test_queues_lists_what_was_declared_or_holds_anything(self) -> None:
        transport = self.open()
        transport.declare(["declared", "a/b"])
        transport.send([self.message(queue="filled")])
        assert {"declared", "a/b", "filled"} <= set(transport.queues())

    @needs("inspectable")
    def test_peek_claims_nothing(self) -> None:
        transport = self.open()
        sent = [self.message(f"m{number}", body=b"%d" % number) for number in range(4)]
        transport.send(sent)
        for _ in range(2):
            peeked = transport.peek("q", 3)
            assert [(message.id, message.body, dict(message.headers)) for message in peeked] == [
                (message.id, message.body, dict(message.headers)) for message in sent[:3]
            ]
        assert transport.peek("unknown", 3) == []
        assert self.take(self.consume(transport), 1)[0].delivery_count == 1

    @needs("inspectable", "delays", "priorities", "sees_delayed")
    def test_peek_keeps_the_order_of_delivery(self) -> None:
        transport = self.open()
        due = self.clock.time() + 60
        transport.send([self.message("later", not_before=due), self.message("low"), self.message("high", priority=9)])
        peeked = transport.peek("q", 10)
        assert [message.id for message in peeked] == ["high", "low", "later"]
        assert [message.priority for message in peeked][:2] == [9, 0]
        assert peeked[2].not_before == pytest.approx(due, abs=0.01)

    @needs("inspectable")
    def test_purge_deletes_what_waits_and_nothing_else(self) -> None:
        transport = self.open()
        consumer = self.consume(transport)
        transport.send([self.message("leased")])
        leased = self.take_one(consumer)
        transport.send([self.message("a"), self.message("b"), self.message("other", "elsewhere")])
        assert transport.purge("q") == 2
        assert transport.purge("q") == 0
        assert transport.purge("unknown") == 0
        assert self.ids(consumer) == []
        assert self.ids(self.consume(transport, "elsewhere")) == ["other"]
        assert self.settle(transport, [leased]) == []

    @needs("inspectable", "delays", "sees_delayed")
    def test_purge_deletes_delayed_messages(self) -> None:
        transport = self.open()
        transport.send([self.message(not_before=self.clock.time() + 1)])
        assert transport.purge("q") == 1
        self.advance(2)
        assert self.ids(self.consume(transport)) == []
