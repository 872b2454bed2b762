"""What the serializers share: rich scalars as text, and what to say to a value that is no plain data.

Plain data is ``None``, booleans, integers, finite floats, text, lists and dictionaries with text keys. Dates, times,
durations, decimals, UUIDs and bytes travel as a kind and a text; a time zone travels as its offset from UTC.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import inspect
import io
import os
from collections.abc import Callable, Iterator, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple
from uuid import UUID

from dray.core.errors import DecodeError, EncodeError

TAG = "__dray__"
"""The key that marks ``{"__dray__": kind, "v": text}`` in formats that have no types of their own to offer."""
DEPTH_MAX = 200
"""How deep values may be nested in formats whose libraries leave the bound to us."""


class Kind(NamedTuple):
    """One type of rich scalar; ``code`` is its number in formats that number their extensions."""

    code: int
    name: str
    type: type[Any]
    to_text: Callable[[Any], str]
    from_text: Callable[[str], object]


def _time_to_text(value: time) -> str:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise EncodeError("a time whose offset depends on the day cannot be sent: pass a datetime, or the zone's name")
    return value.isoformat()


def _decimal_to_text(value: Decimal) -> str:
    if not value.is_finite():
        raise EncodeError(f"Decimal({str(value)!r}) cannot be sent: pass None, or a text")
    return str(value)


_MICROSECOND = timedelta(microseconds=1)

KINDS = (
    # datetime is a subclass of date: it comes first
    Kind(1, "datetime", datetime, datetime.isoformat, datetime.fromisoformat),
    Kind(2, "date", date, date.isoformat, date.fromisoformat),
    Kind(3, "time", time, _time_to_text, time.fromisoformat),
    Kind(
        4,
        "timedelta",
        timedelta,
        lambda value: str(value // _MICROSECOND),
        lambda text: timedelta(microseconds=int(text)),
    ),
    Kind(5, "decimal", Decimal, _decimal_to_text, Decimal),
    Kind(6, "uuid", UUID, str, UUID),
    Kind(
        7,
        "bytes",
        bytes,
        lambda value: base64.b64encode(value).decode(),
        lambda text: base64.b64decode(text, validate=True),
    ),
)
_BY_TYPE = {kind.type: kind for kind in KINDS}
_BY_NAME = {kind.name: kind for kind in KINDS}
_BY_CODE = {kind.code: kind for kind in KINDS}


def kind_of(value: object, format_name: str) -> Kind:
    """The kind of a rich scalar (subclasses travel as their base); raises ``EncodeError`` with advice for all else."""
    kind = _BY_TYPE.get(type(value))
    if kind is None:
        kind = next((kind for kind in KINDS if isinstance(value, kind.type)), None)
        if kind is None:
            raise refusal(value, format_name)
    return kind


def to_tagged(value: object, format_name: str) -> dict[str, str]:
    """A rich scalar as a tagged dictionary; raises ``EncodeError`` with advice for a value that is none."""
    kind = kind_of(value, format_name)
    return {TAG: kind.name, "v": kind.to_text(value)}


def from_tagged(tagged: dict[str, Any]) -> object:
    """The inverse of :func:`to_tagged`; raises ``DecodeError``."""
    kind, text = _BY_NAME.get(str(tagged[TAG])), tagged.get("v")
    if kind is None or not isinstance(text, str) or len(tagged) != 2:
        raise DecodeError(f'a dictionary with the key "{TAG}" is none of: {", ".join(_BY_NAME)}')
    return _parse(kind, text)


def from_code(code: int, data: bytes) -> object:
    """The rich scalar with this number; raises ``DecodeError``."""
    kind = _BY_CODE.get(code)
    if kind is None:
        raise DecodeError(f"unknown extension type {code}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError(f"a {kind.name} is not UTF-8: {error}") from error
    return _parse(kind, text)


def _parse(kind: Kind, text: str) -> object:
    try:
        value = kind.from_text(text)
    except (ValueError, OverflowError, InvalidOperation) as error:
        raise DecodeError(f"not a {kind.name}: {text[:50]!r}") from error
    if isinstance(value, Decimal) and not value.is_finite():
        raise DecodeError(f"not a finite decimal: {text[:50]!r}")
    return value


def check_keys(value: object) -> None:
    """Raise ``EncodeError`` for a dictionary key that is not text, or that is the reserved tag. No cycles, please."""
    rest: list[object] = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            for key in item:
                check_key(key)
            rest.extend(item.values())
        elif isinstance(item, (list, tuple)):
            rest.extend(item)


def check_key(key: object) -> None:
    """Raise ``EncodeError`` unless ``key`` may be a dictionary's key."""
    if not isinstance(key, str):
        raise EncodeError(
            f"a dictionary has a key of type {type_name(key)}, and keys are text: use str(key), "
            f"or pass a list of [key, value] pairs"
        )
    if key == TAG:
        raise EncodeError(f'the dictionary key "{TAG}" is reserved: use another')


def type_name(value: object) -> str:
    """The dotted name of a value's type, as people know it."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def refusal(value: object, format_name: str) -> EncodeError:
    """The error for a value that cannot be sent: names its type, says what to pass instead, never shows the value."""
    return EncodeError(f"a value of type {type_name(value)} cannot be sent as {format_name}: pass {_advice(value)}")


def _advice(value: object) -> str:
    cls = type(value)
    if isinstance(value, int):  # offered by formats whose integers have 64 bits
        return "an integer of that size as text, or as bytes"
    if isinstance(value, type):
        return "its name instead of the class itself"
    if any(hasattr(cls, mark) for mark in ("_sa_class_manager", "__mapper__", "DoesNotExist")):
        return "the ORM row's primary key and load the row in the task"
    if isinstance(value, Set):
        return "a list, list(value) or sorted(value)"
    if dataclasses.is_dataclass(value):
        return "dataclasses.asdict(value)"
    if hasattr(cls, "model_dump"):
        return "value.model_dump()"
    if isinstance(value, enum.Enum):
        return "its value, value.value"
    if isinstance(value, io.IOBase):
        return "the file's path, or its contents"
    if isinstance(value, os.PathLike):
        return "str(value)"
    if isinstance(value, BaseException):
        return "str(value)"
    if isinstance(value, (bytearray, memoryview)):
        return "bytes(value)"
    if inspect.isawaitable(value):
        return "what it gives: await it first"
    if callable(value):
        return "the name of a task, or data that the task turns into the function"
    if hasattr(cls, "tolist"):
        return "value.tolist()"
    if isinstance(value, (Iterator, range)):
        return "list(value)"
    return "plain data: text, numbers, lists, dictionaries, or an id by which the task finds the object"
