"""The command line: finding the application, every command, and errors that help instead of tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dray.cli import COMMANDS, cli, dead
from dray.core.message import Action, DeadLetter, Outgoing, Settlement

TASKS = """\
from dray import Dray

app = Dray()


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def login(user: str, password: str) -> str:
    return user


@app.task(name="elsewhere.add")
def add_elsewhere(x: int, y: int) -> int:
    return x - y


@app.task
def fail(text: str) -> None:
    raise ValueError(text)
"""
MODULES = {
    "two.py": "from dray import Dray\none = Dray()\nother = Dray()\n",
    "empty.py": "nothing = 1\n",
    "broken.py": "def helper():\n    raise RuntimeError('the database of users is gone')\n\nhelper()\n",
    "syntax.py": "def f(:\n",
    "quits.py": "raise SystemExit(3)\n",
    "needs.py": "import no_such_driver\n",
    "early.py": "from dray import Dray\napp = Dray()\napp.config\n",
    "pooled.yaml": "workers: {default: {pool: solo}}\n",
    "bad.yaml": "transprot: sqlite\n",
    "workers.yaml": "imports: [shop]\nworkers: {mail: {queues: [mail]}, web: {}}\n",
    "no_results.yaml": "transport: sqlite\n",
    "nowhere.yaml": "imports: [no_such_module]\n",
}
Dray = Callable[..., Result]


@pytest.fixture
def dray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dray]:
    """Runs a command in a folder with the modules above; ``shop`` is a sound one."""
    (tmp_path / "shop.py").write_text(TASKS)
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def run(*words: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(cli, list(words), input=answer)

    yield run
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def output(result: Result) -> Any:
    """What a command that went well printed as JSON."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def call(dray: Dray, *words: str) -> str:
    """Queue a task; its id."""
    result = dray("call", "shop:app", *words)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def ready(dray: Dray) -> int:
    """How many messages are ready."""
    return sum(row["ready"] for row in output(dray("queues", "--json")))


def run_one(*, dead: bool = False) -> None:
    """Stand in for a worker: take one message, and acknowledge it or put it aside."""
    app = sys.modules["shop"].app
    consumer = app.transport.consumer(["default"], 1)
    (delivery,) = consumer.receive(1, 5)
    if dead:
        app.transport.settle([Settlement(delivery, Action.DEAD, (), "it was tired")])
    else:
        outcome = app.worker()._parts.executor.run(delivery, Slot())
        app.backend.store([outcome.result])
        app.transport.settle([outcome.settlement])
    consumer.close()


class Slot:
    def begin(self, *_: object) -> None: ...
    def end(self) -> None: ...
    def report(self, _: object) -> None: ...


# --- errors ------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, list[str], list[str]]] = [
    ("no command of that name", ["cal"], ["no command 'cal'", "did you mean 'call'?"]),
    ("no such option", ["queues", "--jsn"], ["--jsn", "--json"]),
    ("no application", ["call", "add", "1"], ["which application?", "tasks:app", "imports"]),
    ("no application for a worker", ["worker"], ["which application?", "imports"]),
    ("unknown module", ["call", "shpo:app", "add"], ["no module 'shpo'", "did you mean 'shop'?"]),
    ("unknown module of a package", ["call", "shop.sub:app", "add"], ["no module 'shop.sub'"]),
    ("a file instead of a module", ["call", "shop.py:app", "add"], ["is a file", "shop:app"]),
    ("no module's name", ["call", "sh op:app", "add"], ["no module's name", "tasks:app"]),
    ("unknown attribute", ["call", "shop:ap", "add"], ["shop has no 'ap'", "did you mean 'app'?"]),
    ("not an application", ["call", "empty:nothing", "add"], ["is no Dray application but an int"]),
    ("no application in it", ["queues", "--app", "empty"], ["no Dray application in empty", "app = Dray()"]),
    ("several applications", ["queues", "--app", "two"], ["two:one", "two:other", "say which"]),
    ("a module that raises", ["worker", "broken:app"], ["RuntimeError: the database of users is gone", "broken.py"]),
    ("a module with a typo", ["worker", "syntax:app"], ["importing syntax failed", "SyntaxError", "line 1"]),
    ("a module that exits", ["worker", "quits:app"], ["importing quits failed", "SystemExit: 3"]),
    ("a module that lacks another", ["worker", "needs:app"], ["importing needs failed", "no_such_driver"]),
    ("an import that is not there", ["worker", "--config", "nowhere.yaml"], ["no module 'no_such_module'"]),
    ("--config too late", ["queues", "-A", "early:app", "--config", "pooled.yaml"], ["comes too late", "early:app"]),
    ("no such configuration", ["queues", "--config", "absent.yaml"], ["absent.yaml"]),
    ("unknown key", ["queues", "--config", "bad.yaml"], ["bad.yaml:1", "transprot", "did you mean 'transport'?"]),
    ("no worker of that name", ["worker", "-A", "shop", "mial"], ["no worker 'mial'"]),
    ("nearest worker", ["worker", "-A", "shop", "--config", "workers.yaml", "wbe"], ["did you mean 'web'?"]),
    ("neither module nor worker", ["worker", "empty"], ["no Dray application in empty", "nor is there a worker"]),
    ("no such pool", ["worker", "shop:app", "--pool", "prefrok"], ["no plugin 'prefrok'", "did you mean 'prefork'?"]),
    ("size 0", ["worker", "shop:app", "--size", "0"], ["--size", "0 is not in the range"]),
    ("a negative size", ["worker", "shop:app", "--size", "-2"], ["--size", "-2 is not in the range"]),
    ("a size for solo", ["worker", "shop:app", "--pool", "solo", "--size", "2"], ["--size", "unknown key"]),
    ("no such level", ["worker", "shop:app", "--log-level", "loud"], ["loud", "info"]),
    ("no task named", ["call", "shop:app"], ["which task?"]),
    ("unknown task", ["call", "shop:app", "ad", "1"], ["no task 'ad'", "did you mean 'add'"]),
    ("unknown dotted task", ["call", "shop:app", "shop.logn"], ["no task 'shop.logn'", "did you mean 'shop.login'?"]),
    ("arguments that don't fit", ["call", "shop:app", "shop.add", "1"], ["shop.add", "missing a required argument"]),
    ("bad JSON", ["call", "shop:app", "shop.add", "--kwargs", "{x: 1}"], ["--kwargs", "not JSON", "column 2"]),
    ("JSON that is no object", ["call", "shop:app", "shop.add", "--kwargs", "[1]"], ["--kwargs", "object"]),
    ("NaN", ["call", "shop:app", "shop.add", "--kwargs", '{"x": NaN}'], ["--kwargs", "NaN"]),
    ("a negative time", ["call", "shop:app", "shop.add", "1", "2", "--countdown", "-5"], ["--countdown", "-5"]),
    ("no time", ["call", "shop:app", "shop.add", "1", "2", "--countdown", "soon"], ["--countdown", "soon", '"5m"']),
    ("priority 10", ["call", "shop:app", "shop.add", "1", "2", "--priority", "10"], ["--priority", "0<=x<=9"]),
    ("an id with a line break", ["revoke", "a\nb"], ["task_id", "printable"]),
    ("a queue that is not there", ["purge", "defualt"], ["no queue 'defualt'"]),
    ("no dead letters named", ["dead", "requeue"], ["--all", "--queue"]),
    ("too many ways", ["dead", "purge", "x", "--all"], ["one of the three"]),
    ("limit 0", ["dead", "list", "--limit", "0"], ["--limit"]),
    ("no such kind of plugin", ["plugins", "brokers"], ["brokers", "transports"]),
    ("an invalid configuration", ["config", "check", "--config", "bad.yaml"], ["bad.yaml:1"]),
    ("a folder that is not there", ["demo", "no-such-folder"], ["no-such-folder is no folder"]),
    ("a folder without Python", ["demo", "sub"], ["no Python file under sub"]),
    ("size 0 of the demo", ["demo", "--size", "0"], ["--size"]),
    ("no tasks to measure", ["bench", "--tasks", "-1"], ["--tasks"]),
    ("no such transport", ["bench", "--transport", "sqlit"], ["sqlit", "did you mean 'sqlite'?"]),
    ("a keyword as a module", ["new", "task-module", "class"], ["'class' cannot be a module's name"]),
    ("a module that would be hidden", ["new", "task-module", "json"], ["would hide"]),
    ("no such kind to write", ["new", "plugin", "queue", "x"], ["queue", "transport"]),
    ("no plugin's name", ["new", "plugin", "pool", "../x"], ["cannot be a plugin's name"]),
]


@pytest.mark.parametrize(("words", "expected"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_gets_a_clear_error(dray: Dray, tmp_path: Path, words: list[str], expected: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    result = dray(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for text in expected:
        assert text in result.stderr
    assert "dray/cli" not in result.stderr, "our own frames are nobody's business"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_the_traceback(dray: Dray, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "environment":
        monkeypatch.setenv("DRAY_DEBUG", "1")
    result = dray(*(["--debug"] if by == "option" else []), "call", "shop:app", "ad")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "UnknownTask" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["call", "shop:app", "add", "1", "2", "--timeout", "10ms"], "several tasks are named 'add'"),
        (["call", "shop:app", "shop.add", "1", "2", "--timeout", "10ms"], "not there after 0.01 s"),
        (["result", "x", "--timeout", "10ms"], "not there after 0.01 s"),
        (["result", "x", "--config", "no_results.yaml"], "no results are kept"),
        (["call", "shop:app", "shop.fail", "x", "--config", "no_results.yaml", "--wait"], "no results are kept"),
        (["dead", "show", "x"], "no such dead letter: x"),
    ],
)
def test_what_fails_says_why(dray: Dray, words: list[str], text: str) -> None:
    result = dray(*words)
    assert result.exit_code in (1, 2)
    assert text in result.stderr
    assert "Traceback" not in result.stderr


# --- start-up ----------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_none(dray: Dray) -> None:
    script = "import sys, dray.cli; dray.cli.cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name, (module, line) in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert line in done.stdout
        assert f"dray.cli.{module} " not in done.stdout
    for heavy in ("rich", "yaml", "stevedore", "sqlite3"):
        assert f" {heavy} " not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_that_begins_as_the_list_says(dray: Dray, name: str) -> None:
    result = dray(name, "--help")
    assert result.exit_code == 0
    assert COMMANDS[name][1].rstrip(".") in " ".join(result.stdout.split())


def test_version_needs_no_rich(dray: Dray) -> None:
    result = dray("--version")
    assert result.stdout.startswith("dray 0.")


# --- calls and results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [["shop:app"], ["-A", "shop:app"], ["--app", "shop"], ["--config", "workers.yaml"]])
def test_a_call_finds_the_application(dray: Dray, target: list[str]) -> None:
    result = dray("call", *target, "shop.add", "2", "-3", "--json")
    found = output(result)
    assert found["task"] == "shop.add"
    assert ready(dray) == 1


@pytest.mark.parametrize(
    ("words", "args", "kwargs"),
    [
        (["2", "-3"], [2, -3], {}),
        (["-1.5", "-.5"], [-1.5, "-.5"], {}),
        (["[1, 2]", '{"a": null}'], [[1, 2], {"a": None}], {}),
        (["hello", "NaN"], ["hello", "NaN"], {}),
        (["true", "1e"], [True, "1e"], {}),
        (["--", "--x", "-y"], ["--x", "-y"], {}),
        (["--kwargs", '{"y": 3}', "2"], [2], {"y": 3}),
        (["-7", "--kwargs", '{"y": -1}'], [-7], {"y": -1}),
    ],
)
def test_arguments_are_json_where_they_can_be(
    dray: Dray, words: list[str], args: list[object], kwargs: dict[str, object]
) -> None:
    task_id = call(dray, "shop.add", *words)
    run_one(dead=True)
    (letter,) = output(dray("dead", "show", task_id, "--json"))
    assert letter["args"] == args
    assert letter["kwargs"] == kwargs


def test_call_options_arrive(dray: Dray) -> None:
    options = ["--queue", "slow", "--countdown", "1h", "--priority", "7", "--expires", "2h", "--id", "mine"]
    assert call(dray, "login", "ann", "secret", *options) == "mine"
    assert [(q["queue"], q["delayed"]) for q in output(dray("queues", "--json"))] == [("slow", 1)]


def test_a_result_is_shown(dray: Dray) -> None:
    task_id = call(dray, "shop.add", "2", "3")
    assert dray("result", task_id).stdout == "PENDING\n"
    run_one()
    assert dray("result", task_id).stdout == "5\n"
    assert output(dray("result", task_id, "--json")) == {"id": task_id, "state": "SUCCESS", "value": 5}
    assert output(dray("result", "nobody", "--json"))["state"] == "PENDING"


def test_a_failure_is_shown_with_its_remote_traceback(dray: Dray) -> None:
    task_id = call(dray, "fail", "no milk")
    run_one()
    result = dray("result", task_id, "--wait")
    assert result.exit_code == 1
    assert f"task {task_id}: FAILURE: ValueError: no milk" in result.stderr
    assert "raise ValueError(text)" in result.stderr
    found = json.loads(dray("result", task_id, "--json").stdout)
    assert found["state"] == "FAILURE"
    assert found["error"] == "ValueError: no milk"
    assert "shop.py" in found["traceback"]


def test_a_revoked_task_is_left_to_a_worker(dray: Dray) -> None:
    task_id = call(dray, "shop.add", "1", "2", "--countdown", "1h")
    assert ready(dray) == 0
    assert task_id in dray("revoke", task_id).stdout
    assert ready(dray) == 1, "it is due, so that a worker settles it"


# --- queues and dead letters -------------------------------------------------------------------------------


def test_queues_show_what_waits_and_purge_asks(dray: Dray) -> None:
    assert "no queues yet" in dray("queues").stdout
    for _ in range(3):
        call(dray, "shop.add", "1", "2")
    (row,) = output(dray("queues", "--json"))
    assert {key: row[key] for key in ("queue", "ready", "leased", "delayed", "dead")} == {
        "queue": "default",
        "ready": 3,
        "leased": 0,
        "delayed": 0,
        "dead": 0,
    }
    assert row["oldest_age_s"] >= 0
    assert "default" in dray("queues").stdout
    refused = dray("purge", "default", answer="n\n")
    assert refused.exit_code == 1
    assert "Delete 3 waiting messages" in refused.stderr
    assert ready(dray) == 3
    assert "3 messages deleted" in dray("purge", "default", "--yes").stdout
    assert ready(dray) == 0


def test_a_transport_of_one_process_says_so(dray: Dray, tmp_path: Path) -> None:
    (tmp_path / "memory.yaml").write_text("transport: memory\n")
    assert "are this command's own" in dray("queues", "--config", "memory.yaml").stderr


def test_dead_letters_are_listed_shown_and_requeued(dray: Dray) -> None:
    assert "no dead letters" in dray("dead", "list").stdout
    task_id = call(dray, "login", "ann", "--kwargs", '{"password": "hunter2"}')
    run_one(dead=True)
    assert "it was tired" in dray("dead", "list").stdout
    assert output(dray("dead", "list", "--queue", "other", "--json")) == []
    shown = dray("dead", "show", task_id)
    assert '["ann"]' in shown.stdout
    assert "it was tired" in shown.stdout
    assert "hunter2" not in shown.stdout
    result = dray("dead", "requeue", task_id, "nobody")
    assert "1 dead letters are queued again" in result.stdout
    assert "no such dead letter: nobody" in result.stderr
    assert result.exit_code == 1
    (row,) = output(dray("queues", "--json"))
    assert (row["ready"], row["dead"]) == (1, 0)


@pytest.mark.parametrize("which", [["--all"], ["--queue", "default"]])
def test_all_dead_letters_at_once(dray: Dray, which: list[str]) -> None:
    for _ in range(3):
        call(dray, "shop.add", "1", "2")
    for _ in range(3):
        run_one(dead=True)
    assert "3 dead letters are queued again" in dray("dead", "requeue", *which).stdout
    for _ in range(3):
        run_one(dead=True)
    assert dray("dead", "purge", *which, answer="n\n").exit_code == 1
    assert len(output(dray("dead", "list", "--json"))) == 3
    assert "3 dead letters deleted" in dray("dead", "purge", *which, "--yes").stdout
    assert output(dray("dead", "list", "--json")) == []


def test_paging_takes_each_dead_letter_once_even_if_it_dies_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "PAGE", 2)
    letters = [str(number) for number in range(7)]

    class Keeper:
        def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
            return [DeadLetter(key, "q", b"", {}, "", 0.0, 1) for key in letters[:limit]]

    taken = []
    for page in dead._pages(Keeper(), None):  # type: ignore[arg-type]
        taken += page
        again = [key for key in page if key in "024"]  # requeued, and died again: now the newest
        letters[:] = [*again, *(key for key in letters if key not in page)]
    assert sorted(taken) == [str(number) for number in range(7)]


def test_dead_letters_that_cannot_be_read_are_shown(dray: Dray) -> None:
    call(dray, "shop.add", "1", "2")
    app = sys.modules["shop"].app
    app.transport.purge("default")
    app.transport.send([Outgoing("default", "odd", b"\xff\x00", {"task": "t", "type": "json"})])
    run_one(dead=True)
    (letter,) = output(dray("dead", "show", "odd", "--json"))
    assert "2 bytes" in letter["unreadable"]


# --- plugins, configuration, doctor ------------------------------------------------------------------------


def test_plugins_are_listed(dray: Dray) -> None:
    rows = {(row["kind"], row["name"]): row for row in output(dray("plugins", "--json"))}
    assert rows["transports", "sqlite"]["features"]["durability"] == "D2"
    assert rows["transports", "sqlite"]["error"] is None
    assert rows["serializers", "pickle"]["features"]["safe"] is False
    text = dray("plugins", "transports").stdout
    assert "within one process" in text
    assert "json" not in text


def test_configuration_is_shown_with_its_origin(dray: Dray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_RESULT_EXPIRES", "2h")
    rows = {row["path"]: row for row in output(dray("config", "show", "--json", "--config", "pooled.yaml"))}
    assert rows["workers.default.pool"] == {
        "path": "workers.default.pool",
        "value": "solo",
        "origin": "pooled.yaml:1",
        "problem": None,
    }
    assert rows["result_expires"]["origin"] == "environment DRAY_RESULT_EXPIRES"
    assert rows["result_expires"]["value"] == 7200
    only_set = output(dray("config", "show", "--json", "--set", "--config", "pooled.yaml"))
    assert {row["path"] for row in only_set} >= {"workers.default.pool", "result_expires"}
    assert "default" not in {row["origin"] for row in only_set}
    assert "pooled.yaml:1" in dray("config", "show", "--config", "pooled.yaml").stdout


def test_configuration_is_checked(dray: Dray, tmp_path: Path) -> None:
    assert "fine" in dray("config", "check", "--config", "pooled.yaml").stdout
    (tmp_path / "wrong.yaml").write_text("transport: {use: sqlite, pth: x}\nworkers: {a: {pool: thread}}\n")
    result = dray("config", "check", "--config", "wrong.yaml")
    assert result.exit_code == 2
    assert "wrong.yaml:1: transport.pth" in result.stderr
    assert "did you mean 'threads'?" in result.stderr


def test_the_schema_is_printed(dray: Dray) -> None:
    assert "transport" in output(dray("config", "schema"))["properties"]


def test_doctor_uses_what_is_configured_and_cleans_up(dray: Dray) -> None:
    for _ in range(2):
        found = {row["check"]: row for row in output(dray("doctor", "--app", "shop:app", "--json"))}
        assert all(row["ok"] for row in found.values())
    assert {"configuration", "tasks", "transport", "results", "durability", "worker default"} <= set(found)
    assert "went through" in found["transport"]["detail"]
    rows = output(dray("queues", "--json"))
    assert all(row["ready"] + row["leased"] + row["delayed"] + row["dead"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("yaml", "check", "text"),
    [
        ("transprot: sqlite\n", "configuration", "did you mean 'transport'?"),
        ("transport: {use: sqlite, path: /proc/no/such/place.db}\n", "transport", "Unavailable"),
        ("require_durability: D4\n", "durability", "require_durability is D4"),
        ("workers: {default: {pool: thread}}\n", "pool thread", "did you mean 'threads'?"),
        ("imports: [broken]\n", "tasks", "the database of users is gone"),
    ],
)
def test_doctor_finds_what_is_wrong(dray: Dray, tmp_path: Path, yaml: str, check: str, text: str) -> None:
    (tmp_path / "sick.yaml").write_text(yaml)
    result = dray("doctor", "--config", "sick.yaml", "--json")
    assert result.exit_code == 1
    failed = {row["check"]: row["detail"] for row in json.loads(result.stdout) if not row["ok"]}
    assert text in failed[check]
    assert "FAILED" in dray("doctor", "--config", "sick.yaml").stdout


def test_doctor_says_when_no_results_are_kept(dray: Dray) -> None:
    found = {row["check"]: row for row in output(dray("doctor", "--config", "no_results.yaml", "--json"))}
    assert "none are kept" in found["results"]["detail"]
