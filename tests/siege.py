"""A project under fire: real workers and a producer go on while a test makes trouble; an auditor has the last word."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dray import Dray
from dray.core.errors import DrayError, Uncertain
from dray.testing.ledger import Ledger, Report, audit, read_ledger, read_runs
from tests.project import Project, stop

LEASE_S = 2.0
DRAINED_S = LEASE_S + 5
"""How soon after the last fault everything that was confirmed has run."""
PACE_S = 0.005
TASKS = """
from dray.testing.ledger import RunLog

RUNS = RunLog(HERE / "runs.jsonl")

@app.task
def quick(n: int) -> int:
    with RUNS.run():
        time.sleep(0.003)
        return n

@app.task
def long(seconds: float) -> None:
    '''Holds the processor: nothing else of its process runs meanwhile, but for what must.'''
    with RUNS.run():
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
"""


class Siege:
    """One folder's project: ``worker`` starts one, ``under_load`` sends all the while, ``end`` proves the promises."""

    def __init__(self, folder: Path, transport: dict[str, Any], backend: dict[str, Any], tasks: str = "") -> None:
        config = f"transport: {json.dumps(transport)}\nbackend: {json.dumps(backend)}"
        self.project = Project(folder, config, TASKS + textwrap.dedent(tasks))
        self.project.env["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parents[1]}"
        self.app = Dray(config=str(folder / "dray.yaml"))
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.runs = folder / "runs.jsonl"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.dead: set[int] = set()
        """Workers that the test has ended."""
        self.repeated = 0
        """Calls that were sent again under their id because nobody knew whether they had been stored."""
        self.errors: Counter[str] = Counter()
        """What producers were told, by class."""
        self.confirmed = 0

    # --- what goes on --------------------------------------------------------------------------------------

    def worker(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        """A worker that is ready."""
        worker = self.project.start(*(arguments or ("--pool", "threads", "--size", "2")), **env)
        self.workers.append(worker)
        self.until(lambda: f" {worker.pid} worker default is ready" in self.project.log(), "a worker that is ready")
        return worker

    def send(self, task_id: str, task: str = "quick", *arguments: Any, **options: Any) -> None:
        """Send until it is confirmed, always under the same id, as the errors tell a caller to."""
        deadline = time.monotonic() + 60
        while True:
            try:
                with self.ledger.sending(task_id):
                    self.app.send_task(f"tasks.{task}", list(arguments or [0]), task_id=task_id, **options)
            except DrayError as error:
                self.errors[type(error).__name__] += 1
                self.repeated += isinstance(error, Uncertain)
                assert time.monotonic() < deadline, f"{task_id} cannot be sent: {error}"
                time.sleep(0.05)
            else:
                self.confirmed += 1
                return

    @contextlib.contextmanager
    def under_load(self) -> Iterator[None]:
        """Calls are sent, one after the other, as long as the block goes on; some of them after it began and ended."""
        over, failures, first = threading.Event(), list[BaseException](), self.confirmed + 10

        def produce() -> None:
            number = 0
            try:
                while not over.is_set():
                    self.send(f"{threading.get_ident()}-{number}")
                    number += 1
                    over.wait(PACE_S)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=produce, daemon=True)
        thread.start()
        try:
            self.until(lambda: bool(failures) or (self.confirmed >= first and self.ran(1)), "a first task")
            yield
        finally:
            over.set()
            thread.join(60)
        assert not failures, failures
        assert not thread.is_alive(), "a call hangs"

    # --- what is seen --------------------------------------------------------------------------------------

    def ended(self) -> set[str]:
        """The ids that have run to their end."""
        text = self.runs.read_text() if self.runs.exists() else ""
        return {line.split('"')[3] for line in text.splitlines() if '"event": "end"' in line}

    def ran(self, count: int) -> bool:
        return len(self.ended()) >= count

    def known(self) -> set[str]:
        """The ids that were confirmed."""
        states = read_ledger(self.ledger.path)
        return {task_id for task_id, state in states.items() if state == "confirmed"}

    def starts(self, task_id: str) -> int:
        return sum(run.id == task_id for run in read_runs(self.runs))

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
        self.project.until(condition, what, timeout_s)

    def drained(self, *, but: int = 0) -> None:
        """Everything that was confirmed runs soon, but for so many that the store has lost."""
        self.drained_of(self.known(), but)

    def drained_of(self, known: set[str], but: int = 0) -> None:
        began = time.monotonic()
        missing = known
        while len(missing := known - self.ended()) > but:
            assert time.monotonic() < began + DRAINED_S, (
                f"{len(missing)} of {len(known)} did not run in {DRAINED_S:g} s: {sorted(missing)[:5]}\n"
                f"{self.project.log()[-3000:]}"
            )
            time.sleep(0.02)

    # --- how it ends ---------------------------------------------------------------------------------------

    def end(self, *, extra_runs: int = 0, dead: int = 0) -> Report:
        """Warm stop of all workers that live; nothing is lost, nothing is left, little ran twice."""
        for worker in self.workers:
            if worker.pid not in self.dead:
                assert worker.poll() is None, f"a worker died: {worker.returncode}\n{self.project.log()[-3000:]}"
                assert stop(worker) == 0, self.project.log()[-3000:]
        assert "Traceback" not in self.project.log(), self.project.log()[-5000:]
        report = self.audit()
        assert report.lost == report.unexpected == [], (report, self.project.log()[-3000:])
        assert len(report.dead) == dead, report
        assert report.undecided == 0
        assert not report.waiting, report
        assert report.extra_runs <= self.repeated + extra_runs, (self.repeated, report)
        return report

    def audit(self) -> Report:
        return audit(self.ledger.path, self.runs, self.app.transport, self.app.backend)

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """SIGKILL, its children included."""
        self.dead.add(worker.pid)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.app.close()
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def on_redis(folder: Path, url: str, tasks: str = "", **options: Any) -> Siege:
    """Its results are there, too."""
    link = {"use": "redis", "url": url, "timeout": 1, "connect_timeout": 1, "heartbeat": 1}
    return Siege(folder, link | {"lease": LEASE_S} | options, link, tasks)


def on_rabbitmq(folder: Path, url: str | list[str], tasks: str = "", **options: Any) -> Siege:
    link = {"use": "rabbitmq", "url": url, "timeout": 3, "connect_timeout": 2, "heartbeat": 2}
    return Siege(folder, link | options, {"use": "null"}, tasks)
