"""Tasks: names, options, arguments checked at the call, and what a type checker makes of them."""

from __future__ import annotations

import asyncio
import functools
import re
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.errors import ConfigError, EncodeError, InvalidArguments, InvalidName, UnknownTask
from dray.core.registry import Registry, import_modules
from dray.core.task import (
    NO_OPTIONS,
    CallOptions,
    Signature,
    TaskOptions,
    call_options,
    check_id,
    check_name,
    task_name,
)
from tests.parts import Sent, make_task


def add(x: int, y: int = 0) -> int:
    """Adds."""
    return x + y


def keyword_only(x: int, *, y: int, z: int = 0) -> None: ...


def anything(*args: Any, **kwargs: Any) -> None: ...


def positional(x: int, /, y: int) -> None: ...


async def fetch(url: str) -> str:
    return url


# --- names -------------------------------------------------------------------------------------------------


def test_a_task_is_named_after_its_module_and_function() -> None:
    class Holder:
        @staticmethod
        def inner() -> None: ...

    assert task_name(add) == f"{__name__}.add"
    name = "test_a_task_is_named_after_its_module_and_function.Holder.inner"
    assert task_name(Holder.inner) == f"{__name__}.{name}"


@pytest.mark.parametrize(
    ("main", "name"),
    [
        ({"__file__": "/srv/shop/tasks.py", "__spec__": None}, "tasks.job"),
        ({"__spec__": types.SimpleNamespace(name="shop.tasks")}, "shop.tasks.job"),
        ({"__spec__": types.SimpleNamespace(name="shop.__main__")}, "shop.job"),
        ({"__spec__": None}, "__main__.job"),
    ],
)
def test_a_script_s_tasks_are_named_as_the_worker_imports_them(
    monkeypatch: pytest.MonkeyPatch, main: dict[str, Any], name: str
) -> None:
    module = types.ModuleType("__main__")
    vars(module).update(main)
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec("def job(): ...", vars(module))
    assert task_name(module.job) == name


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="lambda has no name"):
        task_name(lambda: None)


@pytest.mark.parametrize("name", ["", "a\0", "a\nb", "x" * 201, "\x7f", "\ud800", None, 3])
def test_names_that_no_store_can_be_trusted_with_are_refused(name: Any) -> None:
    with pytest.raises(InvalidName, match="printable"):
        check_name("queue", name)


@pytest.mark.parametrize("task_id", ["", "é", "x" * 256, "a\tb", 7, b"id"])
def test_ids_are_short_printable_ascii(task_id: Any) -> None:
    with pytest.raises(InvalidName, match="task_id"):
        check_id(task_id)


def test_ordinary_names_are_fine() -> None:
    for name in ("a", "shop.mail", "日本", "x" * 200, "two words"):
        check_name("task", name)
    check_id("x" * 255)


# --- arguments ---------------------------------------------------------------------------------------------

CALLS = [
    (add, (1,), {}, True),
    (add, (1, 2), {}, True),
    (add, (), {"x": 1}, True),
    (add, (), {}, False),
    (add, (1, 2, 3), {}, False),
    (add, (1,), {"x": 1}, False),
    (add, (1,), {"z": 1}, False),
    (add, (1,), {3: 4}, False),
    (keyword_only, (1,), {"y": 2}, True),
    (keyword_only, (1,), {}, False),
    (keyword_only, (1, 2), {}, False),
    (anything, (), {}, True),
    (anything, tuple(range(100)), {"a": 1}, True),
    (positional, (1,), {"y": 2}, True),
    (positional, (), {"x": 1, "y": 2}, False),
    (fetch, ("u",), {}, True),
]


@pytest.mark.parametrize(("fn", "args", "kwargs", "fits"), CALLS)
def test_arguments_are_checked_at_the_call(fn: Any, args: Any, kwargs: Any, fits: bool) -> None:
    task = make_task(fn)
    if fits:
        task.bind(args, kwargs)
    else:
        with pytest.raises(InvalidArguments, match=rf"^{fn.__name__}\("):
            task.bind(args, kwargs)


@given(st.integers(0, 5), st.sets(st.sampled_from("xyzw")))
def test_the_short_cut_agrees_with_python(count: int, names: set[str]) -> None:
    args, kwargs = tuple(range(count)), dict.fromkeys(names, 0)
    for fn in (add, keyword_only, anything, positional):
        task = make_task(fn)
        try:
            task.signature.bind(*args, **kwargs)
        except TypeError:
            with pytest.raises(InvalidArguments):
                task.bind(args, kwargs)
        else:
            task.bind(args, kwargs)


# --- calling -----------------------------------------------------------------------------------------------


def test_calling_a_task_runs_it_here() -> None:
    assert make_task(add)(2, y=3) == 5
    assert asyncio.run(make_task(fetch)("u")) == "u"
    assert make_task(fetch).is_async
    assert not make_task(add).is_async


def test_a_task_looks_like_its_function() -> None:
    task = make_task(add, "shop.add")
    assert (task.__name__, task.__doc__, task.__module__, task.__wrapped__) == ("add", "Adds.", __name__, add)
    assert repr(task) == "<task shop.add>"


def test_each_way_to_call_sends_the_same() -> None:
    task = make_task(add)
    sender = task.sender
    assert isinstance(sender, Sent)
    task.delay(1, y=2)
    task.apply_async((1,), {"y": 2})
    task.apply_async([1], {"y": 2})  # type: ignore[arg-type]
    task.s(1, y=2).delay()
    task.options().delay(1, y=2)
    asyncio.run(task.adelay(1, y=2))
    asyncio.run(task.options().adelay(1, y=2))
    assert sender.calls == [(task, (1,), {"y": 2}, NO_OPTIONS)] * 7


def test_options_travel_with_the_call() -> None:
    task = make_task(add)
    options = CallOptions(countdown=5, queue="slow")
    assert isinstance(task.sender, Sent)
    task.apply_async((1,), countdown=5, queue="slow")
    task.options(countdown=5).options(queue="slow").delay(1)
    assert [call[3] for call in task.sender.calls] == [options, options]
    assert task.options(countdown=5, queue="slow").s(1) == Signature(task, (1,), {}, options)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"), [("countdwon", "did you mean 'countdown'"), ("retries", "'retry'"), ("zzz", "there are: queue")]
)
def test_an_unknown_option_names_the_nearest(name: str, hint: str) -> None:
    for call in (call_options, lambda given: make_task(add).options(queue="q").options(**given)):
        with pytest.raises(ConfigError, match=f"unknown call option '{name}'.*{hint}"):
            call({name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 10},
        {"priority": -1},
        {"priority": True},
        {"priority": 1.0},
        {"soft_time_limit": 0},
        {"time_limit": -1},
        {"time_limit": float("nan")},
        {"time_limit": "5s"},
        {"expires": "tomorrow"},
        {"countdown": True},
        {"result_expires": "2h"},
        {"retry": 3},
        {"countdown": 1, "eta": 5},
    ],
    ids=repr,
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        CallOptions(**options)
    if not options.keys() & {"countdown", "eta"}:
        with pytest.raises(ConfigError, match=next(iter(options))):
            TaskOptions(**options)


def test_names_in_options_are_checked() -> None:
    for options in ({"queue": "a\0"}, {"task_id": ""}, {"task_id": "ü"}):
        with pytest.raises(InvalidName):
            CallOptions(**options)  # type: ignore[arg-type]


def test_times_may_be_timedeltas() -> None:
    CallOptions(countdown=timedelta(hours=1), expires=timedelta(days=1), result_expires=timedelta(1))


@pytest.mark.parametrize("headers", [{"k": 1}, {1: "v"}, {"k\n": "v"}, {"ü": "v"}, {"k": "\0"}, {"k": "\ud800"}])
def test_headers_that_no_store_can_keep_are_refused(headers: Any) -> None:
    with pytest.raises(EncodeError, match="headers"):
        make_task(add, headers=headers)


# --- registry ----------------------------------------------------------------------------------------------


def test_a_name_belongs_to_one_function() -> None:
    registry = Registry()
    registry.add(make_task(add, "job"))
    registry.add(make_task(add, "job"))  # the module was imported a second time
    assert len(registry) == 1
    with pytest.raises(ConfigError, match=r"two tasks are named 'job'.*test_task\.py:\d+"):
        registry.add(make_task(fetch, "job"))


def test_an_unknown_task_names_the_nearest() -> None:
    registry = Registry()
    with pytest.raises(UnknownTask, match="imports"):
        registry["shop.mail"]
    registry.add(make_task(add, "shop.mail"))
    assert registry["shop.mail"].name == "shop.mail"
    with pytest.raises(UnknownTask, match=r"did you mean 'shop\.mail'"):
        registry["shop.mial"]
    with pytest.raises(UnknownTask, match=r"known: shop\.mail"):
        registry["zzzz"]


def test_modules_are_imported_from_the_configuration_s_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "dray_t_jobs.py").write_text("done = True\n")
    (tmp_path / "dray_t_broken.py").write_text("import dray_t_not_there\n")
    import_modules(["dray_t_jobs"], tmp_path)
    assert sys.modules.pop("dray_t_jobs").done
    with pytest.raises(ConfigError, match="no module 'dray_t_missing'"):
        import_modules(["dray_t_missing"], tmp_path)
    with pytest.raises(ModuleNotFoundError, match="dray_t_not_there"):
        import_modules(["dray_t_broken"], tmp_path)


def test_a_decorated_function_keeps_its_name() -> None:
    @functools.wraps(add)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return add(*args, **kwargs)

    assert task_name(wrapper) == f"{__name__}.add"
    with pytest.raises(InvalidArguments):
        make_task(wrapper).bind((), {})


# --- types -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="one version of Python is enough for the type checker")
def test_a_type_checker_knows_what_tasks_take_and_give(tmp_path: Path) -> None:
    file = Path(__file__).with_name("typed_api.py")
    lines = file.read_text().splitlines()
    expected = {
        (number, match[1]) for number, line in enumerate(lines, 1) if (match := re.search(r"# error: ([\w-]+)", line))
    }
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", f"--cache-dir={tmp_path}"]
    run = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, timeout=110, cwd=file.parents[1], check=False
    )
    found = re.findall(r"typed_api\.py:(\d+): error: .*\[([\w-]+)\]", run.stdout)
    assert {(int(number), kind) for number, kind in found} == expected, run.stdout + run.stderr
