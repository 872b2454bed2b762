"""What users test their tasks with: the inline worker and the pytest plugin."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from dray import (
    Dray,
    DrayError,
    EncodeError,
    NoResults,
    ResultTimeout,
    Retry,
    State,
    TaskFailed,
    TaskRevoked,
    current,
    hookimpl,
)
from dray.testing import Call, InlineWorker, Run

pytest_plugins = ["pytester"]


class Shop:
    """An app whose configuration names stores that are not there: nothing of a test may reach them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = {"transport": "nowhere://h", "backend": "nowhere", **settings}
        self.app = app = Dray(config={key: value for key, value in config.items() if value is not None})
        self.seen: list[Any] = []

        @app.task
        def add(x: int, y: int) -> int:
            self.seen.append((x, y))
            return x + y

        @app.task(queue="http", retry=Retry(on=OSError, max=2, delay=60, jitter=0))
        def fetch(url: str) -> str:
            self.seen.append((url, current().attempt))
            raise OSError("no route")

        @app.task
        async def later(n: int) -> int:
            await asyncio.sleep(0)
            return n

        @app.task(time_limit=10, soft_time_limit=5)
        def parent(n: int) -> int:
            return sum(add.delay(i, 1).get() for i in range(n))

        @app.task
        def forever() -> None:
            forever.delay()

        @app.task
        def tick(count: int) -> None:
            self.seen.append((current().id, worker_time()))
            if count > 1:
                tick.options(countdown=60).delay(count - 1)

        def worker_time() -> float:
            return self.worker.clock.time()

        self.add, self.fetch, self.later = add, fetch, later
        self.parent, self.forever, self.tick = parent, forever, tick
        self.worker = InlineWorker(app)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    with shop.worker:
        yield shop


def test_a_call_is_queued_run_and_answered(shop: Shop) -> None:
    result = shop.add.delay(2, y=3)
    assert shop.worker.queued() == [Call(result.id, shop.add.name, [2], {"y": 3}, "default")]
    assert shop.seen == []
    assert shop.worker.run_until_idle() == 1
    assert shop.seen == [(2, 3)]
    assert (result.get(), result.state, shop.worker.queued()) == (5, State.SUCCESS, [])
    assert [run.state for run in shop.worker.runs] == ["SUCCESS"]
    assert shop.worker.states() == {result.id: State.SUCCESS}


def test_get_runs_what_is_queued(shop: Shop) -> None:
    assert shop.add.delay(2, 3).get(timeout=10) == 5
    assert shop.app.send_many(shop.add.s(i, i) for i in range(3)).get() == [0, 2, 4]


def test_arguments_are_really_serialised(shop: Shop) -> None:
    with pytest.raises(EncodeError):
        shop.add.delay(object(), 1)  # type: ignore[arg-type]
    shop.add.delay((1,), (2,)).get()  # type: ignore[arg-type]
    assert shop.seen == [([1], [2])]


def test_retries_run_when_they_are_due(shop: Shop) -> None:
    result = shop.fetch.delay("u")
    assert shop.worker.run_until_idle() == 1
    assert result.state is State.RETRY
    (waiting,) = shop.worker.queued("http")
    assert (waiting.attempt, waiting.eta) == (1, shop.worker.clock.time() + 60)
    assert shop.worker.advance(59) == 0
    assert shop.worker.advance(timedelta(seconds=1)) == 1
    assert shop.worker.advance("1h") == 1
    assert shop.seen == [("u", 0), ("u", 1), ("u", 2)]
    assert [run.state for run in shop.worker.runs] == ["RETRY", "RETRY", "FAILURE"]
    (dead,) = shop.worker.dead()
    assert (dead.id, dead.args, dead.reason) == (result.id, ["u"], "OSError: no route")
    with pytest.raises(OSError, match="no route"):
        result.get()


def test_each_due_task_runs_at_its_own_time(shop: Shop) -> None:
    began = shop.worker.clock.time()
    shop.tick.options(countdown=60).delay(3)
    assert shop.worker.advance("1h") == 3
    assert [moment - began for _, moment in shop.seen] == [60, 120, 180]
    assert shop.worker.clock.time() == began + 3600


def test_a_year_of_nothing_costs_nothing(shop: Shop) -> None:
    began = time.monotonic()
    shop.add.options(countdown=86400).delay(1, 2)
    assert shop.worker.advance("365d") == 1
    assert time.monotonic() - began < 5


def test_who_waits_lets_time_pass(shop: Shop) -> None:
    result = shop.add.options(countdown=600).delay(1, 2)
    with pytest.raises(ResultTimeout, match="not there after 10 s"):
        result.get(timeout=10)
    before = shop.worker.clock.time()
    assert result.get() == 3
    assert shop.worker.clock.time() == before + 590


@pytest.mark.parametrize("timeout", [None, 5])
def test_waiting_in_vain_is_an_error_not_a_hang(shop: Shop, timeout: float | None) -> None:
    with pytest.raises(ResultTimeout, match="the result of task-0: nothing that is queued"):
        shop.app.result("task-0").get(timeout)


def test_a_task_that_waits_for_others(shop: Shop) -> None:
    assert shop.parent.delay(4).get() == 10
    assert [run.call.task.rpartition(".")[2] for run in shop.worker.runs] == [*["add"] * 4, "parent"]


def test_a_lease_is_kept_while_a_task_lets_time_pass(shop: Shop) -> None:
    @shop.app.task(name="patient")
    def patient() -> int:
        shop.seen.append("ran")
        return shop.add.options(countdown=3600).delay(1, 1).get()

    assert patient.delay().get() == 2
    assert shop.seen == ["ran", (1, 1)]


def test_a_crashed_process_costs_a_run_and_loses_nothing(shop: Shop) -> None:
    shop.worker.crash_next()
    first, second = shop.add.delay(1, 1), shop.add.delay(2, 2)
    assert shop.worker.run_until_idle() == 3
    assert (first.get(), second.get()) == (2, 4)
    assert shop.seen == [(1, 1), (2, 2), (1, 1)]
    assert [run.state for run in shop.worker.runs] == ["CRASHED", "SUCCESS", "SUCCESS"]


def test_a_task_that_kills_its_process_three_times_is_poison(shop: Shop) -> None:
    result = shop.add.delay(1, 1)
    for _ in range(3):
        shop.worker.crash_next()
        shop.worker.run_next()
    assert shop.worker.run_until_idle() == 0
    assert "poison" in (shop.worker.dead()[0].reason or "")
    assert result.state is State.FAILURE
    assert shop.app.requeue_dead([result.id]) == [result.id]
    assert result.get() == 2


def test_a_crashed_worker_gives_its_task_back_when_the_lease_ends(shop: Shop) -> None:
    counts: list[int] = []
    note = shop.app.task(name="note")(lambda: counts.append(current().delivery_count))
    shop.worker.crash_next(whole_worker=True)
    result = note.delay()
    assert shop.worker.run_until_idle() == 1
    assert result.state is State.PENDING
    assert shop.worker.advance(29.9) == 0
    assert shop.worker.advance(0.2) == 1
    assert counts == [1, 2]
    assert result.get() is None


def test_a_message_that_loses_every_worker_ends_among_the_dead(shop: Shop) -> None:
    result = shop.add.delay(1, 1)
    for seconds in (0, 30, 30, 30, 30):
        shop.worker.crash_next(whole_worker=True)
        assert shop.worker.advance(seconds) == 1
    assert len(shop.seen) == 5
    assert shop.worker.advance("1h") == 0
    assert "max_deliveries" in (shop.worker.dead()[0].reason or "")
    assert result.failed()


def test_a_revoked_task_never_runs(shop: Shop) -> None:
    result = shop.add.options(countdown=60).delay(1, 1)
    result.revoke()
    assert shop.worker.advance("2m") == 0
    with pytest.raises(TaskRevoked):
        result.get()


def test_an_endless_loop_of_tasks_is_told(shop: Shop) -> None:
    shop.forever.delay()
    with pytest.raises(DrayError, match=r"100 runs and no end; the last ones were of .*forever"):
        shop.worker.run_until_idle(limit=100)


def test_hooks_are_called() -> None:
    calls: list[str] = []

    class Listener:
        @hookimpl
        def task_succeeded(self, task: str) -> None:
            calls.append(task)

    app = Dray(config={})
    app.hook(Listener())
    app.task(name="t")(lambda: None)
    with InlineWorker(app) as worker:
        app.send_task("t")
        worker.run_until_idle()
    assert calls == ["t"]


def test_closing_the_app_under_test_loses_nothing(shop: Shop) -> None:
    with shop.app:
        result = shop.add.delay(1, 1)
    assert shop.worker.run_until_idle() == 1
    assert result.get() == 2


def test_in_an_async_test(shop: Shop) -> None:
    async def body() -> list[int]:
        result = await shop.later.adelay(3)
        shop.worker.run_until_idle()
        return [await result.aget(), await (await shop.later.adelay(4)).aget(timeout=5)]

    assert asyncio.run(body()) == [3, 4]
    with pytest.raises(ResultTimeout):
        asyncio.run(shop.app.result("task-0").aget(timeout=1))


def test_an_eta_of_the_real_clock_fits(shop: Shop) -> None:
    shop.add.apply_async((1, 1), eta=datetime.now(UTC) + timedelta(hours=1))
    assert shop.worker.run_until_idle() == 0
    assert shop.worker.advance("61m") == 1


def test_the_same_seed_and_start_give_the_same_run(tmp_path: Path) -> None:
    def once() -> list[Run]:
        shop = Shop(tmp_path)
        shop.worker = InlineWorker(shop.app, start=2e9, seed=7)
        with shop.worker as worker:
            jittery = shop.app.task(name="j", retry=Retry(on=ZeroDivisionError, max=3))(lambda: 1 // 0)
            jittery.delay()
            shop.tick.delay(3)
            worker.advance("1d")
            return worker.runs

    assert once() == once()


def test_afterwards_the_app_is_as_before(tmp_path: Path) -> None:
    app = Dray(config={"transport": "memory", "backend": "memory"})
    add = app.task(name="add")(lambda x, y: x + y)
    before = app.connect()
    real = add.delay(1, 1)
    with InlineWorker(app) as worker:
        assert add.delay(2, 2).get() == 4
        assert worker.run_until_idle() == 0
    assert app.connect() is before
    assert real.state is State.PENDING


def test_without_results_get_says_so_as_in_production() -> None:
    app = Dray(config={"backend": "null"})
    add = app.task(name="add")(lambda x, y: x + y)
    with InlineWorker(app) as worker, pytest.raises(NoResults):
        add.delay(1, 1).get()
    assert worker.runs == []


def test_the_configured_signature_is_used(tmp_path: Path) -> None:
    app = Dray(config={"serializer": {"use": "signed", "algorithm": "hmac", "keys": {"one": "k" * 40}}})
    add = app.task(name="add")(lambda x, y: x + y)
    with InlineWorker(app) as worker:
        add.delay(1, 2)
        (message,) = app.transport.peek("default", 1)  # type: ignore[attr-defined]
        assert message.headers["sig"].startswith("one:")
        assert worker.queued()[0].args == [1, 2]
        assert worker.run_until_idle() == 1


def test_an_error_class_that_is_not_registered_comes_as_task_failed(shop: Shop) -> None:
    class Odd(Exception):
        pass

    @shop.app.task(name="odd")
    def odd() -> None:
        raise Odd("!")

    with pytest.raises(TaskFailed):
        odd.delay().get()


# --- the pytest plugin -------------------------------------------------------------------------------------

APP = """
from dray import Dray
app = Dray(config={"transport": "nowhere://h", "backend": "nowhere"})

@app.task
def add(x: int, y: int) -> int:
    return x + y
"""
TESTS = """
from shop import add

def test_one(dray_worker):
    assert add.delay(2, 3).get() == 5

def test_two(dray_worker, dray_app):
    assert dray_worker.queued() == [] and dray_worker.app is dray_app
    add.options(countdown=60).delay(2, 3)
    assert dray_worker.advance("1m") == 1
"""
PLUGIN = "dray.testing.pytest_plugin"
REGISTERED = any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))


def run(pytester: pytest.Pytester, ini: str) -> pytest.RunResult:
    pytester.makepyfile(shop=APP)
    pytester.makeini(f"[pytest]\npythonpath = .\naddopts = {'' if REGISTERED else '-p ' + PLUGIN}\n{ini}")
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=60)


def test_the_fixtures_find_the_app_through_the_ini_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_shop=TESTS)
    run(pytester, "dray_app = shop:app").assert_outcomes(passed=2)


def test_the_app_fixture_can_be_overridden(pytester: pytest.Pytester) -> None:
    own = "import pytest, shop\n\n@pytest.fixture\ndef dray_app():\n    return shop.app\n"
    pytester.makepyfile(test_shop=own + TESTS)
    run(pytester, "").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("ini", "message"),
    [
        ("", "*which app? Set `dray_app = module:app`*"),
        ("dray_app = shop:nothing", "*dray_app = shop:nothing: module 'shop' has no attribute 'nothing'*"),
        ("dray_app = nowhere:app", "*dray_app = nowhere:app: No module named 'nowhere'*"),
        ("dray_app = shop:add", "*this is a Task, not a Dray app*"),
    ],
)
def test_a_missing_or_wrong_app_is_explained(pytester: pytest.Pytester, ini: str, message: str) -> None:
    pytester.makepyfile(test_shop=TESTS)
    result = run(pytester, ini)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(message)


def test_who_does_not_use_the_fixtures_pays_little() -> None:
    code = (
        f"import sys, pytest; before = set(sys.modules); import {PLUGIN};"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith(('dray.plugins', 'dray.testing', 'yaml'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['dray.testing', 'dray.testing.pytest_plugin']"


def test_the_app_gives_its_own_driver() -> None:
    app = Dray()

    @app.task(name="double")
    def double(n: int) -> int:
        return 2 * n

    with app.testing() as worker:
        result = double.options(countdown=3600).delay(4)
        assert worker.run_until_idle() == 0
        worker.advance("1h")
        assert result.get() == 8
