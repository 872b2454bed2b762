"""The serializer kit over every serializer in the tree, and what is particular to ours."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
import sys
from datetime import UTC, date, datetime, time
from typing import Any
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.contracts import Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.testing.harness import plugin_context
from dray.testing.serializers import SerializerConformance

CLASSES = {
    "json": "JsonSerializer",
    "msgpack": "MsgpackSerializer",
    "yaml": "YamlSerializer",
    "pickle": "PickleSerializer",
}
SAFE = ["json", "msgpack", "yaml"]


def make(name: str) -> Serializer:
    cls = getattr(importlib.import_module(f"dray.plugins.serializers.{name}"), CLASSES[name])
    serializer = cls(cls.Options(), plugin_context(name))
    assert isinstance(serializer, Serializer)
    assert serializer.name == name
    return serializer


class TestJson(SerializerConformance):
    def make(self) -> Serializer:
        return make("json")


class TestMsgpack(SerializerConformance):
    def make(self) -> Serializer:
        return make("msgpack")


class TestYaml(SerializerConformance):
    def make(self) -> Serializer:
        return make("yaml")


class TestPickle(SerializerConformance):
    def make(self) -> Serializer:
        return make("pickle")


# --- what to pass instead ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: int


class Row:
    """Looks like an SQLAlchemy row."""

    __mapper__ = None


class Model:
    """Looks like a Django or peewee row."""

    class DoesNotExist(Exception):
        pass


class Validated:
    """Looks like a pydantic model."""

    def model_dump(self) -> dict[str, int]:
        return {}


class Array:
    """Looks like a numpy array."""

    def tolist(self) -> list[int]:
        return []


async def coroutine() -> None: ...


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Row(), "primary key"),
        (Model(), "primary key"),
        (Point(1), "dataclasses.asdict"),
        (Validated(), "model_dump"),
        (Array(), "tolist"),
        ({1, 2}, "list"),
        (Row, "its name"),
        (print, "name of a task"),
        (iter([]), "list"),
        (sys.stdout, "path"),
        (object(), "id by which the task finds"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_error_says_what_to_pass_instead(name: str, value: object, advice: str) -> None:
    with pytest.raises(EncodeError, match=advice) as caught:
        make(name).dumps([value])
    assert type(value).__qualname__ in str(caught.value)


@pytest.mark.parametrize("name", SAFE)
def test_a_coroutine_is_to_be_awaited(name: str) -> None:
    running = coroutine()
    with pytest.raises(EncodeError, match="await it first"):
        make(name).dumps(running)
    running.close()


@pytest.mark.parametrize("name", SAFE)
def test_a_class_that_raises_is_refused(name: str) -> None:
    class Broken(dict[str, int]):
        def items(self) -> Any:
            raise KeyError("no")

        def __iter__(self) -> Any:
            raise KeyError("no")

    try:
        make(name).dumps(Broken(a=1))
    except EncodeError:
        pass


@pytest.mark.parametrize("name", SAFE)
def test_an_offset_that_depends_on_the_day_is_refused(name: str) -> None:
    zone = ZoneInfo("Europe/Berlin")
    with pytest.raises(EncodeError, match="pass a datetime"):
        make(name).dumps(time(1, 2, tzinfo=zone))
    moment = datetime(2024, 7, 1, tzinfo=zone)
    back = make(name).loads(make(name).dumps(moment))
    assert back == moment
    assert isinstance(back, datetime)
    assert back.utcoffset() == moment.utcoffset()


def test_subclasses_of_dates_travel_as_dates() -> None:
    class Fake(datetime):
        pass

    for name in SAFE:
        back = make(name).loads(make(name).dumps([Fake(2024, 1, 1, tzinfo=UTC)]))
        assert back == [datetime(2024, 1, 1, tzinfo=UTC)]


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("key", [1, -1, 1.5, 1e300, True, False, None])
def test_keys_are_never_converted_in_silence(name: str, key: Any) -> None:
    with pytest.raises(EncodeError, match="key"):
        make(name).dumps([{"fine": [{"also": 1, key: 2}]}])


# --- json --------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.from_regex(r'[-0-9tfn][-0-9.e+alsru":]*|"?[a-z]+":', fullmatch=True), st.text()))
def test_json_text_keys_that_look_like_numbers_are_fine(value: dict[str, str]) -> None:
    serializer = make("json")
    assert serializer.loads(serializer.dumps(value)) == value


def test_json_is_compact_and_what_other_programs_read() -> None:
    data = make("json").dumps({"a": [1, 2.5, None, True], "b": "\u00e9\n"})
    assert data == '{"a":[1,2.5,null,true],"b":"\u00e9\\n"}'.encode()


def test_json_reads_what_other_programs_write() -> None:
    value = {"text": "\u00e9 \U0001f600 \\ud800", "list": [1, 2]}
    assert make("json").loads(json.dumps(value, indent=1).encode() + b"\r\n") == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b"-1e999",
        b'{"a":1,"a":1}',
        b'"\\ud83d"',
        b'{"\\udc00": 1}',
        b"\xef\xbb\xbf1",
        "1".encode("utf-16"),
        b"1 2",
        b"9" * 5000,
        b"[" * 100_000,
        b"01",
        b"'a'",
        b'"\x01"',
        b'{"__dray__": "date"}',
        b'{"__dray__": "date", "v": 1}',
        b'{"__dray__": "date", "v": "2024-01-01", "w": 1}',
        b'{"__dray__": "bytes", "v": "***"}',
        b'{"__dray__": "uuid", "v": "x"}',
    ],
)
def test_json_refuses(data: bytes) -> None:
    with pytest.raises(DecodeError):
        make("json").loads(data)


# --- msgpack -----------------------------------------------------------------------------------------------


def test_msgpack_reads_the_standard_timestamp() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    assert make("msgpack").loads(msgpack.packb(moment, datetime=True)) == moment


def test_msgpack_keeps_bytes_and_text_apart() -> None:
    serializer = make("msgpack")
    back = serializer.loads(serializer.dumps([b"a", "a"]))
    assert [type(item) for item in back] == [bytes, str]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "data", [b"\x81\x01\x01", b"\x82\xa1a\x01\xa1a\x02", b"\x01\x01", b"\xc1", b"\xa1\xff", b"\xdd\xff\xff\xff\xff"]
)
def test_msgpack_refuses(data: bytes) -> None:
    with pytest.raises(DecodeError):
        make("msgpack").loads(data)


def test_msgpack_integers_beyond_64_bits_come_with_advice() -> None:
    with pytest.raises(EncodeError, match="as text, or as bytes"):
        make("msgpack").dumps(2**64)


# --- yaml --------------------------------------------------------------------------------------------------


def test_yaml_as_people_write_it() -> None:
    text = "# a comment\nname: {first: Ada}\nborn: 1815-12-10\ntags: [a, 'b']\nnote: |\n  two\n  lines\n"
    value = {"name": {"first": "Ada"}, "born": date(1815, 12, 10), "tags": ["a", "b"], "note": "two\nlines\n"}
    assert make("yaml").loads(text.encode()) == value


def test_yaml_writes_shared_values_twice() -> None:
    shared = ["x", datetime(2024, 1, 1, tzinfo=UTC)]
    serializer = make("yaml")
    data = serializer.dumps([shared, shared])
    assert b"&" not in data
    assert serializer.loads(data) == [shared, shared]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1", "aliases"),
        ("&x [*x]", "aliases"),
        ("!!str 1", "tags"),
        ("!thing {a: 1}", "tags"),
        ("!!set {a}", "tags"),
        ("<<: {a: 1}", "refused"),
        ("a: 1\na: 2", "twice"),
        ("1: 2", "key is not text"),
        ("[a]: 2", "key is not text"),
        ("--- 1\n--- 2", "one YAML document"),
        ("", "one YAML document"),
        ("[" * 201, "nested deeper"),
        ("\ufeffa", "byte order mark"),
    ],
)
def test_yaml_refuses(text: str, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        make("yaml").loads(text.encode())


# --- pickle ------------------------------------------------------------------------------------------------


class Exits:
    def __reduce__(self) -> Any:
        return (sys.exit, (3,))


class Raises:
    def __reduce__(self) -> Any:
        return (int, ("no number",))


class RefusesToPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("never")


def test_pickle_says_that_it_is_not_safe() -> None:
    assert make("pickle").safe is False
    assert all(make(name).safe for name in SAFE)


@pytest.mark.parametrize("value", [Exits(), Raises()])
def test_pickle_whatever_reading_raises_is_a_decode_error(value: object) -> None:
    with pytest.raises(DecodeError):
        make("pickle").loads(pickle.dumps(value))


def test_pickle_whatever_writing_raises_is_an_encode_error() -> None:
    with pytest.raises(EncodeError, match="RefusesToPickle"):
        make("pickle").dumps(RefusesToPickle())


def test_pickle_carries_objects() -> None:
    serializer = make("pickle")
    assert serializer.loads(serializer.dumps([Point(2), {1: {2}}])) == [Point(2), {1: {2}}]
