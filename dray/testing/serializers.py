"""The conformance kit for serializers: what :class:`~dray.core.contracts.Serializer` promises, as tests.

A plugin's test module holds a subclass with one method::

    from dray.testing import SerializerConformance, plugin_context

    class TestMine(SerializerConformance):
        rich = False                                         # plain data alone: no dates, decimals, UUIDs, bytes

        def make(self):
            return MySerializer(MySerializer.Options(), plugin_context("mine"))

``DRAY_CONFORMANCE_REPORT=path`` writes down what was proven.
"""

from __future__ import annotations

import enum
import math
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray.core.contracts import API_VERSION, Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.testing.harness import Background, needs
from dray.testing.kit import Conformance

SAMPLE: list[Any] = [
    None,
    True,
    -1,
    2**62,
    1.5,
    "text, \u00e9\u65e5\U0001f600",
    [[], {}],
    {"key": {"nested": ["x" * 40]}},
]
RICH: list[Any] = [
    datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
    datetime(1, 1, 1),  # noqa: DTZ001  naive ones must survive, too
    datetime(2024, 7, 1, 3, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    date(9999, 12, 31),
    time(23, 59, 59, 999999),
    timedelta(days=-3, microseconds=1),
    timedelta.max,
    Decimal("-1.10"),
    Decimal("1E+400"),
    UUID(int=2**127 + 1),
    b"\x00\xff",
]
DEPTH = 100_000
PEAK_BYTES_MAX = 64 * 2**20

_HOSTILE = {
    "nothing": b"",
    "nul": b"\x00",
    "bom": b"\xef\xbb\xbf[]",
    "utf-16": "[1]".encode("utf-16"),
    "bad utf-8": b'"\xff\xfe"',
    "lone surrogate": b'"\\ud800"',
    "not a number": b"NaN",
    "infinity": b"-Infinity",
    "infinite by exponent": b"[1e999]",
    "huge integer": b"9" * 100_000,
    "duplicate keys": b'{"a": 1, "a": 2}',
    "unclosed": b'{"a": [',
    "deep lists": b"[" * DEPTH,
    "deep objects": b'{"a":' * DEPTH,
    "deep blocks": b"- " * DEPTH,
    "deep keys": b"? " * DEPTH,
    "deep arrays": b"\x91" * DEPTH,
    "deep maps": b"\x81\xa1a" * DEPTH,
    "lying lengths": b"\xdd\x00\x0f\x00\x00" * 400 + b"\x00" * 1_000_000,
    "lying text": b"\xdb\xff\xff\xff\xff",
    "lying map": b"\xdf\xff\xff\xff\xff",
    "alias bomb": b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    "self alias": b"&a [*a]",
    "foreign tag": b"!!python/object/apply:os.getcwd []",
    "merge key": b"<<: {a: 1}",
    "bad date": b"2024-13-45",
    "unknown kind": b'{"__dray__": "socket", "v": "x"}',
    "kind of a list": b'{"__dray__": [], "v": "x"}',
    "year 0": b'{"__dray__": "datetime", "v": "0000-01-01T00:00:00"}',
    "year 10000": b'{"__dray__": "datetime", "v": "10000-01-01T00:00:00"}',
    "endless duration": b'{"__dray__": "timedelta", "v": "99999999999999999999999999"}',
    "decimal that is none": b'{"__dray__": "decimal", "v": "sNaN"}',
    "extension": b"\xd4\x63a",
    "bad extension": b"\xc7\x02\x01xx",
    "timestamp": b"\xc7\x0c\xff" + b"\xff" * 12,
}

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
_keys = st.text().filter(lambda key: key != "__dray__")  # may be refused
_rich = (
    st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.uuids()
    | st.binary()
)


def _nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_keys, inner, max_size=5),
        max_leaves=20,
    )


# One test method runs in many subclasses: that is what a kit is for.
_settings = settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None)


class _Colour(enum.StrEnum):
    RED = "red"


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class SerializerConformance(Conformance, ABC):
    """What every serializer must do. ``rich``: dates, durations, decimals, UUIDs and bytes survive as well."""

    kind = "serializers"
    rich: ClassVar[bool] = True

    @abstractmethod
    def make(self) -> Serializer:
        """A serializer, built as the core builds it."""

    def sample(self) -> Serializer:
        return self.make()

    def abilities(self) -> Mapping[str, bool]:
        return {"rich": self.rich, "safe": self.make().safe}

    # --- values that must survive ---

    def test_says_who_it_is(self) -> None:
        serializer = self.make()
        assert serializer.api == API_VERSION
        assert serializer.name.isascii()
        assert 1 <= len(serializer.name) <= 16
        assert serializer.content_type.isascii()
        assert "/" in serializer.content_type

    @_settings
    @given(_nested(_scalars))
    def test_plain_data_survives(self, value: object) -> None:
        serializer = self.make()
        data = serializer.dumps(value)
        assert type(data) is bytes
        back = serializer.loads(data)
        assert back == value
        assert _types(back) == _types(value)

    @needs("rich")
    def test_rich_scalars_survive(self) -> None:
        serializer = self.make()
        back = serializer.loads(serializer.dumps({"values": RICH}))
        assert back == {"values": RICH}
        assert _types(back) == _types({"values": RICH})

    @needs("rich")
    @_settings
    @given(_nested(_scalars | _rich))
    def test_any_rich_scalars_survive(self, value: object) -> None:
        serializer = self.make()
        assert serializer.loads(serializer.dumps(value)) == value

    def test_tuples_and_enumerations_of_plain_values_are_carried(self) -> None:
        serializer = self.make()
        back: Any = serializer.loads(serializer.dumps([(1, (2,)), _Colour.RED]))
        assert [list(back[0][:1]), list(back[0][1])] == [[1], [2]]
        assert back[1] == "red"

    def test_long_values_survive(self) -> None:
        serializer = self.make()
        value = {"numbers": list(range(20_000)), "text": "\u00e9x" * 200_000}
        assert serializer.loads(serializer.dumps(value)) == value

    def test_threads_do_not_disturb_each_other(self) -> None:
        serializer = self.make()

        def work(number: int) -> None:
            for step in range(50):
                value = [number, {"step": step, "text": str(number) * 50}]
                assert serializer.loads(serializer.dumps(value)) == value
                with pytest.raises(EncodeError):
                    serializer.dumps([value, lambda: None])

        background = Background()
        for number in range(8):
            background.start(work, number)
        background.join()

    # --- values that must be refused, or survive ---

    @pytest.mark.parametrize("make_value", [lambda: lambda: None, lambda: (x for x in [1]), lambda: open(__file__)])  # noqa: SIM115
    def test_what_nothing_can_carry_is_refused(self, make_value: Any) -> None:
        value = make_value()
        try:
            with pytest.raises(EncodeError, match=type(value).__name__):
                self.make().dumps(value)
        finally:
            getattr(value, "close", lambda: None)()

    @pytest.mark.parametrize(
        "value",
        [{1}, frozenset(), object(), Path("/x"), ValueError("x"), int, 1j, range(3), bytearray(b"x"), _Unprintable()],
        ids=lambda value: type(value).__name__,
    )
    def test_rich_objects_are_refused_with_advice(self, value: object) -> None:
        serializer = self.make()
        try:
            data = serializer.dumps([value])
        except EncodeError as error:
            assert type(value).__name__ in str(error)
            assert "pass " in str(error)
        else:  # bytearray as bytes
            assert not serializer.safe or serializer.loads(data) == [value]

    @pytest.mark.parametrize("key", [1, True, None, 1.5, (1, 2), b"x", "__dray__"])
    def test_odd_keys_are_refused_or_survive(self, key: Any) -> None:
        self._refused_or_survives({"outer": [{key: "value"}]})

    @pytest.mark.parametrize(
        "value", [10**5000, -(2**63) - 1, 2**64, "\ud800", math.inf, Decimal("Infinity")], ids=range(6)
    )
    def test_extreme_scalars_are_refused_or_survive(self, value: object) -> None:
        self._refused_or_survives([value])

    def test_text_that_looks_like_something_else_survives(self) -> None:
        texts = [
            "1",
            "1.5",
            "true",
            "null",
            "~",
            "=",
            "<<",
            "2024-01-01",
            "0x1f",
            "1:30",
            "- a",
            "{",
            "#",
            "",
            " ",
            "\n",
        ]
        value = {"list": texts, **{text: text for text in texts}}
        serializer = self.make()
        assert serializer.loads(serializer.dumps(value)) == value

    def test_a_value_that_contains_itself_is_refused(self) -> None:
        circle: list[Any] = ["x" * 1000]
        circle.append({"again": circle})
        serializer = self.make()
        if serializer.safe:
            with pytest.raises(EncodeError):
                serializer.dumps(circle)
        assert serializer.loads(serializer.dumps([1])) == [1]

    def test_nesting_without_end_is_refused(self) -> None:
        deep: list[Any] = []
        for _ in range(DEPTH):
            deep = [deep]
        with pytest.raises(EncodeError):
            self.make().dumps(deep)

    def _refused_or_survives(self, value: object) -> None:
        serializer = self.make()
        try:
            data = serializer.dumps(value)
        except EncodeError:
            return
        assert serializer.loads(data) == value

    # --- bytes that make no sense ---

    def test_every_truncation_is_an_error_or_a_value(self) -> None:
        serializer = self.make()
        data = serializer.dumps([*SAMPLE, *(RICH if self.rich else ())])
        for length in range(len(data)):
            _loads(serializer, data[:length])

    def test_trailing_bytes_are_refused(self) -> None:
        serializer = self.make()
        with pytest.raises(DecodeError):
            serializer.loads(serializer.dumps(SAMPLE) + b"\x00")

    @needs("safe")
    def test_every_flipped_byte_is_an_error_or_a_value(self) -> None:
        serializer = self.make()
        data = serializer.dumps([*SAMPLE, *(RICH if self.rich else ())])
        for offset in range(len(data)):
            for mask in (0x01, 0x20, 0x80, 0xFF):
                flipped = bytearray(data)
                flipped[offset] ^= mask
                _loads(serializer, bytes(flipped))

    @needs("safe")
    @_settings
    @given(st.binary(max_size=200))
    def test_random_bytes_are_an_error_or_a_value(self, data: bytes) -> None:
        _loads(self.make(), data)

    @needs("safe")
    @pytest.mark.parametrize("data", _HOSTILE.values(), ids=_HOSTILE.keys())
    def test_hostile_bytes_are_an_error_or_a_value_in_bounded_memory(self, data: bytes) -> None:
        """Bytes that nobody made are not fed to a serializer that runs what they say."""
        serializer = self.make()
        tracemalloc.start()
        try:
            _loads(serializer, data)
            assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES_MAX
        finally:
            tracemalloc.stop()


def _loads(serializer: Serializer, data: bytes) -> None:
    """Whatever is raised beside ``DecodeError`` fails the test."""
    try:
        serializer.loads(data)
    except DecodeError as error:
        assert str(error)


def _types(value: object) -> object:
    """The types of all that is in it: ``1 == True == 1.0`` must not pass for equality."""
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    return [_types(item) for item in value] if isinstance(value, list) else type(value)
