"""``dray worker`` as a process: it runs tasks, stops warm and cold, runs several entries, and keeps its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dray import Dray

PATIENCE_S = 30.0
TASKS = """\
import os, time
from dray import Dray

app = Dray()


@app.task
def pid() -> int:
    return os.getppid()


@app.task
def hold(folder: str) -> str:
    open(os.path.join(folder, "held"), "w").close()
    while not os.path.exists(os.path.join(folder, "go")):
        time.sleep(0.01)
    return "done"
"""
YAML = """\
imports: [shop]
backend: sqlite
workers:
  first: {queues: [first], pool: solo}
  second: {queues: [second], pool: solo}
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``dray worker`` with these words in the folder of the test; ends it when the test is over."""
    (tmp_path / "shop.py").write_text(TASKS)
    processes: list[subprocess.Popen[str]] = []
    logs = []

    def run(*words: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"log{len(processes)}").open("w")
        logs.append(log)
        command = [sys.executable, "-m", "dray", "worker", *words]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=log, text=True, start_new_session=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    for log in logs:
        log.close()


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Dray]:
    """Sends tasks to the worker by their names."""
    place = {"use": "sqlite", "path": str(tmp_path / ".dray" / "dray.db")}
    with Dray(config={"transport": place, "backend": place}) as app:
        yield app


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE_S} s in vain")


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_a_worker_runs_tasks_and_stops_warm(start: Start, caller: Dray, tmp_path: Path, pool: str) -> None:
    worker = start("shop:app", "--pool", pool)
    assert caller.send_task("shop.pid").get(PATIENCE_S) > 1
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    log = (tmp_path / "log0").read_text()
    for text in ("transport sqlite", "results   sqlite", "queues    default", pool, "tasks     2", "durability D2"):
        assert text in log
    assert "Traceback" not in log


def test_a_running_task_finishes_in_a_warm_stop(start: Start, caller: Dray, tmp_path: Path) -> None:
    worker = start("shop:app", "--pool", "prefork", "--size", "1")
    result = caller.send_task("shop.hold", [str(tmp_path)])
    wait_for((tmp_path / "held").exists)
    worker.send_signal(signal.SIGINT)
    wait_for(lambda: "warm stop" in (tmp_path / "log0").read_text())
    (tmp_path / "go").touch()
    assert result.get(PATIENCE_S) == "done"
    assert worker.wait(PATIENCE_S) == 0


def test_the_second_signal_stops_cold(start: Start, caller: Dray, tmp_path: Path) -> None:
    worker = start("shop:app", "--size", "1")
    caller.send_task("shop.hold", [str(tmp_path)])
    wait_for((tmp_path / "held").exists)
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: "warm stop" in (tmp_path / "log0").read_text())
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 3
    wait_for(lambda: caller.transport.stats(["default"])["default"].ready == 1)


def test_queues_and_log_level_are_taken_from_the_command_line(start: Start, caller: Dray, tmp_path: Path) -> None:
    worker = start("shop", "--queues", "high, low", "--log-level", "ERROR", "--pool", "solo")
    for queue in ("low", "high"):
        assert caller.send_task("shop.pid", queue=queue).get(PATIENCE_S) > 1
    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0
    log = (tmp_path / "log0").read_text()
    assert "high, low" in log
    assert "INFO" not in log


def test_several_workers_run_under_one_supervisor(start: Start, caller: Dray, tmp_path: Path) -> None:
    (tmp_path / "dray.yaml").write_text(YAML)
    supervisor = start()
    parents = {caller.send_task("shop.pid", queue=queue).get(PATIENCE_S) for queue in ("first", "second")}
    assert parents == {supervisor.pid}
    supervisor.terminate()
    assert supervisor.wait(PATIENCE_S) == 0


def test_one_of_several_is_chosen_by_name(start: Start, caller: Dray, tmp_path: Path) -> None:
    (tmp_path / "dray.yaml").write_text(YAML)
    worker = start("second")
    assert caller.send_task("shop.pid", queue="second").get(PATIENCE_S) == os.getpid()
    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0
    assert "worker    second" in (tmp_path / "log0").read_text()


def test_a_mistake_in_one_of_several_ends_them_all(start: Start, tmp_path: Path) -> None:
    (tmp_path / "dray.yaml").write_text(YAML.replace("pool: solo}\n", "pool: solo, sise: 2}\n", 1))
    assert start().wait(PATIENCE_S) == 2
    log = wait_for((tmp_path / "log0").read_text)
    assert "dray.yaml:4: workers.first.sise: unknown key" in log
    assert "not started again" in log


def test_a_transport_that_is_not_there_is_exit_code_1(start: Start, tmp_path: Path) -> None:
    (tmp_path / "dray.yaml").write_text("imports: [shop]\ntransport: {use: sqlite, path: /proc/no/such/place.db}\n")
    assert start("--pool", "solo").wait(PATIENCE_S) == 1
    log = (tmp_path / "log0").read_text()
    assert "/proc/no/such" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_workers_end_with_their_supervisor(start: Start, caller: Dray, tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "dray.yaml").write_text(YAML)
    supervisor = start()
    for queue in ("first", "second"):
        caller.send_task("shop.pid", queue=queue).get(PATIENCE_S)
    lines = [line for line in (tmp_path / "log0").read_text().splitlines() if "INFO" in line and ": pid " in line]
    pids = [int(line.rpartition("pid ")[2]) for line in lines]
    assert len(pids) == 2
    supervisor.send_signal(end)
    supervisor.wait(PATIENCE_S)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_worker_without_tasks_says_so(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("from dray import Dray\napp = Dray()\n")
    worker = start("bare:app", "--pool", "solo")
    wait_for(lambda: "no tasks are registered" in (tmp_path / "log0").read_text())
    wait_for(lambda: "is ready" in (tmp_path / "log0").read_text())
    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0
