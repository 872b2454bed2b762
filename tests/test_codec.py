"""Calls and results to bytes and back: nothing unaccepted, unverified or oversized gets through."""

from __future__ import annotations

import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.codec import FUTURE_S, Codec, float_header, int_header
from dray.core.errors import CodecError, ContentRefused, DecodeError, EncodeError, PluginNotFound, SignatureError
from dray.core.message import Delivery, State, StoredResult
from dray.testing.clock import FakeClock
from tests.parts import MAX_BYTES, compressor, make_codec, serializer, signer

PLAIN = {"task": "add", "type": "json"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)


CODECS = [make_codec(), make_codec(signer=signer()), make_codec(compressor=compressor("zlib"), compress_over=0)]


def call(codec: Codec, args: Any = (2, 3), kwargs: Any = None, **headers: str) -> Delivery:
    sealed, body = codec.encode_call({**PLAIN, **headers}, "q", "id1", (args, kwargs or {}))
    return Delivery("q", "id1", body, sealed, None)


def stored(codec: Codec, value: object, state: State = State.SUCCESS) -> StoredResult:
    return StoredResult("id1", state, codec.encode_result("id1", value, state), None)


@given(st.lists(JSON, max_size=3), st.dictionaries(st.text("xyz", min_size=1, max_size=3), JSON, max_size=3))
def test_a_call_comes_back_as_it_was_sent(args: list[Any], kwargs: dict[str, Any]) -> None:
    for codec in (
        make_codec(),
        make_codec(signer=signer()),
        make_codec(compressor=compressor("zlib"), compress_over=0),
    ):
        assert codec.decode_call(call(codec, args, kwargs)) == (args, kwargs)


@given(JSON)
def test_a_result_comes_back_as_it_was_returned(value: Any) -> None:
    for codec in (
        make_codec(),
        make_codec(signer=signer()),
        make_codec(compressor=compressor("zlib"), compress_over=0),
    ):
        assert codec.decode_result(stored(codec, value)) == value


# --- what is accepted --------------------------------------------------------------------------------------


def test_a_serializer_that_is_not_accepted_is_refused_before_it_sees_the_bytes() -> None:
    sender = make_codec()
    delivery = call(sender, type="pickle")
    with pytest.raises(ContentRefused, match=r"'pickle' is not accepted; accept: \[json\]"):
        make_codec().decode_call(delivery)
    trusting = make_codec(accept={"json": serializer("json"), "pickle": serializer("pickle")})
    assert trusting.decode_call(delivery) == ((2, 3), {})


def test_pickle_labelled_as_json_is_undecodable_and_not_run() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it was run",))

    with pytest.raises(DecodeError):
        make_codec().decode_call(Delivery("q", "id1", pickle.dumps(Bomb()), PLAIN, None))


def test_an_encoding_that_is_not_accepted_is_refused() -> None:
    delivery = Delivery("q", "id1", zlib.compress(b"[[],{}]"), {**PLAIN, "enc": "zlib"}, None)
    assert make_codec().decode_call(delivery) == ([], {})
    with pytest.raises(ContentRefused, match="encoding"):
        make_codec(encodings=()).decode_call(delivery)


def test_a_serializer_that_does_not_exist_is_named_at_the_call() -> None:
    with pytest.raises(PluginNotFound):
        call(make_codec(), type="nothing")


def test_another_version_of_the_envelope_is_refused() -> None:
    delivery = call(make_codec())
    assert make_codec().decode_call(delivery._replace(headers={**PLAIN, "v": "1"}))
    with pytest.raises(DecodeError, match="version '2'"):
        make_codec().decode_call(delivery._replace(headers={**PLAIN, "v": "2"}))


@pytest.mark.parametrize(
    "body", [b"", b"5", b"[]", b"[[]]", b"[[],{},3]", b"[{},[]]", b'["ab",{}]', b"[[],[]]", b"[null,{}]", b'{"0":[]}']
)
def test_a_body_that_is_no_call_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        make_codec().decode_call(Delivery("q", "id1", body, PLAIN, None))


@given(st.binary(max_size=60), st.sampled_from([PLAIN, {}, {**PLAIN, "enc": "zlib"}, {**PLAIN, "v": "\0"}]))
def test_random_bytes_give_a_codec_error_and_nothing_else(body: bytes, headers: dict[str, str]) -> None:
    for codec in (make_codec(), make_codec(signer=signer())):
        try:
            codec.decode_call(Delivery("q", "id1", body, headers, None))
        except CodecError:
            pass
        with pytest.raises(CodecError):
            codec.decode_result(StoredResult("id1", State.SUCCESS, body, None))


# --- size and compression ----------------------------------------------------------------------------------


def test_only_what_is_over_the_threshold_is_compressed() -> None:
    codec = make_codec(compressor=compressor("zlib"), compress_over=1000)
    small, large = call(codec, ["x" * 900]), call(codec, ["x" * 1100])
    assert "enc" not in small.headers
    assert large.headers["enc"] == "zlib"
    assert len(large.body) < 100
    assert codec.decode_call(large) == (["x" * 1100], {})


def test_a_call_may_name_its_compressor_or_ask_for_none() -> None:
    codec = make_codec(compressor=compressor("zlib"), compress_over=10, encodings=("zlib", "bzip2"))
    arguments = (["x" * 500], {})
    headers, body = codec.encode_call(PLAIN, "q", "id1", arguments, "bzip2")
    assert headers["enc"] == "bzip2"
    assert codec.decode_call(Delivery("q", "id1", body, headers, None)) == arguments
    assert "enc" not in codec.encode_call(PLAIN, "q", "id1", arguments, "none")[0]


def test_what_would_grow_is_left_alone() -> None:
    codec = make_codec(compressor=compressor("zlib"), compress_over=0)
    assert "enc" not in call(codec, [1]).headers


def test_large_results_are_compressed_too() -> None:
    codec = make_codec(compressor=compressor("zlib"), compress_over=1000)
    result = stored(codec, "x" * 5000)
    assert len(result.body) < 200
    assert codec.decode_result(result) == "x" * 5000


def test_a_body_over_the_limit_is_refused_packed_or_not() -> None:
    long = b'[["' + b"x" * MAX_BYTES + b'"],{}]'
    with pytest.raises(DecodeError, match="message_max"):
        make_codec().decode_call(Delivery("q", "id1", long, PLAIN, None))
    with pytest.raises(DecodeError):
        make_codec().decode_call(Delivery("q", "id1", zlib.compress(long), {**PLAIN, "enc": "zlib"}, None))


def test_a_value_that_is_no_plain_data_is_refused_at_the_call() -> None:
    with pytest.raises(EncodeError):
        call(make_codec(), [object()])


# --- signatures --------------------------------------------------------------------------------------------


class Signed:
    """A signed call, and the codec that checks it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.codec = make_codec(self.clock, signer=signer(), compressor=compressor("zlib"))
        self.delivery = call(
            self.codec,
            attempt="1",
            eta="1800000100.0",
            expires="1900000000.0",
            soft="5",
            hard="9",
            ignore="0",
            rexp="60.0",
            retry="[]",
            **{"x-user": "me"},
        )

    def refuses(self, delivery: Delivery) -> None:
        with pytest.raises(SignatureError):
            self.codec.decode_call(delivery)


def test_a_signed_call_is_accepted() -> None:
    signed = Signed()
    assert signed.codec.decode_call(signed.delivery) == ([2, 3], {})


def test_every_header_is_covered() -> None:
    signed = Signed()
    headers = dict(signed.delivery.headers)
    assert {"task", "type", "eta", "expires", "issued", "sig", "x-user"} <= set(headers)
    for key, value in headers.items():
        signed.refuses(signed.delivery._replace(headers={**headers, key: value + "0"}))
        signed.refuses(signed.delivery._replace(headers={k: v for k, v in headers.items() if k != key}))
    for key in ("crashes", "enc", "prio", "since", "x-more"):
        signed.refuses(signed.delivery._replace(headers={**headers, key: "1"}))


def test_every_byte_is_covered() -> None:
    signed = Signed()
    body = signed.delivery.body
    for at in range(len(body)):
        flipped = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        signed.refuses(signed.delivery._replace(body=flipped))
    signed.refuses(signed.delivery._replace(body=body + b" "))
    signed.refuses(signed.delivery._replace(body=b""))


def test_it_cannot_be_moved_to_another_queue_or_id() -> None:
    signed = Signed()
    signed.refuses(signed.delivery._replace(queue="admin"))
    signed.refuses(signed.delivery._replace(id="id2"))
    signed.refuses(signed.delivery._replace(queue="qi", id="d1"))


def test_unsigned_calls_are_refused() -> None:
    signed = Signed()
    unsigned = call(make_codec())
    with pytest.raises(SignatureError, match="not signed"):
        signed.codec.decode_call(unsigned)


def test_nothing_is_unpacked_before_the_signature_is_checked() -> None:
    signed = Signed()
    bad = signed.delivery._replace(headers={**signed.delivery.headers, "enc": "zlib", "type": "pickle", "v": "1"})
    signed.refuses(bad)


def test_it_expires_and_must_not_come_from_the_future() -> None:
    clock = FakeClock()
    codec = make_codec(clock, signer=signer())
    delivery = call(codec)
    clock.advance(599)
    codec.decode_call(delivery)
    clock.advance(2)
    with pytest.raises(SignatureError, match="max_age"):
        codec.decode_call(delivery)
    ahead = FakeClock(clock.time() + FUTURE_S + 1)
    with pytest.raises(SignatureError, match="max_age"):
        codec.decode_call(call(make_codec(ahead, signer=signer())))


@pytest.mark.parametrize("issued", ["nan", "inf", "", "soon"])
def test_an_issue_time_that_is_no_time_is_refused_even_when_signed(issued: str) -> None:
    from dray.core.codec import _signed_bytes

    codec = make_codec(signer=signer())
    headers, body = {**PLAIN, "issued": issued}, b"[[],{}]"
    headers["sig"] = signer().sign(_signed_bytes(b"call", headers, "q", "id1", body))
    with pytest.raises(DecodeError):
        codec.decode_call(Delivery("q", "id1", body, headers, None))


def test_a_call_that_was_meant_to_wait_longer_than_signatures_last_is_not_old_when_it_is_due() -> None:
    clock = FakeClock()
    codec = make_codec(clock, signer=signer())
    delivery = call(codec, eta=repr(clock.time() + 86_400))
    clock.advance(86_400 + 500)
    codec.decode_call(delivery)
    clock.advance(200)
    with pytest.raises(SignatureError):
        codec.decode_call(delivery)


def test_a_retry_is_signed_anew() -> None:
    signed = Signed()
    signed.clock.advance(500)
    again = signed.codec.resend(signed.delivery, {"attempt": "2"}, signed.clock.time() + 50)
    assert again.headers["attempt"] == "2"
    assert again.not_before == float(again.headers["eta"])
    assert again.expires_at == 1_900_000_000
    signed.clock.advance(550)
    delivery = Delivery(again.queue, again.id, again.body, again.headers, None)
    assert signed.codec.decode_call(delivery) == ([2, 3], {})


def test_check_lets_only_the_genuine_pass_and_anything_when_signing_is_off() -> None:
    signed = Signed()
    signed.codec.check(signed.delivery)
    with pytest.raises(SignatureError):
        signed.codec.check(call(make_codec()))
    make_codec().check(call(make_codec()))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_signed_result_is_bound_to_its_bytes(at: int, noise: bytes) -> None:
    codec = make_codec(signer=signer())
    result = stored(codec, {"total": 3})
    at %= len(result.body)
    body = result.body[:at] + noise + result.body[at + len(noise) :]
    if body != result.body:
        with pytest.raises(DecodeError):
            codec.decode_result(result._replace(body=body))


def test_a_signed_result_is_bound_to_its_id_and_state() -> None:
    codec = make_codec(signer=signer())
    result = stored(codec, {"total": 3})
    for other in (result._replace(id="id2"), result._replace(state=State.FAILURE)):
        with pytest.raises(SignatureError):
            codec.decode_result(other)
    with pytest.raises(SignatureError):
        codec.decode_result(stored(make_codec(), 3))


def test_a_call_cannot_be_passed_off_as_a_result() -> None:
    from dray.core import wire

    codec = make_codec(signer=signer())
    delivery = call(codec)
    with pytest.raises(SignatureError):
        codec.decode_result(StoredResult("id1", State.SUCCESS, wire.pack(delivery.headers, delivery.body), None))


# --- numbers in headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1e999", "x", "0x10", "1,5"])
def test_what_is_no_number_is_a_decode_error(text: str) -> None:
    with pytest.raises(DecodeError, match="eta"):
        float_header({"eta": text}, "eta")


@pytest.mark.parametrize("text", ["", "-1", "1.0", "²", "٣", "9" * 10, "nan", " 1", "1_0"])
def test_what_is_no_count_is_a_decode_error(text: str) -> None:
    with pytest.raises(DecodeError, match="attempt"):
        int_header({"attempt": text}, "attempt", 0)


@given(st.text())
def test_any_text_in_a_number_header_is_a_number_or_a_decode_error(text: str) -> None:
    for read in (lambda: float_header({"n": text}, "n"), lambda: int_header({"n": text}, "n", 0)):
        try:
            assert isinstance(read(), (int, float))
        except DecodeError:
            pass


def test_a_priority_that_no_transport_has_is_clamped_when_sent_again() -> None:
    codec = make_codec()
    assert codec.resend(call(codec, prio="77"), {}).priority == 9


def test_a_dead_letter_is_renewed_as_if_it_were_called_now() -> None:
    clock = FakeClock()
    codec = make_codec(clock, signer=signer())
    headers, body = codec.encode_call({"task": "t", "type": "json", "prio": "7", "x-note": "n"}, "q", "id1", ((1,), {}))
    again = codec.resend(Delivery("q", "id1", body, headers, None), {"attempt": "3", "crashes": "2"}, clock.time() + 5)
    letter = Delivery("q", "id1", again.body, again.headers, None)
    clock.advance(1e6)  # long past the signature's age
    with pytest.raises(SignatureError):
        codec.decode_call(letter)
    renewed = codec.renew(letter)
    assert renewed.priority == 7
    assert {"attempt", "crashes", "eta"}.isdisjoint(renewed.headers)
    assert renewed.headers["x-note"] == "n"
    assert codec.decode_call(Delivery("q", "id1", renewed.body, renewed.headers, None)) == ([1], {})
    with pytest.raises(SignatureError):
        codec.renew(letter._replace(body=b"[[2],{}]"))
