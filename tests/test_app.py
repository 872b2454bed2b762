"""The application: its configuration, its connections, and what a fork does to them."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest

from dray import Dray, NoResults, TaskFailed
from dray.core.errors import ConfigError, ResultTimeout, TaskRevoked
from dray.core.failure import error_record
from dray.core.message import State, StoredResult
from dray.testing.clock import FakeClock

MEMORY = {"transport": "memory", "backend": "memory"}


def memory_app(**settings: Any) -> Dray:
    return Dray(config={**MEMORY, **settings}, clock=FakeClock())


def store(app: Dray, task_id: str, state: State, value: object) -> None:
    body = app.codec.encode_result(task_id, value, state)
    app.backend.store([StoredResult(task_id, state, body, None)])


# --- configuration -----------------------------------------------------------------------------------------


def test_the_configuration_is_frozen_at_its_first_use() -> None:
    app = Dray(config=MEMORY)
    app.configure(name="shop", result_expires="2h")
    assert (app.config.name, app.config.result_expires) == ("shop", 7200)
    assert app.config is app.config
    with pytest.raises(ConfigError, match="frozen"):
        app.configure(name="other")
    with pytest.raises(AttributeError):
        app.config.name = "other"  # type: ignore[misc]


def test_code_wins_over_the_given_configuration() -> None:
    assert Dray("code", config={**MEMORY, "name": "mapping"}).config.name == "code"


def test_nothing_is_connected_or_read_before_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = Dray()

    @app.task(name="t")
    def nothing() -> None: ...

    assert list(tmp_path.iterdir()) == []
    nothing.delay()
    assert (tmp_path / ".dray").is_dir()
    app.close()


def test_an_unknown_task_option_is_refused_where_it_stands() -> None:
    with pytest.raises(ConfigError, match=r"'retires'.*retry"):
        memory_app().task(retires=3)


def test_a_serializer_that_runs_code_must_be_listed() -> None:
    with pytest.raises(ConfigError, match=r"accept: \[pickle\]"):
        _ = memory_app(serializer="pickle").codec
    app = memory_app(serializer="pickle", accept=["pickle"])
    assert app.codec.encode_call({"type": "pickle"}, "q", "i", ((), {}))[1] == pickle.dumps(((), {}), protocol=5)


# --- connections -------------------------------------------------------------------------------------------


def test_closing_is_idempotent_and_the_next_use_connects_again(tmp_path: Path) -> None:
    app = Dray(config={"transport": {"use": "sqlite", "path": str(tmp_path / "q.db")}, "backend": "memory"})
    task = app.task(name="t")(lambda: None)
    with app:
        task.delay()
        first = app.transport
    app.close()
    task.delay()
    assert app.transport is not first
    assert app.transport.stats(["default"])["default"].ready == 2  # type: ignore[attr-defined]
    app.close()


def in_child(work: Any) -> str:
    """What ``work`` returns, or its error, in a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_a_forked_child_makes_its_own_connections_and_leaves_the_parent_s_alone(tmp_path: Path) -> None:
    app = Dray(config={"transport": {"use": "sqlite", "path": str(tmp_path / "q.db")}, "backend": "null"})
    task = app.task(name="t")(lambda: None)
    task.delay()
    parents = app.transport

    def work() -> tuple[bool, int]:
        task.delay()
        gc.collect()
        return app.transport is not parents, app.random.getrandbits(64)

    state = app.random.getstate()
    first, second = in_child(work), in_child(work)
    assert first.startswith("(True, ")
    assert second.startswith("(True, ")
    assert first != second, "children that share the parent's randomness would retry in step"
    assert app.random.getstate() == state
    task.delay()
    assert app.transport is parents
    assert app.transport.stats(["default"])["default"].ready == 4  # type: ignore[attr-defined]
    app.close()


def test_memory_of_the_parent_is_refused_in_a_child() -> None:
    app = memory_app()
    task = app.task(name="t")(lambda: None)
    task.delay()
    assert in_child(task.delay).startswith("NotSupported: the transport 'memory' lives in the parent process")
    task.delay()
    app.close()


def test_an_app_that_is_gone_does_not_haunt_forks() -> None:
    app = memory_app()
    ghost = weakref.ref(app)
    del app
    gc.collect()
    assert ghost() is None
    assert in_child(lambda: "fine") == "fine"


# --- what a worker may be started for ----------------------------------------------------------------------


def test_a_worker_refuses_what_its_pool_cannot_keep() -> None:
    app = memory_app(workers={"w": {"pool": "threads", "size": 1}})
    app.task(name="slow", time_limit=5)(lambda: None)
    with pytest.raises(ConfigError, match=r"task 'slow' has time_limit.*'threads' cannot enforce.*prefork"):
        app.worker()


def test_a_worker_refuses_a_transport_that_promises_less() -> None:
    app = memory_app(workers={"w": {"pool": "threads", "size": 1}}, require_durability="D3")
    with pytest.raises(ConfigError, match=r"require_durability is D3.*'memory' keeps D0"):
        app.worker().run()
    app.close()


# --- results -----------------------------------------------------------------------------------------------


def test_without_a_back_end_asking_for_a_result_says_what_to_configure() -> None:
    app = Dray(config={"transport": "memory"})
    result = app.task(name="t")(lambda: None).delay()
    for ask in (lambda: result.get(timeout=0), lambda: result.state, result.forget):
        with pytest.raises(NoResults, match="backend: sqlite"):
            ask()
    app.close()


def test_a_result_is_read_by_its_id() -> None:
    app = memory_app()
    result = app.result("id1")
    assert (result.state, result.ready(), result.info, result.traceback) == (State.PENDING, False, None, None)
    with pytest.raises(ResultTimeout, match="1 of 1 results not there after 0 s; first: id1"):
        result.get(timeout=0)
    store(app, "id1", State.STARTED, {"done": 1, "total": 2})
    assert (result.state, result.info) == (State.STARTED, {"done": 1, "total": 2})
    store(app, "id1", State.SUCCESS, [1, 2])
    assert (result.get(timeout=0), result.info, result.successful(), result.ready()) == ([1, 2], [1, 2], True, True)
    result.forget()
    assert result.state is State.PENDING
    app.close()


def test_errors_come_back_as_themselves_where_that_is_safe() -> None:
    app = memory_app()

    @app.safe_error
    class OutOfStock(Exception):
        pass

    class Unregistered(Exception):
        pass

    errors = {"a": ZeroDivisionError("by zero"), "b": OutOfStock("nails", 3), "c": Unregistered("hidden")}
    for task_id, error in errors.items():
        store(app, task_id, State.FAILURE, error_record(error))
    with pytest.raises(ZeroDivisionError, match="by zero"):
        app.result("a").get(timeout=0)
    with pytest.raises(OutOfStock) as caught:
        app.result("b").get(timeout=0)
    assert caught.value.args == ("nails", 3)
    with pytest.raises(TaskFailed, match="Unregistered: hidden"):
        app.result("c").get(timeout=0)
    assert app.result("a").failed()
    assert "ZeroDivisionError" in (app.result("a").traceback or "")
    store(app, "d", State.REVOKED, None)
    with pytest.raises(TaskRevoked):
        app.result("d").get(timeout=0)
    app.close()


def test_a_group_of_results_keeps_its_order() -> None:
    app = memory_app()
    task = app.task(name="t")(lambda x: x)
    group = app.send_many(task.s(number) for number in range(3))
    for number, task_id in reversed(list(enumerate(group.ids))):
        store(app, task_id, State.SUCCESS, number)
    assert group.get(timeout=0) == [0, 1, 2]
    assert (len(group), group.ready_count()) == (3, 3)
    assert [result.get(timeout=0) for result in group] == [0, 1, 2]
    assert sorted(group.as_completed(timeout=0)) == sorted(zip(group.ids, range(3), strict=True))
    group.forget()
    assert group.ready_count() == 0
    store(app, group.ids[0], State.FAILURE, error_record(KeyError("x")))
    with pytest.raises(ResultTimeout, match="2 of 3"):
        group.get(timeout=0)
    assert isinstance(dict([next(group.as_completed(timeout=0))])[group.ids[0]], KeyError)
    app.close()


def test_an_app_does_not_send_what_it_only_knows_by_name_here() -> None:
    app = memory_app()
    app.send_task("elsewhere.job", (1,))
    with pytest.raises(ConfigError, match="by its name only"):
        app._unbound["elsewhere.job"]()
    with pytest.raises(ConfigError, match="did you mean 'queue'"):
        app.send_task("elsewhere.job", queu="x")
    app.close()
