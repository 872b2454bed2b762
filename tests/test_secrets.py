"""Secrets stay secret: passwords in URLs, signing keys and arguments show up nowhere but where they belong."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dray import ConfigError, Dray
from dray.core import plugins
from dray.core.app import Connections
from dray.core.config import load
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.core.plugins import PluginChoice
from dray.core.show import show
from tests.project import Project, children

PASSWORD = "canary-password-7f3a"
KEY = "canary-key-91c2-canary-key-91c2-canary-key-91c2"
ARGUMENT = "canary-argument-e05b"
CANARIES = (PASSWORD, KEY, ARGUMENT)

VAULT = """
from dataclasses import dataclass, replace
from dray.core.contracts import Secret
from dray.plugins.transports.sqlite import SqliteTransport

class VaultTransport(SqliteTransport):
    @dataclass(frozen=True, slots=True)
    class Options(SqliteTransport.Options):
        url: Secret | None = None

    def __init__(self, options, context):
        super().__init__(replace(options, url=None), context)
        context.logger.debug("made with %r", options)
"""
CONFIG = f"""
transport: {{use: vault, url: "vault://user:{PASSWORD}@host/path"}}
backend: sqlite
serializer: {{use: signed, algorithm: hmac, keys: {{one: "{KEY}"}}}}
workers: {{default: {{pool: prefork, size: 1}}}}
result_expires: 1h
"""
TASKS = """
import json, os
from dray import hookimpl
from dray.core.hooks import NAMES

class Listener:
    "Writes down all that hooks are told."

def make(name):
    from dray.core.hooks import Specification
    import inspect
    arguments = list(inspect.signature(getattr(Specification, name)).parameters)[1:]
    scope = {"note": lambda **given: log2(name, given), "hookimpl": hookimpl}
    given = ", ".join(f"{argument}={argument}" for argument in arguments)
    exec(f"@hookimpl\\ndef {name}(self, {', '.join(arguments)}): note({given})", scope)
    return scope[name]

def log2(name, given):
    fd = os.open(HERE / "hooks.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{name} {given!r}\\n".encode())
    os.close(fd)

for name in NAMES:
    setattr(Listener, name, make(name))
app.hook(Listener())

@app.task
def echo(text: str, fail: bool = False) -> str:
    log("echo")
    if fail:
        raise RuntimeError("on purpose")
    return text

@app.task(retry=Retry(on=OSError, max=1, delay=0, jitter=0))
def again(text: str) -> None:
    log("again")
    raise OSError("again")

@app.task
def die(text: str) -> None:
    log("die")
    os._exit(1)

@app.task(time_limit=0.2)
def hang(text: str) -> None:
    log("hang")
    time.sleep(60)

@app.task(validate=True)
def strict(n: int) -> None: ...
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "vault.py").write_text(VAULT)
    info = tmp_path / "vault-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vault\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dray.transports]\nvault = vault:VaultTransport\n")
    project = Project(tmp_path, CONFIG, TASKS)
    project.env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return project


def leaked(text: str) -> list[str]:
    """The lines in which a canary sings."""
    return [line for line in text.splitlines() if any(canary in line for canary in CANARIES)]


def dray(project: Project, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dray", *arguments],
        cwd=project.folder,
        env={**project.env, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def dead_letters(project: Project) -> Iterator[list[str]]:
    """A worker at its most talkative that has met everything that can go wrong with a task."""
    ids = project.python(
        f"""
        secret = {ARGUMENT!r}
        calls = [echo.delay(secret, fail=True), again.delay(secret), die.delay(secret), hang.delay(secret)]
        calls.append(echo.delay(secret))
        print(*[call.id for call in calls])
        """
    ).split()
    with project.worker("--log-level", "debug") as worker:
        project.until(lambda: project.runs() >= Counter(echo=2, again=2, die=3, hang=1), "all runs")
        project.until(lambda: len(json.loads(dray(project, "dead", "list", "--json"))) == 4, "four dead letters")
        found = [*children(worker), psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                assert leaked("\n".join(process.cmdline())) == []
                assert leaked("\n".join(f"{k}={v}" for k, v in process.environ().items())) == []
        yield ids
        worker.send_signal(signal.SIGTERM)
        worker.wait(20)


def test_no_log_no_hook_no_process_list_tells(project: Project) -> None:
    with dead_letters(project) as ids:
        for command in (["dead", "list"], ["dead", "list", "--json"], ["queues"], ["result", ids[0]]):
            assert leaked(dray(project, *command)) == [], command
        shown = dray(project, "dead", "show", ids[0])
        assert ARGUMENT in shown  # the user asked for it
        assert PASSWORD not in shown
        assert KEY not in shown
    log, hooks = project.log(), (project.folder / "hooks.log").read_text()
    assert "made with VaultTransport.Options(" in log
    assert "on purpose" in log
    assert {line.split()[0] for line in hooks.splitlines()} >= {"task_started", "task_failed", "task_dead", "enqueue"}
    assert leaked(log) == []
    assert leaked(hooks) == []


@pytest.mark.parametrize(
    "command",
    [
        ["config", "show"],
        ["config", "show", "--json"],
        ["config", "show", "--set"],
        ["config", "check"],
        ["doctor"],
        ["doctor", "--json"],
        ["plugins"],
        ["queues", "--json"],
    ],
)
def test_no_command_tells(project: Project, command: list[str]) -> None:
    text = dray(project, *command)
    assert text.strip()
    assert "Traceback" not in text
    assert leaked(text) == []


@pytest.mark.parametrize(
    "config",
    [
        f"transport: nowhere://user:{PASSWORD}@host/",
        f"transport: {{use: vault, url: 'vault://u:{PASSWORD}@h', lease: soon}}",
        f"transport: {{use: vault, url: ['vault://u:{PASSWORD}@h']}}",
        f"transport: {{use: sqlite, url: 'vault://u:{PASSWORD}@h'}}",
        f"transport: ['vault://u:{PASSWORD}@h']",
        f"transport: {{url: 'u:{PASSWORD}@h'}}",
        f"transport: 'sqlite://u:{PASSWORD}@h'",
        f"backend: redis://:{PASSWORD}@h",
        f"serializer: {{use: signed, algorithm: hmac, keys: {{one: short-{PASSWORD}}}, signing_key: two}}",
        f"serializer: {{use: signed, algorithm: hmac, keys: [{KEY}]}}",
        f"serializer: {{use: signed, algorithm: hmac, keys: {{one: [{KEY}]}}}}",
        f"serializer: {{use: signed, algorithm: hmac, keys: {{one: 'base64:{PASSWORD}!'}}}}",
        f"serializer: {{use: signed, algorithm: ed25519, private_key: {KEY}}}",
        f"serializer: {{use: signed, algorithm: x509, private_key: {KEY}, certificate: x}}",
        f"serializer: {{use: signed, algorithm: hmacc, keys: {{one: {KEY}}}}}",
        f"backend: {{use: memory, password: {PASSWORD}}}",
        f"hooks: [{{use: nothing, token: {KEY}}}]",
    ],
)
def test_no_error_about_a_setting_tells(project: Project, config: str) -> None:
    (project.folder / "dray.yaml").write_text(config + "\n")
    for command in (["config", "check"], ["config", "show", "--json"], ["doctor"], ["worker", "tasks:app"]):
        text = dray(project, *command)
        assert "Traceback" not in text, command
        assert leaked(text) == [], command


def test_no_error_from_the_environment_tells(project: Project) -> None:
    (project.folder / "dray.yaml").write_text("backend: memory\n")
    project.env["DRAY_TRANSPORT"] = f"nowhere://user:{PASSWORD}@host/"
    text = dray(project, "config", "check")
    assert "nowhere" in text
    assert leaked(text) == []


def signed_app() -> Dray:
    return Dray(
        config={
            "transport": {"use": "memory"},
            "backend": "memory",
            "serializer": {"use": "signed", "algorithm": "hmac", "keys": {"one": KEY}},
        }
    )


def test_no_repr_tells() -> None:
    app = signed_app()
    task = app.task(name="echo")(lambda text: text)
    result = task.delay(ARGUMENT)
    bound, connections = task.options(headers={"h": "1"}), app.connect()
    (delivery,) = connections.transport.consumer(["default"], 1).receive(1, 0)
    settlement = Settlement(delivery, Action.DEAD, (), "why")
    stored = StoredResult("id", State.SUCCESS, ARGUMENT.encode(), None)
    connections.transport.settle([settlement])
    things: list[object] = [
        app, app.config, app.config.serializer, app.config.transport, app.codec, app.codec.signer,
        connections, *connections, task, bound, task.s(ARGUMENT), bound.s(text=ARGUMENT), result,
        app.send_many([task.s(ARGUMENT)]), delivery, settlement, stored,
        Outgoing("q", "i", ARGUMENT.encode(), {}), connections.transport.dead_list(None, 1),  # type: ignore[attr-defined]
        *vars(app.codec.signer).values(),
    ]  # fmt: skip
    assert isinstance(connections, Connections)
    assert isinstance(delivery, Delivery)
    for thing in things:
        assert leaked(repr(thing)) == [], type(thing)
        assert leaked(str(thing)) == [], type(thing)


def test_a_choice_with_a_password_in_its_url_does_not_tell() -> None:
    config = load({"transport": f"nowhere://user:{PASSWORD}@host/"}, environ={}, cwd=Path("/"))
    for thing in (config, config.transport, config.transport.where, show(config)):
        assert leaked(repr(thing)) == []
    with pytest.raises(ConfigError) as caught:
        Dray(config={"transport": f"nowhere://user:{PASSWORD}@host/"}).connect()
    assert leaked(str(caught.value)) == []


def test_an_option_that_is_secret_has_no_telling_repr_whatever_its_author_did() -> None:
    signed = plugins.configure(
        "serializers", PluginChoice("signed", {"algorithm": "hmac", "keys": {"one": KEY}, "private_key": PASSWORD})
    )[1]
    assert signed.keys["one"] == KEY
    assert leaked(repr(signed) + repr(signed.keys) + repr(signed.private_key)) == []


@pytest.mark.parametrize(
    "call",
    [
        "echo.delay(object(), SECRET)",
        "echo.delay(SECRET, SECRET, SECRET, SECRET)",
        "echo.delay(SECRET, **{'no': SECRET})",
        "echo.delay({SECRET, lambda: SECRET})",
        "echo.delay({(SECRET,): SECRET})",
        "echo.delay([SECRET, float('nan')])",
        "echo.delay([SECRET + chr(0xd800)])",
        "strict.delay(SECRET)",
        "echo.delay(SECRET * 10_000_000)",
        "app.send_task('tasks.strict', (SECRET,))",
    ],
)
def test_no_error_of_a_call_tells(project: Project, call: str) -> None:
    body = textwrap.dedent(
        f"""
        SECRET = {ARGUMENT!r}
        try:
            {call}
        except Exception as error:
            text = ""
            while error is not None:
                text, error = text + type(error).__name__ + str(error) + repr(error), error.__cause__
            print(text)
        """
    )
    text = project.python(body)
    assert text
    assert leaked(text) == []


def test_this_test_would_see_a_leak() -> None:
    assert leaked(f"a\nx {KEY} y\nb") == [f"x {KEY} y"]
    assert leaked(repr({"a": ARGUMENT})) != []
