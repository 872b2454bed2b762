"""The byte frame: what goes in comes out, and nothing but ``DecodeError`` comes of anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core import wire
from dray.core.errors import DecodeError, EncodeError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
HEADERS = st.dictionaries(TEXT, TEXT, max_size=6)
FRAME = wire.pack({"task": "shop.mail", "type": "json", "x-ü": "日本"}, b"body")


@given(HEADERS, st.binary(max_size=200))
def test_what_is_packed_is_unpacked(headers: dict[str, str], body: bytes) -> None:
    assert wire.unpack(wire.pack(headers, body)) == (headers, body)
    assert wire.unpack_headers(wire.pack_headers(headers)) == headers


def test_the_order_of_headers_is_kept() -> None:
    assert list(wire.unpack(wire.pack({"b": "1", "a": "2"}, b""))[0]) == ["b", "a"]


@given(HEADERS, TEXT)
def test_a_nul_anywhere_is_refused(headers: dict[str, str], text: str) -> None:
    for bad in ({**headers, f"{text}\0": "x"}, {**headers, "k": f"\0{text}"}):
        with pytest.raises(EncodeError, match="NUL"):
            wire.pack(bad, b"")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(EncodeError, match="Unicode"):
        wire.pack({"key": "\ud800"}, b"")


@pytest.mark.parametrize("end", range(len(FRAME) - len(b"body")))
def test_a_frame_cut_anywhere_before_its_body_is_refused(end: int) -> None:
    with pytest.raises(DecodeError):
        wire.unpack(FRAME[:end])


@given(st.binary(max_size=100))
def test_random_bytes_give_a_frame_or_a_decode_error(data: bytes) -> None:
    for candidate in (data, FRAME[:6] + data, FRAME[:2] + data):
        try:
            headers, body = wire.unpack(candidate)
        except DecodeError:
            continue
        assert wire.pack(headers, body) == candidate


@pytest.mark.parametrize(
    ("block", "says"),
    [(b"key", "no value"), (b"a\0b\0a\0c", "twice"), (b"\xff\0x", "UTF-8"), (b"a\0b\0c", "no value")],
)
def test_broken_header_blocks_say_what_is_wrong(block: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        wire.unpack_headers(block)


def test_equal_blocks_are_read_once_unless_they_are_long_and_errors_are_not_remembered() -> None:
    block, long = wire.pack_headers({"task": "t", "type": "json"}), wire.pack_headers({"x-note": "n" * 300})
    assert wire.unpack_headers(block) is wire.unpack_headers(bytes(bytearray(block)))
    assert wire.unpack_headers(long) == wire.unpack_headers(long)
    assert wire.unpack_headers(long) is not wire.unpack_headers(long)
    for _ in range(2):
        with pytest.raises(EncodeError, match="NUL"):
            wire.pack_headers({"task": "t", "type": "\0"})


def test_another_version_of_the_frame_is_named() -> None:
    with pytest.raises(DecodeError, match="newer version"):
        wire.unpack(b"D\x02" + FRAME[2:])
