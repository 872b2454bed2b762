"""An exception as plain data, and back: what travels when a task fails."""

from __future__ import annotations

import builtins
import os.path
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from dray.core import errors
from dray.core.errors import TaskFailed

TRACEBACK_MAX = 16_384
REASON_MAX = 500
_CORE = os.path.dirname(os.path.abspath(__file__))
_FLOW = (StopIteration, StopAsyncIteration)
"""Python takes these for the end of an iteration: never raised again at the caller's."""


def dotted(cls: type) -> str:
    """A class's full name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def error_record(error: BaseException) -> dict[str, Any]:
    """An exception as plain data. Never raises, whatever the exception's own methods do."""
    try:
        text = "".join(traceback.format_exception(type(error), error, _of_the_task(error.__traceback__)))
    except BaseException:
        text = "(the traceback could not be formatted)"
    if len(text) > TRACEBACK_MAX:
        text = f"{text[: TRACEBACK_MAX // 2]}\n[...]\n{text[-TRACEBACK_MAX // 2 :]}"
    return {
        "type": clean(dotted(type(error))),
        "message": clean(_message(error)),
        "args": _plain_args(error),
        "traceback": clean(text),
    }


def _of_the_task(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame that is not the core's own."""
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_CORE):
        first = first.tb_next
    return first or trace


def brief(error: BaseException) -> str:
    """One line about an exception: a dead letter's reason."""
    return one_line(f"{type(error).__name__}: {_message(error)}")


def one_line(text: str) -> str:
    """Text from outside as it may stand in a log: one line, bounded, printable."""
    line = " ".join(clean(text[: 2 * REASON_MAX]).split())[:REASON_MAX]
    return line if line.isprintable() else repr(line)[1:-1][:REASON_MAX]


def clean(text: str) -> str:
    """Without lone surrogates and NULs, which no store can keep."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _message(error: BaseException) -> str:
    try:
        return str(error)[:TRACEBACK_MAX]
    except BaseException as problem:  # whatever the user's class does, SystemExit included
        return f"(its text could not be made: {type(problem).__name__})"


def _plain_args(error: BaseException) -> list[Any] | None:
    """What the exception was made with; None when that is not plain data."""
    try:
        args = tuple(error.args)
    except BaseException:
        return None
    return list(args) if all(type(a) in (str, int, float, bool, type(None)) for a in args) else None


class SafeErrors:
    """Exception classes that may be rebuilt from a result: the built-in ones, dray's, and those the app registers.

    A class that is only named in a result is never imported.
    """

    def __init__(self) -> None:
        known = [*vars(builtins).values(), *vars(errors).values()]
        self._classes: dict[str, type[BaseException]] = {}
        for cls in known:
            if isinstance(cls, type) and issubclass(cls, Exception) and cls not in _FLOW:
                self.add(cls)

    def add(self, cls: type[BaseException]) -> None:
        """Register one more. It is rebuilt as ``cls(*args)``."""
        self._classes[dotted(cls)] = cls

    def rebuild(self, record: Any) -> BaseException:
        """The exception that an error record describes; ``TaskFailed`` for classes that are not registered."""
        if not isinstance(record, Mapping):
            return TaskFailed("unknown", f"the error record makes no sense: {str(record)[:200]}")
        name, text = str(record.get("type", "unknown")), str(record.get("message", ""))
        traceback = str(record.get("traceback") or "")
        cls, args = self._classes.get(name), record.get("args")
        if cls is None or not isinstance(args, (list, tuple)):
            return TaskFailed(name, text, traceback)
        try:
            error = cls(*args)
        except Exception:
            return TaskFailed(name, text, traceback)
        if traceback:
            error.add_note(f"--- in the worker:\n{traceback}")
        return error
