"""Stopping warm and cold, and several workers under one supervisor, with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.project import Project, stop

TWO = """
transport: sqlite
backend: sqlite
workers:
  first: {queues: [default], pool: threads, size: 2}
  second: {queues: [mail], pool: solo}
"""
NAPS = """
@app.task
def nap(seconds: float) -> str:
    log("nap")
    time.sleep(seconds)
    log("woke")
    return "woke"
"""


def workers(process: psutil.Process) -> dict[str, psutil.Process]:
    """The supervised workers by name."""
    found = {}
    for child in process.children():
        with contextlib.suppress(psutil.Error):  # it may end while it is looked at
            arguments = child.cmdline()
            found.update((name, child) for name in ("first", "second") if name in arguments)
    return found


def test_a_supervisor_restarts_what_dies_and_stops_all_warm(tmp_path: Path) -> None:
    project = Project(tmp_path, TWO)
    process = project.start()
    supervisor = psutil.Process(process.pid)
    try:
        assert project.python("print(note.delay(1).get(20), note.options(queue='mail').delay(2).get(20))") == "1 2"
        old = workers(supervisor)["second"]
        old.kill()
        project.until(lambda: workers(supervisor).get("second", old).pid != old.pid, "a new worker")
        assert project.python("print(note.options(queue='mail').delay(3).get(20))") == "3"
        children = supervisor.children(recursive=True)
    finally:
        code = stop(process)
    assert code == 0, project.log()
    assert not [child for child in children if child.is_running()]


def test_workers_stop_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    project = Project(tmp_path, TWO)
    process = project.start()
    assert project.python("print(note.delay(1).get(20), note.options(queue='mail').delay(2).get(20))") == "1 2"
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, project.log()


def test_a_mistake_in_the_configuration_is_not_tried_again(tmp_path: Path) -> None:
    project = Project(tmp_path, TWO.replace("pool: solo", "pool: solo, sise: 3"))
    process = project.start()
    assert process.wait(20) == 2
    assert "sise" in project.log()


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_a_cold_stop_gives_back_what_runs_and_exits_with_3(tmp_path: Path, pool: str) -> None:
    project = Project(tmp_path, "transport: sqlite\nbackend: sqlite", NAPS)
    task_id = project.python("print(nap.delay(60).id)")
    process = project.start("--pool", pool)
    children: list[psutil.Process] = []
    try:
        project.until(lambda: project.runs()["nap"] == 1, "the nap to begin")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        project.until(lambda: "warm stop" in project.log(), "the warm stop")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 3, project.log()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    stats = project.python("print(app.transport.stats(['default'])['default'].ready)")
    assert stats == "1", f"task {task_id} is given back at once"
    assert project.python("print(app.transport.consumer(['default'], 1).receive(1, 0)[0].delivery_count)") == "1"


def test_a_warm_stop_waits_for_what_runs_up_to_its_timeout(tmp_path: Path) -> None:
    project = Project(tmp_path, "transport: sqlite\nbackend: sqlite\nshutdown_timeout: 500ms", NAPS)
    project.python("nap.delay(60)")
    with project.worker("--pool", "prefork") as process:
        project.until(lambda: project.runs()["nap"] == 1, "the nap to begin")
    assert process.returncode == 0, project.log()
    assert project.runs()["woke"] == 0
    assert project.python("print(app.transport.stats(['default'])['default'].ready)") == "1"


def test_revoke_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    project = Project(tmp_path, "transport: sqlite\nbackend: sqlite", NAPS)
    with project.worker("--pool", "prefork", "--size", "1"):
        code = "print(nap.delay(60).id, nap.delay(60).id, nap.options(countdown=3600).delay(60).id)"
        running, waiting, delayed = project.python(code).split()
        project.until(lambda: project.runs()["nap"] == 1, "the nap to begin")
        code = f"app.revoke({waiting!r}, {delayed!r}); app.revoke({running!r}, terminate=True)"
        project.python(code)
        state = f"print(*(app.result(id).state for id in ({running!r}, {waiting!r}, {delayed!r})))"
        project.until(lambda: project.python(state) == "REVOKED REVOKED REVOKED", "all to be revoked")
        assert project.python("print(note.delay(1).get(10))") == "1"
    assert project.runs()["nap"] == 1
