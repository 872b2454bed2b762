"""Promises G4 and G8 with a real prefork worker: whatever comes, the worker lives and serves the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.project import Project

CONFIG = """
transport: sqlite
backend: sqlite
accept: [json, msgpack]
"""
HOSTILE = """
import ctypes, sys

@app.task
def exits(): os._exit(7)
@app.task
def segfaults(): ctypes.string_at(0)
@app.task
def sys_exits(): sys.exit(3)
@app.task(time_limit=0.3)
def loops():
    while True: pass
@app.task(soft_time_limit=0.2)
def soft_loops():
    while True: pass
@app.task
def closes_everything():
    os.closerange(0, 10_000)
@app.task
def forks():
    pid = os.fork()
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0)
    return "forked"
@app.task
def circular():
    value = []; value.append(value); return value
@app.task
def unserialisable(): return object()
@app.task
def huge(): return "x" * (17 * 2**20)
class Rude(Exception):
    def __repr__(self): raise RuntimeError("no repr")
    __str__ = __repr__
@app.task
def rude(): raise Rude()
@app.task
def deep():
    value = []
    for _ in range(100_000): value = [value]
    return value
"""
ENDS = {
    "exits": "WorkerLost: poison",
    "segfaults": "WorkerLost: poison",
    "sys_exits": "SystemExit: 3",
    "loops": "TimeLimitExceeded",
    "soft_loops": "SoftTimeLimitExceeded",
    "circular": "EncodeError",
    "unserialisable": "EncodeError",
    "huge": "TooLarge",
    "rude": "Rude: (its text could not be made: RuntimeError)",
    "deep": "EncodeError",
}
BODIES = {
    "empty": b"",
    "cut": b'[[1],{"a":',
    "random": bytes(range(256)),
    "deep": b"[" * 100_000,
    "huge-int": b"[[" + b"9" * 10_000 + b"],{}]",
    "nan": b"[[NaN],{}]",
    "infinite": b"[[1e999],{}]",
    "duplicate-keys": b'[[],{"n":1,"n":2}]',
    "no-list": b'{"n":1}',
    "args-no-list": b'["n",{}]',
    "wrong-arguments": b"[[1,2,3,4],{}]",
    "utf-16": "[[1],{}]".encode("utf-16"),
    "bom": b"\xef\xbb\xbf[[1],{}]",
}
HEADERS = {
    "version": {"v": "2"},
    "content-type": {"type": "pickle"},
    "no-content-type": {"type": ""},
    "msgpack-that-is-json": {"type": "msgpack"},
    "encoding": {"enc": "zlib"},
    "unknown-encoding": {"enc": "rot13"},
    "attempt": {"attempt": "-1"},
    "eta": {"expires": "soon"},
    "limit": {"soft": "nan"},
    "retry": {"retry": "[[]]"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("hostile"), CONFIG, HOSTILE)


def test_hostile_tasks_and_messages_end_with_a_reason_and_the_next_is_served(project: Project) -> None:
    send = f"""
    from dray.core.message import Outgoing
    ids = {{}}
    for name in {list(ENDS)!r} + ["forks", "closes_everything"]:
        ids[name] = app.send_task(f"tasks.{{name}}").id
    plain = {{"task": "tasks.note", "type": "json"}}
    messages = [Outgoing("default", f"body-{{k}}", body, plain) for k, body in {BODIES!r}.items()]
    messages += [Outgoing("default", f"header-{{k}}", b"[[1],{{}}]", {{**plain, **h}}) for k, h in {HEADERS!r}.items()]
    messages += [Outgoing("default", "bad\\x00id"[:3] + "\\n", b"[[1],{{}}]", {{**plain, "task": "a\\nb"}})]
    app.transport.send(messages)
    import json; print(json.dumps(ids))
    """
    ids = json.loads(project.python(send))
    expected = len(ENDS) + len(BODIES) + len(HEADERS) + 1
    with project.worker("--pool", "prefork", "--size", "2") as worker:
        count = "print(len(app.transport.dead_list(None, 1000)))"
        project.until(lambda: int(project.python(count)) >= expected, f"{expected} dead letters", 60)
        assert project.python("print(note.delay(5).get(10))") == "5", "the next message is served"
        assert worker.poll() is None
        assert "task bad" in project.log() and "\nb) is dead" not in project.log(), "a name cannot forge a log line"
        dead = json.loads(
            project.python(
                "import json; print(json.dumps({d.id: d.reason for d in app.transport.dead_list(None, 1000)}))"
            )
        )
        for name, reason in ENDS.items():
            assert dead[ids[name]].startswith(reason), (name, dead[ids[name]])
        for key, reason in dead.items():
            assert reason.strip() and "\n" not in reason, key
        assert all(f"body-{key}" in dead for key in BODIES)
        assert all(f"header-{key}" in dead for key in HEADERS)
        assert project.python(f"print(app.result({ids['forks']!r}).get(10))") == "forked"
        closed = project.python(f"print(app.result({ids['closes_everything']!r}).get(10))")
        assert closed == "None", "its process ended after it; it had finished"
        failed = project.python(f"print(app.result({ids['segfaults']!r}).state)")
        assert failed == "FAILURE"
    assert worker.returncode == 0, project.log()


def test_an_unknown_task_waits_for_a_deploy(tmp_path: Path) -> None:
    project = Project(tmp_path, "transport: sqlite\nbackend: sqlite")
    task_id = project.python("print(app.send_task('tasks.later', [4]).id)")
    with project.worker("--pool", "threads"):
        project.until(lambda: "it waits" in project.log(), "the unknown task to be met")
    with open(tmp_path / "tasks.py", "a") as file:
        file.write("\n@app.task\ndef later(n): return n + 1\n")
    with project.worker("--pool", "threads"):
        assert project.python(f"print(app.result({task_id!r}).get(20))") == "5"
