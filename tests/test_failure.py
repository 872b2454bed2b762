"""Exceptions as plain data and back: whatever the exception does, and without importing anything."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.errors import InvalidArguments, TaskFailed
from dray.core.failure import REASON_MAX, TRACEBACK_MAX, SafeErrors, brief, clean, error_record


class Hostile(Exception):
    """Everything that can be asked of it raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no args")


class Fatal(Exception):
    def __str__(self) -> str:
        sys.exit(3)

    __repr__ = __str__


class Custom(Exception):
    pass


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("error", [Hostile(), Fatal("x"), Hostile("a", 2)])
def test_an_exception_that_answers_nothing_is_still_recorded(error: Exception) -> None:
    record = error_record(raised(error))
    assert record["type"].endswith(type(error).__name__)
    assert "could not be made" in record["message"]
    json.dumps(record)
    assert type(error).__name__ in brief(error)


def test_the_record_says_what_where_and_with_which_arguments() -> None:
    record = error_record(raised(ValueError("no", 3, 2.5, True, None)))
    assert record["type"] == "builtins.ValueError"
    assert record["args"] == ["no", 3, 2.5, True, None]
    assert "in raised" in record["traceback"]
    assert record["message"].startswith("('no', 3")


@pytest.mark.parametrize("args", [(object(),), ([1],), (b"bytes",), (Custom("inner"),), ("fine", {1: 2})])
def test_arguments_that_are_not_plain_are_left_out(args: tuple[Any, ...]) -> None:
    assert error_record(Custom(*args))["args"] is None


def test_chains_are_in_the_traceback() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise Custom("second") from error
    except Custom as error:
        text = error_record(error)["traceback"]
    assert "KeyError: 'first'" in text
    assert "direct cause" in text


def test_long_ones_are_cut_in_the_middle() -> None:
    record = error_record(raised(Custom("x" * 1_000_000)))
    assert len(record["traceback"]) <= TRACEBACK_MAX + 20
    assert len(record["message"]) == TRACEBACK_MAX
    assert len(brief(Custom("word " * 10_000))) == REASON_MAX


def test_deep_recursion_is_recorded() -> None:
    def dive() -> None:
        dive()

    try:
        dive()
    except RecursionError as error:
        assert "RecursionError" in error_record(error)["traceback"]


@given(st.text())
def test_texts_become_such_as_every_store_can_keep(text: str) -> None:
    record = error_record(Custom(text))
    for part in (record["message"], record["traceback"], clean(text)):
        assert "\0" not in part
        part.encode()
    reason = brief(Custom(text))
    assert "\n" not in reason
    reason.encode()


def test_a_class_name_with_a_surrogate_is_cleaned() -> None:
    odd = type("Odd", (Exception,), {"__qualname__": "\ud800\0"})
    error_record(odd())["type"].encode()
    assert "\0" not in error_record(odd())["type"]


# --- back --------------------------------------------------------------------------------------------------


def test_built_in_and_own_classes_come_back_as_themselves() -> None:
    for error in (ZeroDivisionError("by zero"), FileNotFoundError(2, "gone"), InvalidArguments("x takes 1")):
        rebuilt = SafeErrors().rebuild(error_record(raised(error)))
        assert type(rebuilt) is type(error)
        assert rebuilt.args == error.args
        assert "in raised" in "".join(traceback.format_exception(rebuilt))


def test_registered_classes_come_back_and_others_as_task_failed() -> None:
    safe = SafeErrors()
    record = error_record(raised(Custom("boom", 7)))
    failed = safe.rebuild(record)
    assert isinstance(failed, TaskFailed)
    assert failed.error_type == f"{__name__}.Custom"
    assert failed.message == "('boom', 7)"
    assert "in raised" in failed.remote_traceback
    assert str(failed) == f"{__name__}.Custom: ('boom', 7)"
    safe.add(Custom)
    rebuilt = safe.rebuild(record)
    assert type(rebuilt) is Custom
    assert rebuilt.args == ("boom", 7)


def test_a_class_named_in_a_record_is_never_imported() -> None:
    names = ["antigravity.Boom", "os.system", "dray.core.worker.Worker", "builtins.eval", "builtins.SystemExit"]
    before = set(sys.modules)
    for name in names:
        failed = SafeErrors().rebuild({"type": name, "message": "m", "args": ["echo"], "traceback": ""})
        assert isinstance(failed, TaskFailed)
        assert failed.error_type == name
    assert set(sys.modules) == before


@pytest.mark.parametrize("error", [StopIteration(1), StopAsyncIteration(), SystemExit(1), KeyboardInterrupt()])
def test_what_steers_python_is_never_raised_at_the_caller(error: BaseException) -> None:
    assert isinstance(SafeErrors().rebuild(error_record(error)), TaskFailed)


def test_a_class_that_cannot_be_built_from_its_arguments_is_task_failed() -> None:
    class Picky(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("one text")

    safe = SafeErrors()
    safe.add(Picky)
    assert isinstance(safe.rebuild(error_record(Picky(1, 2))), TaskFailed)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["type", "message", "args", "traceback", "x"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_record_gives_an_exception(record: Any) -> None:
    assert isinstance(SafeErrors().rebuild(record), Exception)
