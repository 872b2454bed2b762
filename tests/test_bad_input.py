"""Promise G8 at every place that reads bytes from outside: only our own errors, bounded memory, always a reason.

Messages in a real worker: ``test_hostile_tasks``; configuration: ``test_config``; the command line: ``test_cli``.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator

import pytest

from dray.core.codec import Codec
from dray.core.errors import CodecError, ContentRefused, DecodeError, SignatureError
from dray.core.failure import SafeErrors
from dray.core.message import Delivery, State, StoredResult
from dray.core.wire import pack, unpack
from dray.plugins.serializers.msgpack import MsgpackSerializer
from dray.plugins.serializers.yaml import YamlSerializer
from dray.testing.clock import FakeClock
from dray.testing.harness import plugin_context
from tests import parts

GOOD = b'[[1,"two",{"k":[true,null,1.5]}],{"key":"value"}]'
FUZZED = 100_000


def yaml_and_msgpack() -> dict[str, object]:
    msgpack = MsgpackSerializer(MsgpackSerializer.Options(), plugin_context("msgpack"))
    yaml = YamlSerializer(YamlSerializer.Options(), plugin_context("yaml"))
    return {"json": parts.serializer("json"), "msgpack": msgpack, "yaml": yaml}


@pytest.fixture
def codec() -> Codec:
    return parts.make_codec(accept=yaml_and_msgpack(), max_bytes=1_000_000)


def delivery(body: bytes, **headers: str) -> Delivery:
    return Delivery("default", "an-id", body, {"task": "t", "type": "json", **headers}, None)


BODIES: dict[str, tuple[str, bytes]] = {
    "empty": ("json", b""),
    "white space": ("json", b" \n"),
    "bom": ("json", b"\xef\xbb\xbf[[],{}]"),
    "utf-16": ("json", "[[],{}]".encode("utf-16")),
    "latin-1": ("json", '[["é"],{}]'.encode("latin-1")),
    "lone surrogate": ("json", b'[["\\ud800"],{}]'),
    "duplicate keys": ("json", b'[[],{"a":1,"a":2}]'),
    "nan": ("json", b"[[NaN],{}]"),
    "beyond float": ("json", b"[[1e999],{}]"),
    "huge integer": ("json", b"[[" + b"9" * 5000 + b"],{}]"),
    "65,536 deep": ("json", b"[" * 65_536 + b"]" * 65_536),
    "trailing": ("json", b"[[],{}] []"),
    "too long": ("json", b'[["' + b"x" * 1_000_000 + b'"],{}]'),
    "arguments are a mapping": ("json", b"[{},{}]"),
    "keywords are a list": ("json", b"[[],[]]"),
    "no pair": ("json", b"[[],{},{}]"),
    "text": ("json", b'"[[],{}]"'),
    "array length lie": ("msgpack", b"\xdd\xff\xff\xff\xff"),
    "map length lie": ("msgpack", b"\x92\x90\xdf\xff\xff\xff\xff"),
    "text length lie": ("msgpack", b"\x92\x91\xdb\xff\xff\xff\xffa\x80"),
    "msgpack deep": ("msgpack", b"\x91" * 65_536 + b"\xc0"),
    "msgpack trailing": ("msgpack", b"\x92\x90\x80\xc0"),
    "msgpack keys that are no text": ("msgpack", b"\x92\x90\x81\x01\x02"),
    "json labelled msgpack": ("msgpack", GOOD),
    "pickle labelled json": ("json", b"\x80\x05]\x94(]\x94}\x94e."),
    "pickle": ("pickle", b"\x80\x05]\x94(]\x94}\x94e."),
    "unknown type": ("xml", b"<a/>"),
    "yaml aliases": ("yaml", b"[&a [1,1], *a]"),
    "yaml bomb": ("yaml", b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n"),
    "yaml code": ("yaml", b"[!!python/object/apply:os.system ['true'], {}]"),
    "yaml deep": ("yaml", b"[" * 5000),
    "yaml tabs": ("yaml", b"a:\n\t- 1"),
}
HEADERS: dict[str, dict[str, str]] = {
    "newer version": {"v": "2"},
    "version in words": {"v": "one"},
    "encoding unknown": {"enc": "rot13"},
    "encoding empty": {"enc": ""},
    "encoding is a path": {"enc": "../../etc/passwd"},
    "zlib that is none": {"enc": "zlib"},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_makes_no_sense_is_refused(codec: Codec, name: str) -> None:
    kind, body = BODIES[name]
    with pytest.raises(DecodeError) as caught:
        codec.decode_call(delivery(body, type=kind))
    assert str(caught.value)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_make_no_sense_are_refused(codec: Codec, name: str) -> None:
    with pytest.raises(DecodeError):
        codec.decode_call(delivery(GOOD, **HEADERS[name]))


def test_a_bomb_in_any_encoding_stays_small() -> None:
    import zlib

    codec = parts.make_codec(max_bytes=1_000_000)
    bomb = zlib.compress(b'[["' + b"x" * 200_000_000 + b'"],{}]', 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):
        codec.decode_call(delivery(bomb, enc="zlib"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"


def mutations(rng: random.Random, good: bytes) -> Iterator[bytes]:
    """Random bytes, and sound ones with a few bytes changed, cut, doubled or moved."""
    while True:
        data = bytearray(good if rng.random() < 0.8 else rng.randbytes(rng.randrange(64)))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            change = rng.randrange(4)
            if change == 0 and data:
                data[at % len(data)] = rng.randrange(256)
            elif change == 1:
                del data[at:]
            elif change == 2:
                data[at:at] = data[: rng.randrange(8)]
            else:
                data[at:at] = rng.randbytes(2)
        yield bytes(data)


def only_our_errors(read: Callable[[bytes], object], good: bytes, count: int) -> None:
    rng, refused = random.Random(20261122), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, data in zip(range(count), mutations(rng, good), strict=False):
        try:
            read(data)
        except CodecError:
            refused += 1
    assert refused > count // 10, "the mutations changed something"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"


@pytest.mark.parametrize(("kind", "count"), [("json", FUZZED), ("msgpack", FUZZED), ("yaml", FUZZED // 25)])
def test_mutated_messages_raise_only_our_errors(codec: Codec, kind: str, count: int) -> None:
    value = [[1, "two", {"k": [True, None, 1.5]}], {"key": "value"}]
    good = codec._accept[kind].dumps(value)
    only_our_errors(lambda body: codec.decode_call(delivery(body, type=kind)), good, count)


def test_mutated_frames_and_results_raise_only_our_errors(codec: Codec) -> None:
    only_our_errors(unpack, pack({"type": "json", "enc": "zlib", "a": "é"}, GOOD), FUZZED // 2)
    good = codec.encode_result("an-id", {"done": 1})
    only_our_errors(
        lambda body: codec.decode_result(StoredResult("an-id", State.SUCCESS, body, None)), good, FUZZED // 2
    )


def test_every_byte_of_a_signed_message_counts() -> None:
    clock = FakeClock()
    codec = parts.make_codec(clock, signer=parts.signer())
    headers, body = codec.encode_call({"task": "t", "type": "json", "x-note": "n"}, "q", "an-id", ((1,), {}))
    good = Delivery("q", "an-id", body, headers, None)
    assert codec.decode_call(good) == ([1], {})
    for at in range(len(body)):
        for bit in (1, 128):
            changed = body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :]
            with pytest.raises(SignatureError):
                codec.decode_call(good._replace(body=changed))
    for name, value in headers.items():
        for changed_headers in (
            {**headers, name: value + "0"},
            {key: kept for key, kept in headers.items() if key != name},
        ):
            with pytest.raises(SignatureError):
                codec.decode_call(good._replace(headers=changed_headers))
    for moved in (
        good._replace(queue="other"),
        good._replace(id="other"),
        good._replace(headers={**headers, "z": "1"}),
    ):
        with pytest.raises(SignatureError):
            codec.decode_call(moved)


def test_a_foreign_result_raises_only_our_errors_and_is_bound_to_its_id() -> None:
    clock = FakeClock()
    codec = parts.make_codec(clock, signer=parts.signer())
    body = codec.encode_result("an-id", 5)
    assert codec.decode_result(StoredResult("an-id", State.SUCCESS, body, None)) == 5
    with pytest.raises(SignatureError):
        codec.decode_result(StoredResult("other", State.SUCCESS, body, None))
    with pytest.raises(ContentRefused):
        parts.make_codec().decode_result(StoredResult("an-id", State.SUCCESS, pack({"type": "pickle"}, b"."), None))


@pytest.mark.parametrize(
    "record",
    [
        None,
        5,
        "text",
        [],
        {},
        {"type": 5},
        {"type": "os.system", "args": ["true"]},
        {"type": "builtins.KeyError", "args": 5},
        {"type": "builtins.ValueError", "args": [[]], "traceback": 7},
        {"type": "builtins.UnicodeDecodeError", "args": [1]},
    ],
)
def test_a_failure_record_that_makes_no_sense_still_is_an_error(record: object) -> None:
    error = SafeErrors().rebuild(record)
    assert isinstance(error, Exception)
    assert str(error) or repr(error)
