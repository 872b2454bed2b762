"""Results, then follow-ups, then acknowledgement; and what happens when a store is away."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dray.core.errors import SignatureError, TooLarge, Unavailable, Uncertain
from dray.core.fallback import Fallback
from dray.core.message import Action, Delivery, Outcome, Outgoing, Settlement, State, StoredResult
from dray.core.settler import BATCH, NOTHING_TO_DO, Settler
from dray.testing.clock import FakeClock
from tests.parts import memory_backend, memory_transport


class Rig:
    """A settler over memory, with a journal of what it did and errors to inject into each call."""

    def __init__(self, *, signed: bool = False, lease_s: float | None = 60.0, **features: Any) -> None:
        self.clock = FakeClock()
        self.journal: list[tuple[str, Any]] = []
        self.errors: dict[str, list[Exception]] = {"store": [], "settle": [], "extend": [], "bury": []}
        self.after: dict[str, list[Exception]] = {"settle": []}
        self.refuse: Callable[[str, Sequence[Any]], None] = lambda _what, _items: None
        self.genuine = True
        self.transport = memory_transport(self.clock, lease_s=lease_s, **features)
        self.backend = memory_backend(self.clock)
        for owner, name in (
            (self.backend, "store"),
            (self.transport, "settle"),
            (self.transport, "extend"),
            (self.transport, "bury"),
        ):
            setattr(owner, name, self.watched(name, getattr(owner, name)))
        self.settler = Settler(
            self.transport,
            self.backend,
            Fallback(self.transport.features, self.clock, "memory"),
            self.clock,
            random.Random(1),
            None,
            store_timeout_s=30.0,
            remember_ended_s=600.0 if signed else None,
            undeliverable=self.undeliverable,
            verify=self.verify,
        )
        self.consumer = self.transport.consumer(["q"], 100)

    def undeliverable(self, delivery: Delivery, reason: str) -> Outcome:
        result = StoredResult(delivery.id, State.FAILURE, reason.encode(), None)
        return Outcome(Settlement(delivery, Action.DEAD, (), reason), result)

    def verify(self, _delivery: Delivery) -> None:
        if not self.genuine:
            raise SignatureError("forged")

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(items: Any, *rest: Any, **named: Any) -> Any:
            self.refuse(name, items)
            if self.errors[name]:
                raise self.errors[name].pop(0)
            self.journal.append((name, list(items)))
            answer = call(items, *rest, **named)
            if self.after.get(name):
                raise self.after[name].pop(0)
            return answer

        return watch

    def take(self, *ids: str) -> list[Delivery]:
        self.transport.send([Outgoing("q", id_, b"body", {"task": "t"}) for id_ in ids])
        deliveries = self.consumer.receive(len(ids), 0)
        self.settler.track(deliveries)
        return deliveries

    def end(self, delivery: Delivery, action: Action = Action.ACK, *then: Outgoing, result: bool = True) -> Outcome:
        stored = StoredResult(delivery.id, State.SUCCESS, b"value", None) if result else None
        return Outcome(Settlement(delivery, action, then, "why" if action is Action.DEAD else None), stored)

    def left(self) -> list[tuple[str, int]]:
        return [(delivery.id, delivery.delivery_count) for delivery in self.consumer.receive(5000, 0)]

    def drain(self) -> int:
        """Steps until nothing is left to do, letting its pauses pass."""
        for steps in range(10_000):
            pause_s = self.settler.step()
            if pause_s == NOTHING_TO_DO:
                return steps
            self.clock.advance(pause_s)
        raise AssertionError("the settler never comes to an end")

    def calls(self) -> list[str]:
        return [name for name, _ in self.journal]


def test_results_are_stored_before_anything_is_acknowledged_and_in_one_batch() -> None:
    rig = Rig()
    deliveries = rig.take("a", "b", "c")
    rig.settler.collect([rig.end(delivery) for delivery in deliveries])
    assert rig.settler.backlog == 3
    assert rig.settler.step() == 0.0
    assert [(name, len(items)) for name, items in rig.journal] == [("store", 3), ("settle", 3)]
    assert (rig.settler.backlog, rig.settler.in_flight(), rig.settler.settled) == (0, [], 3)
    assert rig.settler.step() == NOTHING_TO_DO


def test_without_results_the_back_end_is_not_asked() -> None:
    rig = Rig()
    rig.settler.collect([rig.end(delivery, result=False) for delivery in rig.take("a")])
    rig.drain()
    assert rig.calls() == ["settle"]


def test_follow_ups_ride_on_the_settlement() -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.settler.collect([rig.end(delivery, Action.ACK, Outgoing("q", "next", b"", {}))])
    rig.drain()
    assert rig.left() == [("next", 1)]


def test_large_heaps_are_settled_in_bounded_batches() -> None:
    rig = Rig()
    deliveries = rig.take(*map(str, range(BATCH + 5)))
    rig.settler.collect([rig.end(delivery) for delivery in deliveries])
    rig.drain()
    assert [len(items) for name, items in rig.journal if name == "settle"] == [BATCH, 5]


def test_it_wakes_whoever_waits_for_work() -> None:
    rig = Rig()
    assert rig.settler.step() == NOTHING_TO_DO
    assert not rig.settler.wake.is_set()
    rig.settler.collect([rig.end(rig.take("a")[0])])
    assert rig.settler.wake.is_set()


# --- a store is away ---------------------------------------------------------------------------------------


def test_while_the_result_store_is_away_nothing_is_acknowledged_and_pauses_grow() -> None:
    rig = Rig()
    rig.settler.collect([rig.end(rig.take("a")[0])])
    rig.errors["store"] = [Unavailable("away")] * 4
    pauses = [rig.settler.step() for _ in range(4)]
    assert rig.calls() == []
    assert 0 < pauses[0] <= 0.05
    assert all(later > earlier * 0.9 for earlier, later in itertools.pairwise(pauses))
    assert [delivery.id for delivery in rig.settler.in_flight()] == ["a"], "its lease is kept"
    assert rig.settler.step() == 0.0
    assert rig.calls() == ["store", "settle"]


def test_after_the_bound_the_message_is_given_back_at_no_charge_and_without_a_result() -> None:
    rig = Rig(lease_s=600.0)
    with_result, without = rig.take("a", "b")
    rig.settler.collect([rig.end(with_result), rig.end(without, result=False)])
    rig.errors["store"] = [Unavailable("away")] * 1000
    rig.drain()
    assert 30 < rig.clock.monotonic() < 40
    assert rig.left() == [("a", 1)], "b has nothing to store: it is acknowledged"
    assert rig.backend.fetch(["a"]) == {}


def test_while_the_transport_is_away_it_tries_for_as_long_as_it_takes() -> None:
    rig = Rig(lease_s=6000.0)
    rig.settler.collect([rig.end(rig.take("a")[0])])
    rig.errors["settle"] = [Unavailable("away")] * 100
    rig.drain()
    assert rig.clock.monotonic() > 200
    assert rig.calls() == ["store", "settle"], "the result is stored once"
    assert rig.left() == []


def test_a_settlement_whose_answer_was_lost_is_repeated_without_harm() -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.settler.collect([rig.end(delivery, Action.ACK, Outgoing("q", "next", b"", {}))])
    rig.after["settle"] = [Uncertain("no answer")]
    rig.drain()
    assert rig.calls() == ["store", "settle", "settle"]
    assert rig.left() == [("next", 1)], "the follow-up is sent once"
    assert rig.settler.in_flight() == []


def test_outcomes_that_come_meanwhile_wait_their_turn() -> None:
    rig = Rig()
    a, b = rig.take("a", "b")
    rig.settler.collect([rig.end(a)])
    rig.errors["settle"] = [Unavailable("away")]
    rig.settler.step()
    rig.settler.collect([rig.end(b)])
    assert rig.settler.backlog == 2
    rig.drain()
    assert [[item.delivery.id for item in items] for name, items in rig.journal if name == "settle"] == [["a"], ["b"]]


# --- one bad outcome ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["store", "settle"])
def test_one_outcome_that_cannot_be_written_harms_no_other(what: str) -> None:
    rig = Rig()
    deliveries = rig.take(*(f"id{n}" for n in range(100)))

    def refuse(name: str, items: Sequence[Any]) -> None:
        for item in items:
            id_ = item.id if name == "store" else getattr(item, "delivery", item).id
            bad_settlement = name == "settle" and item.action is Action.ACK
            if name == what and id_ == "id77" and (name == "store" or bad_settlement):
                raise TooLarge("no such body")

    rig.refuse = refuse
    rig.settler.collect([rig.end(delivery) for delivery in deliveries])
    steps = rig.drain()
    assert steps < 40, "the culprit is found by halves"
    (letter,) = rig.transport.dead_list("q", 10)
    assert (letter.id, letter.reason) == ("id77", "its outcome could not be written: TooLarge: no such body")
    assert len(rig.backend.fetch([f"id{n}" for n in range(100)])) == (99 if what == "store" else 100)
    assert rig.settler.in_flight() == []


def test_what_cannot_even_be_a_dead_letter_is_left_to_its_lease() -> None:
    rig = Rig()
    bad, good = rig.take("bad", "good")

    def refuse(name: str, items: Sequence[Any]) -> None:
        if name == "settle" and any(item.delivery.id == "bad" for item in items):
            raise RuntimeError("no")

    rig.refuse = refuse
    rig.settler.collect([rig.end(bad), rig.end(good)])
    rig.drain()
    assert rig.settler.in_flight() == []
    rig.clock.advance(61)
    assert rig.left() == [("bad", 2)]


def test_a_retry_that_the_transport_cannot_delay_is_a_dead_letter() -> None:
    rig = Rig(max_delay_s=0.0)
    (delivery,) = rig.take("a")
    later = Outgoing("q", "a", b"", {}, 0, rig.clock.time() + 60)
    rig.settler.collect([rig.end(delivery, Action.ACK, later)])
    rig.drain()
    (letter,) = rig.transport.dead_list("q", 10)
    assert "NotSupported" in letter.reason


# --- leases ------------------------------------------------------------------------------------------------


def test_leases_are_extended_until_the_outcome_is_settled() -> None:
    rig = Rig()
    a, _b = rig.take("a", "b")
    rig.settler.collect([rig.end(a)])
    rig.drain()
    for _ in range(5):
        rig.clock.advance(50)
        assert rig.settler.renew() == []
        assert rig.left() == []
    rig.clock.advance(61)
    assert rig.left() == [("b", 2)]


def test_a_lost_delivery_is_forgotten_and_its_outcome_dropped() -> None:
    rig = Rig()
    (lost,) = rig.take("lost")
    rig.clock.advance(61)
    assert rig.left() == [("lost", 2)], "another worker has it now"
    (kept,) = rig.take("kept")
    assert rig.settler.renew() == [lost]
    assert rig.settler.in_flight() == [kept]
    rig.settler.collect([rig.end(lost), rig.end(kept)])
    rig.drain()
    assert set(rig.backend.fetch(["lost", "kept"])) == {"kept"}


def test_a_delivery_that_was_lost_before_anybody_noticed_leaves_its_follow_ups_unsent() -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.clock.advance(61)
    assert rig.left() == [("a", 2)]
    rig.settler.collect([rig.end(delivery, Action.ACK, Outgoing("q", "next", b"", {}))])
    rig.drain()
    assert rig.left() == []
    assert rig.settler.in_flight() == []


def test_without_leases_there_is_nothing_to_extend() -> None:
    rig = Rig(lease_s=None)
    rig.take("a")
    assert rig.settler.renew() == []
    assert rig.calls() == []


def test_what_was_not_begun_is_given_back_at_no_charge() -> None:
    rig = Rig()
    rig.settler.give_back(rig.take("a"))
    rig.drain()
    assert rig.left() == [("a", 1)]


# --- reports -----------------------------------------------------------------------------------------------


def progress(id_: str, body: bytes) -> StoredResult:
    return StoredResult(id_, State.STARTED, body, None)


def test_only_the_newest_report_of_a_task_is_stored() -> None:
    rig = Rig()
    rig.settler.report([progress("a", b"1"), progress("b", b"1")])
    rig.settler.report([progress("a", b"2")])
    rig.drain()
    assert [{(r.id, r.body) for r in items} for _, items in rig.journal] == [{("a", b"2"), ("b", b"1")}]


def test_a_report_is_not_stored_when_the_outcome_is_there() -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.settler.report([progress("a", b"1")])
    rig.settler.collect([rig.end(delivery)])
    rig.drain()
    assert rig.calls() == ["store", "settle"]
    assert rig.backend.fetch(["a"])["a"].state is State.SUCCESS


@pytest.mark.parametrize("error", [Unavailable("away"), TooLarge("too long a note"), ValueError("?")])
def test_a_report_that_cannot_be_stored_stops_nothing(error: Exception) -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.errors["store"] = [error]
    rig.settler.report([progress("other", b"1")])
    rig.settler.collect([rig.end(delivery)])
    rig.drain()
    assert rig.calls() == ["store", "settle"]


# --- replays -----------------------------------------------------------------------------------------------


def test_with_signed_messages_what_has_ended_is_remembered_before_it_is_acknowledged() -> None:
    rig = Rig(signed=True)
    ended, retried, back, dead = rig.take("ended", "retried", "back", "dead")
    rig.settler.collect(
        [
            rig.end(ended),
            rig.end(retried, Action.ACK, Outgoing("q", "retried", b"", {})),
            rig.end(back, Action.RELEASE, result=False),
            rig.end(dead, Action.DEAD),
        ]
    )
    rig.drain()
    assert rig.calls() == ["store", "bury", "settle"]
    marks = rig.transport.buried(["ended", "retried", "back", "dead"])
    assert marks == {"ended": "ended", "dead": "dead"}
    rig.clock.advance(601)
    assert rig.transport.buried(["ended"]) == {}


def test_that_a_task_was_revoked_is_not_forgotten_when_a_copy_of_it_ends() -> None:
    rig = Rig(signed=True)
    deliveries = rig.take("a", "b")
    rig.transport.bury({"a": "terminate"}, rig.clock.time() + 60)
    rig.settler.collect([rig.end(delivery) for delivery in deliveries])
    rig.drain()
    rig.clock.advance(61)
    assert rig.transport.buried(["a", "b"]) == {"a": "terminate", "b": "ended"}


def test_what_is_stored_is_not_given_back_because_it_cannot_be_remembered() -> None:
    rig = Rig(signed=True)
    (delivery,) = rig.take("t")
    rig.errors["bury"] = [Unavailable("away") for _ in range(3)]
    rig.settler.collect([rig.end(delivery)])
    for _ in range(3):
        assert rig.settler.step() > 0
        rig.clock.advance(100)
    assert rig.settler.step() == 0
    assert [name for name, _ in rig.journal] == ["store", "bury", "settle"]
    assert rig.left() == []


def test_a_forged_copy_does_not_make_the_genuine_message_count_as_ended() -> None:
    rig = Rig(signed=True)
    (forged,) = rig.take("a")
    rig.transport.send([Outgoing("q", "a", b"genuine", {})])
    rig.genuine = False
    rig.settler.collect([rig.end(forged, Action.DEAD)])
    rig.drain()
    assert rig.transport.buried(["a"]) == {}
    assert rig.left() == [("a", 1)]


def test_without_signatures_nothing_is_remembered() -> None:
    rig = Rig()
    rig.settler.collect([rig.end(rig.take("a")[0])])
    rig.drain()
    assert "bury" not in rig.calls()


def test_no_more_is_taken_while_results_cannot_be_stored() -> None:
    rig = Rig()
    (delivery,) = rig.take("a")
    rig.settler.collect([rig.end(delivery)])
    rig.errors["store"] = [Unavailable("away")] * 50
    rig.settler.step()
    rig.clock.advance(31)
    assert rig.settler.step() == 0.0
    assert rig.settler.store_is_away
    rig.settler.step()  # gives it back
    assert rig.left() == [("a", 1)]
    rig.settler.step()  # the store answers again
    assert not rig.settler.store_is_away
