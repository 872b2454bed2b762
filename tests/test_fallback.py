"""What a transport cannot do itself, done with what every transport can."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from dray.core.errors import DecodeError, NotSupported, SignatureError
from dray.core.fallback import Fallback
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.testing.clock import FakeClock
from tests.parts import NATIVE, make_codec, signer

MESSAGE = Outgoing("q", "id1", b"[[],{}]", {"task": "t", "type": "json"}, priority=7)


def fallback(clock: FakeClock, **features: object) -> Fallback:
    return Fallback(replace(NATIVE, **features), clock, "reduced")  # type: ignore[arg-type]


def delivery(**headers: str) -> Delivery:
    return Delivery("q", "id1", b"[[],{}]", {"task": "t", "type": "json", **headers}, receipt=1)


def test_a_transport_that_can_all_is_left_alone() -> None:
    native = Fallback(NATIVE, FakeClock(), "all")
    settlement = Settlement(delivery(), Action.DEAD, (MESSAGE,), "why")
    assert native.native
    assert native.outgoing(MESSAGE) is MESSAGE
    assert native.settlement(settlement) is settlement
    assert native.early(delivery(eta="9e10")) is None


@pytest.mark.parametrize(
    "features", [{"dead_letter": False}, {"release": False}, {"max_delay_s": 900.0}, {"priorities": 1}]
)
def test_whatever_is_missing_is_noticed(features: dict[str, object]) -> None:
    assert not fallback(FakeClock(), **features).native


def test_without_priorities_all_are_alike_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reduced = fallback(FakeClock(), priorities=1)
    with caplog.at_level(logging.WARNING):
        assert [reduced.outgoing(MESSAGE._replace(priority=level)).priority for level in (0, 2, 9)] == [0, 0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "the transport reduced tells no priorities apart as it is set up: all are alike"
    ]
    few = fallback(FakeClock(), priorities=3)  # whose transport spreads them
    assert [few.outgoing(MESSAGE._replace(priority=level)).priority for level in (0, 2, 9)] == [0, 2, 9]


def test_a_long_delay_is_made_of_short_ones() -> None:
    clock = FakeClock()
    reduced = fallback(clock, max_delay_s=900.0)
    due = clock.time() + 2000
    sent, hops = reduced.outgoing(MESSAGE._replace(not_before=due, headers={**MESSAGE.headers, "eta": repr(due)})), 0
    while True:
        assert sent.not_before is not None
        assert sent.not_before <= clock.time() + 900
        clock.advance(sent.not_before - clock.time())
        arrived = Delivery(sent.queue, sent.id, sent.body, sent.headers, 1)
        early = reduced.early(arrived)
        if early is None:
            break
        (sent,) = reduced.settlement(early).then
        hops += 1
    assert hops == 2
    assert clock.time() == due


def test_a_delay_that_fits_is_kept() -> None:
    clock = FakeClock()
    message = MESSAGE._replace(not_before=clock.time() + 900)
    assert fallback(clock, max_delay_s=900.0).outgoing(message) == message


def test_without_delays_a_delay_is_refused_and_a_past_one_fine() -> None:
    clock = FakeClock()
    reduced = fallback(clock, max_delay_s=0.0)
    with pytest.raises(NotSupported, match="'reduced' cannot delay"):
        reduced.outgoing(MESSAGE._replace(not_before=clock.time() + 1))
    reduced.outgoing(MESSAGE._replace(not_before=clock.time() - 1))


def test_a_dead_letter_becomes_a_message_of_the_dead_queue() -> None:
    reduced = fallback(FakeClock(), dead_letter=False)
    other = MESSAGE._replace(id="other")
    settled = reduced.settlement(Settlement(delivery(attempt="2"), Action.DEAD, (other,), "why " * 200))
    assert settled.action is Action.ACK
    first, letter = settled.then
    assert first == other
    assert (letter.queue, letter.id, letter.body) == ("q.dead", "id1", b"[[],{}]")
    assert letter.headers["x-dead-queue"] == "q"
    assert letter.headers["x-dead-reason"] == ("why " * 200)[:500]
    assert letter.headers["attempt"] == "2"


def test_a_release_becomes_a_copy_due_at_once() -> None:
    reduced = fallback(FakeClock(), release=False)
    settled = reduced.settlement(Settlement(delivery(prio="12", expires="5.5"), Action.RELEASE))
    assert settled.action is Action.ACK
    assert settled.then == (Outgoing("q", "id1", b"[[],{}]", delivery(prio="12", expires="5.5").headers, 9, None, 5.5),)


def test_follow_ups_are_adapted_too() -> None:
    reduced = fallback(FakeClock(), priorities=1)
    assert reduced.settlement(Settlement(delivery(), Action.ACK, (MESSAGE,))).then[0].priority == 0


def test_headers_that_make_no_sense_are_decode_errors() -> None:
    with pytest.raises(DecodeError):
        fallback(FakeClock(), max_delay_s=9.0).early(delivery(eta="soon"))
    with pytest.raises(DecodeError):
        fallback(FakeClock(), release=False).settlement(Settlement(delivery(prio="-"), Action.RELEASE))


def test_what_was_not_verified_is_never_signed_again() -> None:
    """Neither re-arming, nor giving back, nor burying may turn a forged message into a genuine one."""
    clock = FakeClock()
    codec = make_codec(clock, signer=signer())
    reduced = fallback(clock, max_delay_s=9.0, release=False, dead_letter=False)
    forged = delivery(eta=repr(clock.time() + 100), sig="0" * 64, issued=repr(clock.time()))
    early = reduced.early(forged)
    assert early is not None
    for settlement in (early, Settlement(forged, Action.RELEASE), Settlement(forged, Action.DEAD, (), "why")):
        (copy,) = reduced.settlement(settlement).then
        with pytest.raises(SignatureError):
            codec.decode_call(Delivery(copy.queue, copy.id, copy.body, copy.headers, 1))


def test_what_was_genuine_stays_so_when_given_back_or_sent_on() -> None:
    clock = FakeClock()
    codec = make_codec(clock, signer=signer())
    eta = {"task": "t", "type": "json", "eta": repr(clock.time() + 100)}
    headers, body = codec.encode_call(eta, "q", "id1", ((), {}))
    genuine = Delivery("q", "id1", body, headers, 1)
    reduced = fallback(clock, max_delay_s=9.0, release=False)
    early = reduced.early(genuine)
    assert early is not None
    for settlement in (early, Settlement(genuine, Action.RELEASE)):
        (copy,) = reduced.settlement(settlement).then
        assert codec.decode_call(Delivery(copy.queue, copy.id, copy.body, copy.headers, 1)) == ([], {})
