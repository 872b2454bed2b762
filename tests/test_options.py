"""Raw settings to typed options."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.contracts import Durability, Seconds, Secret, Size
from dray.core.errors import ConfigError
from dray.core.masking import MASK, Hidden, masked, shown
from dray.core.options import Count, Loose, Name, Where, build, check_name, parse_seconds, parse_size, suggest
from dray.core.sources import scalar


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Inner:
    port: int
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    text: str = "t"
    number: int = 1
    ratio: float = 0.5
    flag: bool = False
    path: Path = Path("x")
    mode: Literal["fast", "safe"] = "safe"
    colour: Colour = Colour.RED
    durability: Durability | None = None
    wait: Seconds = 1.0
    maybe_wait: Seconds | None = None
    size: Size = 1
    secret: Secret = "s"
    count: Count = 1
    name: Name = "n"
    either: int | str = 0
    items: tuple[str, ...] = ()
    pair: tuple[int, int] = (0, 0)
    numbers: Sequence[int] = ()
    listed: list[int] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    table: Mapping[str, int] = field(default_factory=dict)
    inner: Inner | None = None
    anything: Any = None


WHERE = Where("transport", {"transport": "dray.yaml:3"})


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("text", "a", "a"),
        ("number", -3, -3),
        ("ratio", 2, 2.0),
        ("flag", True, True),
        ("path", "a/b", Path("a/b")),
        ("path", Path("a/b"), Path("a/b")),
        ("mode", "fast", "fast"),
        ("colour", "RED", Colour.RED),
        ("colour", "red", Colour.RED),
        ("durability", "D3", Durability.D3),
        ("durability", Durability.D3, Durability.D3),
        ("durability", None, None),
        ("wait", "1h30m", 5400.0),
        ("maybe_wait", 5, 5.0),
        ("maybe_wait", None, None),
        ("size", "8KiB", 8192),
        ("secret", "hush", "hush"),
        ("count", 7, 7),
        ("name", "mail", "mail"),
        ("either", 3, 3),
        ("either", "x", "x"),
        ("items", ["a", "b"], ("a", "b")),
        ("pair", [1, 2], (1, 2)),
        ("numbers", [1, 2], (1, 2)),
        ("listed", (1, 2), [1, 2]),
        ("names", ["a"], frozenset({"a"})),
        ("table", {"a": 1}, {"a": 1}),
        ("inner", {"port": 1, "tls": True}, Inner(1, True)),
        ("inner", Inner(1), Inner(1)),
        ("anything", {"a": [1]}, {"a": [1]}),
        # what the environment says is text, and the option decides
        ("text", Loose("5", 5), "5"),
        ("number", Loose("5", 5), 5),
        ("flag", Loose("yes", True), True),
        ("wait", Loose("90", 90), 90.0),
        ("size", Loose("0x10", 16), 16),
        ("maybe_wait", Loose("", None), None),
        ("secret", Loose("123", 123), "123"),
        ("either", Loose("5", 5), 5),
        ("items", Loose("a, b", "a, b"), ("a", "b")),
        ("items", Loose("[a, b]", ["a", "b"]), ("a", "b")),
        ("path", Loose("5", 5), Path("5")),
        ("mode", Loose("fast", "fast"), "fast"),
        ("durability", Loose("D2", "D2"), Durability.D2),
    ],
)
def test_a_value_becomes_what_the_option_wants(key: str, raw: object, value: object) -> None:
    built = getattr(build(Options, {key: raw}, WHERE), key)
    assert built == value
    assert type(built) is type(value) or isinstance(built, Hidden)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"nmuber": 1}, "transport.nmuber: unknown key; did you mean 'number'?"),
        ({"text": 5}, "transport.text: expected text, got 5"),
        ({"number": "5"}, "transport.number: expected a whole number, got '5'"),
        ({"number": True}, "transport.number: expected a whole number, got True"),
        ({"number": 1.0}, "transport.number: expected a whole number, got 1.0"),
        ({"ratio": True}, "transport.ratio: expected a number, got True"),
        ({"ratio": math.nan}, "transport.ratio: expected a number, got nan"),
        ({"ratio": math.inf}, "transport.ratio: expected a number, got inf"),
        ({"flag": 1}, "transport.flag: expected true or false, got 1"),
        ({"mode": "fats"}, "transport.mode: expected 'fast' or 'safe', got 'fats'; did you mean 'fast'?"),
        ({"mode": 1}, "transport.mode: expected 'fast' or 'safe', got 1"),
        ({"durability": "D9"}, "transport.durability: expected D0 or D1 or D2 or D3 or D4, got 'D9'"),
        ({"durability": 3}, "got 3"),
        ({"wait": "soon"}, "transport.wait: 'soon' is no length of time; write 30"),
        ({"wait": -1}, "transport.wait: -1 is no length of time"),
        ({"size": "8 parsecs"}, "transport.size: '8 parsecs' is no number of bytes; write 4096"),
        ({"size": -1}, "transport.size: -1 is no number of bytes"),
        ({"count": 0}, "transport.count: 0 is too small, the least is 1"),
        ({"name": ""}, "transport.name: a name must not be empty"),
        ({"name": "a\nb"}, "transport.name: the name 'a\\nb' holds characters that cannot be printed"),
        ({"either": 1.5}, "transport.either: expected a whole number or text, got 1.5"),
        ({"items": "a"}, "transport.items: expected a list, got 'a'"),
        ({"items": ["a", 1]}, "transport.items.1: expected text, got 1"),
        ({"pair": [1]}, "transport.pair: expected 2 values, got 1"),
        ({"table": {"a": "x"}}, "transport.table.a: expected a whole number, got 'x'"),
        ({"table": []}, "transport.table: expected a mapping, got []"),
        ({"inner": {"tls": True}}, "transport.inner: 'port' is missing"),
        ({"inner": 5}, "transport.inner: expected a mapping, got 5"),
        ({"inner": {"port": 1, "tsl": 1}}, "transport.inner.tsl: unknown key; did you mean 'tls'?"),
    ],
)
def test_an_error_names_place_path_and_problem(raw: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Options, raw, WHERE)
    assert str(caught.value).startswith("dray.yaml:3: transport")
    assert says in str(caught.value)


def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Options, {"secret": 12345678}, WHERE)
    assert str(caught.value) == "dray.yaml:3: transport.secret: expected text, got int"


def test_a_check_of_the_options_themselves_is_told_with_its_place() -> None:
    @dataclass(frozen=True, slots=True)
    class Checked:
        low: int = 0

        def __post_init__(self) -> None:
            if self.low:
                raise ValueError("low must be 0")

    with pytest.raises(ConfigError, match=r"^dray\.yaml:3: transport: low must be 0$"):
        build(Checked, {"low": 1}, WHERE)


def test_options_may_be_absent() -> None:
    assert build(Options, {}) == Options()
    with pytest.raises(ConfigError, match=r"^x: unknown key; known: port, tls$"):
        build(Inner, {"x": 1})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("500ms", 0.5),
        ("30s", 30),
        ("5 m", 300),
        ("1h30m", 5400),
        ("7D", 604800),
        ("1w", 604800),
    ],
)
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "-5",
        "5 minutes",
        "1h1h",
        "h",
        "1e3",
        "½h",
        "٣s",
        "nan",
        "inf",
        "9" * 5000,
        -1,
        True,
        None,
        math.nan,
        math.inf,
        [],
        10**400,
    ],
)
def test_no_seconds(value: object) -> None:
    with pytest.raises(ConfigError, match="is no length of time; write"):
        parse_seconds(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("8KiB", 8192),
        ("8 kib", 8192),
        ("1MB", 10**6),
        ("1.5MiB", 1572864),
        ("2GiB", 2**31),
        ("1TB", 10**12),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value", ["", "-5", "5K", "1.5", "1.5B", "KiB", "8Kibibytes", "٣", "9" * 5000, -1, True, 1.5, None, 2**63]
)
def test_no_size(value: object) -> None:
    with pytest.raises(ConfigError, match="is no number of bytes; write"):
        parse_size(value)


@given(st.one_of(st.text(), st.from_regex(r"[0-9a-zA-Z. ]+"), st.floats(), st.integers(), st.none(), st.binary()))
def test_lengths_and_sizes_are_numbers_or_our_error(value: object) -> None:
    for parse in (parse_seconds, parse_size):
        try:
            assert 0 <= parse(value) < math.inf
        except ConfigError as error:
            assert len(str(error)) < 250


@given(st.integers(0, 10**9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_a_composed_length_is_the_sum(days: int, hours: int, minutes: int, seconds: int) -> None:
    text = f"{days}d{hours}h{minutes}m{seconds}s"
    assert parse_seconds(text) == days * 86400 + hours * 3600 + minutes * 60 + seconds


@given(
    st.dictionaries(
        st.sampled_from([*Options.__dataclass_fields__, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)
def test_any_raw_values_are_options_or_our_error(raw: dict[str, object]) -> None:
    try:
        assert isinstance(build(Options, raw, WHERE), Options)
    except ConfigError as error:
        assert str(error).startswith("dray.yaml:3: transport")


@given(st.text(max_size=300))
def test_names_are_short_and_printable(name: str) -> None:
    try:
        check_name(name)
    except ConfigError:
        assert not name or len(name) > 200 or not name.isprintable()
    else:
        assert 0 < len(name) <= 200
        assert name.isprintable()


def test_where_falls_back_to_what_encloses() -> None:
    where = Where("a.b", {"a": "f:1", "a.b.c": "f:2"})
    assert where.origin == "f:1"
    assert where.child("c").origin == "f:2"
    assert where.child("d").child("e").origin == "f:1"
    assert Where("z").origin is None


def test_suggestions() -> None:
    assert suggest("sise", ["size", "mode"]) == "; did you mean 'size'?"
    assert suggest("zzz", ["size", "mode"]) == "; known: mode, size"
    assert suggest("zzz", []) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("NULL", None), ("true", True), ("False", False), ("5", 5), ("-5", -5),
        ("1_000", 1000), ("0", 0), ("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0), ("0755", "0755"), ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"), ("tRue", "tRue"), ("nan", "nan"), ("1.2.3", "1.2.3"), ("+", "+"), (".", "."),
        ("9" * 50, "9" * 50), ("٣", "٣"),
    ],
)  # fmt: skip
def test_plain_words(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_yes_and_no_are_text_where_text_is_wanted() -> None:
    assert build(Options, {"text": scalar("no"), "flag": scalar("on")}) == Options(text="no", flag=True)


def test_secrets_are_masked() -> None:
    assert masked("amqp://guest:hu/sh@host/") == f"amqp://guest:{MASK}@host/"
    assert masked("redis://:hush@host:6379/0?ssl=1") == f"redis://:{MASK}@host:6379/0?ssl=1"
    assert masked("pg://host/?user=u&password=hush&x=1") == f"pg://host/?user=u&password={MASK}&x=1"
    for typo in ("amqp:/guest:hush@host", "amqp//guest:hush@host", "guest:hush@host"):
        assert "hush" not in str(masked(typo))
    assert masked("redis://host:6379/0") == "redis://host:6379/0"
    assert masked({"a": {"api_key": "k", "n": 1}, "passwords": {"x": ["p"]}}) == {
        "a": {"api_key": MASK, "n": 1},
        "passwords": {"x": [MASK]},
    }
    assert masked(5, "token") == MASK
    assert masked(None, "token") is None
    assert "hush" not in shown({"url": "amqp://u:hush@h", "secret": "hush"})
    assert len(shown("x" * 1000)) == 80
