"""Raw settings to typed options: a frozen dataclass is filled from a mapping by its type hints.

Strict: ``true`` is no number and ``"5"`` is not 5; only text that comes from outside of the file (:class:`Loose`) is
read as whatever the option wants. Every error names the place, the dotted path and the nearest right name.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from dray.core.errors import ConfigError
from dray.core.masking import Hidden, masked, shown

T = TypeVar("T")

NAME_LENGTH_MAX = 200
SECONDS_FORMS = '30, "30s", "500ms", "5m", "1h30m" or "7d"'
SIZE_FORMS = '4096, "512B", "8KiB", "64MiB" or "1MB"'

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_UNIT_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": step ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, step in (("b", 1000), ("ib", 1024))
}
_WORDS: Mapping[Any, str] = {
    str: "text",
    Path: "a path",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    "seconds": f"a length of time ({SECONDS_FORMS})",
    "size": f"a number of bytes ({SIZE_FORMS})",
}
_NUMBER = r"\d{1,15}(?:\.\d{1,9})?"
_SECONDS_PART = rf"(?a:({_NUMBER})\s*(ms|s|m|h|d|w)\s*)"
_SIZE = rf"(?ai:({_NUMBER})\s*([a-z]*))"


@dataclass(frozen=True, slots=True)
class Min:
    """Marks a number that must not be smaller: ``Annotated[int, Min(1)]``."""

    value: int


Count = Annotated[int, Min(1)]
"""A whole number from 1 up."""
Name = Annotated[str, "name"]
"""The name of a queue, a task or a worker: 1 to 200 printable characters."""


class Loose(str):
    """Text whose type the option decides: from the environment, where all is text, or a plain ``yes`` or ``no``.

    ``value`` is what it means where no text is wanted.
    """

    __slots__ = ("value",)
    value: object

    def __new__(cls, text: str, value: object) -> Loose:
        self = super().__new__(cls, text)
        self.value = value
        return self


@dataclass(frozen=True, slots=True)
class Where:
    """A place in the configuration. Knows where each value came from; makes the errors that say so."""

    path: str = ""
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)

    def child(self, key: object) -> Where:
        """The place of one key or index."""
        return Where(f"{self.path}.{key}" if self.path else str(key), self.origins)

    @property
    def origin(self) -> str | None:
        """Where the value here, or what encloses it, was given; None: nowhere."""
        path = self.path
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return self.origins.get("")

    def error(self, problem: str) -> ConfigError:
        """``dray.yaml:12: workers.default.size: problem``."""
        text = ": ".join(part for part in (self.origin, self.path, problem) if part)
        return ConfigError(masked(text))  # the problem may be in a plugin's words, which may quote a URL


def parse_seconds(value: object) -> float:
    """A length of time in seconds; raises ``ConfigError`` that lists the forms."""
    if isinstance(value, str):
        text = value.strip().lower()
        if re.fullmatch(_NUMBER, text, re.ASCII):
            return float(text)
        parts = re.findall(_SECONDS_PART, text) if re.fullmatch(f"{_SECONDS_PART}+", text) else []
        units = [unit for _, unit in parts]
        if parts and len(set(units)) == len(units):
            return math.fsum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e15:
        return float(value)
    raise ConfigError(f"{shown(value)} is no length of time; write {SECONDS_FORMS}")


def parse_size(value: object) -> int:
    """A number of bytes; raises ``ConfigError`` that lists the forms."""
    if isinstance(value, str):
        match = re.fullmatch(_SIZE, value.strip())
        unit = _UNIT_BYTES.get(match[2].lower()) if match else None
        if match and unit is not None and (unit > 1 or "." not in match[1]):
            return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * int(unit)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ConfigError(f"{shown(value)} is no number of bytes; write {SIZE_FORMS}")


def check_name(value: str) -> str:
    """The name of a queue, a task or a worker, as given; raises ``ConfigError`` for one that stores cannot keep."""
    if not value:
        raise ConfigError("a name must not be empty")
    if len(value) > NAME_LENGTH_MAX:
        raise ConfigError(f"a name has at most {NAME_LENGTH_MAX} characters, this one has {len(value)}")
    if not value.isprintable():
        raise ConfigError(f"the name {value!a} holds characters that cannot be printed")
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'size'?``, or what there is when nothing is near."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The type of each field of a dataclass, markers included."""
    known = typing.get_type_hints(cls, include_extras=True)
    return {item.name: known[item.name] for item in dataclasses.fields(cls) if item.init}


def build(cls: type[T], raw: Mapping[str, object], where: Where | None = None, **given: object) -> T:
    """An instance of the frozen dataclass ``cls``, filled from ``raw``; raises ``ConfigError``.

    ``given`` are values for fields that are no options.
    """
    where = where or Where()
    if isinstance(raw, Loose):
        raw = typing.cast("Mapping[str, object]", raw.value)
    if not isinstance(raw, Mapping):
        raise where.error(f"expected a mapping, got {shown(raw, where.path)}")
    known = {name: kind for name, kind in hints(typing.cast(Any, cls)).items() if name not in given}
    for key in raw:
        if key not in known:
            near = suggest(str(key), known)
            raise where.child(key).error(f"unknown key{near or '; there are no options here'}")
    values = given | {key: convert(known[key], value, where.child(key)) for key, value in raw.items()}
    for item in dataclasses.fields(typing.cast(Any, cls)):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.init and item.name not in values:
            raise where.error(f"{item.name!r} is missing")
    try:
        return cls(**values)
    except (ValueError, TypeError, ConfigError) as error:
        raise where.error(str(error)) from error


def convert(kind: Any, raw: object, where: Where) -> Any:
    """``raw`` as a value of the type ``kind``; raises ``ConfigError``."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _marked(kind, raw, where)
    if origin in (typing.Union, types.UnionType):
        return _union(kind, raw, where)
    if hasattr(kind, "from_raw"):
        return kind.from_raw(raw, where)
    if origin is Literal:
        return _literal(kind, raw, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(kind, raw, where)
    if isinstance(origin, type) and issubclass(origin, Sequence | frozenset):
        return _sequence(kind, origin, raw, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member(kind, raw, where)
    return _plain(kind, raw, where)


def _plain(kind: Any, raw: object, where: Where) -> Any:
    """A value without parts, or a nested dataclass."""
    if kind is Path and isinstance(raw, str | Path):
        return Path(raw)
    if kind is str and isinstance(raw, str):
        return str(raw)
    if isinstance(raw, Loose):
        raw = raw.value
    if dataclasses.is_dataclass(kind):
        return (
            raw
            if isinstance(raw, typing.cast(type, kind))
            else build(typing.cast(Any, kind), typing.cast(Any, raw), where)
        )
    if kind in (Any, object) or (kind in (None, types.NoneType) and raw is None):
        return raw
    if kind is float and type(raw) in (int, float) and math.isfinite(typing.cast(float, raw)):
        return float(typing.cast(float, raw))
    if kind in (int, bool) and type(raw) is kind:
        return raw
    raise _wrong(kind, raw, where)


def _marked(kind: Any, raw: object, where: Where) -> Any:
    """A type with a marker: ``Seconds``, ``Size``, ``Secret``, ``Name``, ``Count``."""
    base, *marks = get_args(kind)
    if "secret" in marks and not isinstance(raw, str):
        raise where.error(f"expected text, got {type(raw).__name__}")
    try:
        if "seconds" in marks:
            return parse_seconds(raw)
        if "size" in marks:
            return parse_size(raw.value if isinstance(raw, Loose) and isinstance(raw.value, int) else raw)
    except ConfigError as error:
        raise where.error(str(error)) from None
    value = convert(base, raw, where)
    if "secret" in marks:
        return Hidden(value)
    if "name" in marks:
        try:
            check_name(value)
        except ConfigError as error:
            raise where.error(str(error)) from None
    for mark in marks:
        if isinstance(mark, Min) and value < mark.value:
            raise where.error(f"{value} is too small, the least is {mark.value}")
    return value


def _union(kind: Any, raw: object, where: Where) -> Any:
    """The first member type that fits."""
    members = [member for member in get_args(kind) if member is not types.NoneType]
    if len(members) < len(get_args(kind)) and (raw is None or (isinstance(raw, Loose) and raw.value is None)):
        return None
    if len(members) == 1:
        return convert(members[0], raw, where)
    for member in members:
        try:
            return convert(member, raw, where)
        except ConfigError:
            continue
    raise _wrong(kind, raw, where)


def _literal(kind: Any, raw: object, where: Where) -> Any:
    choices = get_args(kind)
    for value in (raw.value, str(raw)) if isinstance(raw, Loose) else (raw,):
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
    near = suggest(raw, [str(choice) for choice in choices]) if isinstance(raw, str) else ""
    raise where.error(f"expected {describe(kind)}, got {shown(raw, where.path)}{near if 'mean' in near else ''}")


def _member(kind: type[enum.Enum], raw: object, where: Where) -> enum.Enum:
    """A member of an enumeration, by its name, or by its value if that is text."""
    for member in kind:
        if raw is member or (isinstance(raw, str) and raw in (member.name, member.value)):
            return member
    raise _wrong(kind, raw, where)


def _mapping(kind: Any, raw: object, where: Where) -> dict[Any, Any]:
    if isinstance(raw, Loose):
        raw = raw.value
    if not isinstance(raw, Mapping):
        raise _wrong(kind, raw, where)
    key_kind, value_kind = get_args(kind)
    return {
        convert(key_kind, key, where.child(key)): convert(value_kind, value, where.child(key))
        for key, value in raw.items()
    }


def _sequence(kind: Any, origin: type, raw: object, where: Where) -> Any:
    """A list, tuple or set. In the environment it may be written with commas."""
    if isinstance(raw, Loose):
        raw = (
            raw.value if isinstance(raw.value, list) else [Loose(part, part) for part in raw.replace(",", " ").split()]
        )
    if not isinstance(raw, list | tuple | set | frozenset):
        raise _wrong(kind, raw, where)
    arguments = get_args(kind)
    if origin is tuple and arguments[-1] is not ...:
        if len(raw) != len(arguments):
            raise where.error(f"expected {len(arguments)} values, got {len(raw)}")
        return tuple(
            convert(part, item, where.child(at)) for at, (part, item) in enumerate(zip(arguments, raw, strict=True))
        )
    items = (convert(arguments[0], item, where.child(at)) for at, item in enumerate(raw))
    return tuple(items) if origin is Sequence else origin(items)


def _wrong(kind: Any, raw: object, where: Where) -> ConfigError:
    got = type(raw).__name__ if holds_secret(kind) else shown(raw, where.path.rpartition(".")[2])
    return where.error(f"expected {describe(kind)}, got {got}")


def holds_secret(kind: Any) -> bool:
    """Whether a value of this type is a secret, or has one in it."""
    arguments = get_args(kind)
    return (get_origin(kind) is Annotated and "secret" in arguments[1:]) or any(map(holds_secret, arguments))


def describe(kind: Any) -> str:
    """A type in words."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *marks = get_args(kind)
        return next((_WORDS[mark] for mark in marks if isinstance(mark, str) and mark in _WORDS), describe(base))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(kind))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(kind.__members__)
    if isinstance(origin, type):
        return "a mapping" if issubclass(origin, Mapping) else "a list"
    words: dict[Any, str] = {
        str: "text",
        Path: "a path",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
    }
    return words.get(kind, "nothing" if kind in (None, types.NoneType) else "a mapping")
