"""Hooks: free when nobody listens, isolated when somebody does."""

from __future__ import annotations

import logging
from typing import ClassVar

import pluggy
import pytest

from dray.core.errors import ConfigError
from dray.core.hooks import NAMES, NO_HOOKS, Hooks, hookimpl

STARTED = {"task": "shop.pay", "id": "1", "queue": "mail", "attempt": 0, "headers": {}}


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    @hookimpl
    def task_started(self, task: str, attempt: int) -> None:
        self.calls.append((task, attempt))


def test_nobody_listens() -> None:
    assert NAMES == (
        "enqueue",
        "task_received",
        "task_started",
        "task_succeeded",
        "task_failed",
        "task_retried",
        "task_dead",
        "worker_started",
        "worker_stopping",
        "worker_stopped",
    )
    assert [getattr(NO_HOOKS, name) for name in NAMES] == [None] * len(NAMES)


def test_a_listener_gets_the_arguments_that_it_asks_for() -> None:
    recorder = Recorder()
    hooks = Hooks([recorder])
    assert hooks.task_started is not None
    hooks.task_started(**STARTED)
    assert recorder.calls == [("shop.pay", 0)]
    assert hooks.task_failed is None


def test_a_class_is_built() -> None:
    class Counting(Recorder):
        seen: ClassVar[list[Counting]] = []

        def __init__(self) -> None:
            super().__init__()
            self.seen.append(self)

    hooks = Hooks([Counting])
    assert hooks.task_started is not None
    hooks.task_started(**STARTED)
    assert [len(item.calls) for item in Counting.seen] == [1]


def test_all_listeners_are_called_in_order_and_a_failing_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    class First:
        @hookimpl
        def task_started(self) -> None:
            order.append("first")

    class Failing:
        @hookimpl
        def task_started(self, id: str) -> None:
            order.append("failing")
            raise RuntimeError(f"no {id}")

    class Last:
        @hookimpl(trylast=True)
        def task_started(self) -> None:
            order.append("last")

    hooks = Hooks([Last(), First(), Failing()], logging.getLogger("hooks-test"))
    assert hooks.task_started is not None
    with caplog.at_level(logging.ERROR, "hooks-test"):
        hooks.task_started(**STARTED)
    assert sorted(order) == ["failing", "first", "last"]
    assert order[-1] == "last"
    assert "the hook task_started of" in caplog.text
    assert "RuntimeError: no 1" in caplog.text


def test_what_a_hook_puts_into_the_headers_travels() -> None:
    class Tracing:
        @hookimpl
        def enqueue(self, headers: dict[str, str]) -> None:
            headers["traceparent"] = "00-1"

    hooks = Hooks([Tracing()])
    assert hooks.enqueue is not None
    headers: dict[str, str] = {}
    hooks.enqueue(task="t", id="1", queue="q", headers=headers, not_before=None)
    assert headers == {"traceparent": "00-1"}


def test_an_unknown_hook_is_an_error() -> None:
    class Wrong:
        @hookimpl
        def task_begun(self) -> None: ...

    with pytest.raises(ConfigError, match=r"^hooks: .*task_begun.*the hooks are enqueue, task_received"):
        Hooks([Wrong()])


def test_an_unknown_argument_is_an_error() -> None:
    class Wrong:
        @hookimpl
        def task_started(self, tsk: str) -> None: ...

    with pytest.raises(ConfigError, match="tsk"):
        Hooks([Wrong()])


def test_a_wrapper_is_an_error() -> None:
    class Wrapping:
        @pluggy.HookimplMarker("dray")(wrapper=True)
        def task_started(self):  # type: ignore[no-untyped-def]
            return (yield)

    with pytest.raises(ConfigError, match="task_started is implemented as a wrapper"):
        Hooks([Wrapping()])


def test_one_object_twice_is_an_error() -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError, match="already registered"):
        Hooks([recorder, recorder])
