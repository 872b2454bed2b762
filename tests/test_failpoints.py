"""Promises G1 to G4 under fire: every failpoint x what can happen there x pools x stores, with real processes, audited.

Each case: a producer sends a mix of tasks and keeps a ledger, a worker is armed to fail at one point, whoever died is
replaced by an unarmed one; when nothing waits any more the auditor compares the ledger, the tasks' run log and the
stores. ``bound`` states for each case how many extra runs the fault may be charged with, and why.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from dray import Dray
from dray.core.faults import POINTS
from dray.testing.ledger import Ledger, Report, audit, read_ledger, read_runs
from tests.project import Project

LEASE_S = 1.0
COUNT = 60
RSS_MAX = 150 * 2**20
POOLS = {
    "solo": ("--pool", "solo"),
    "threads": ("--pool", "threads", "--size", "2"),
    "prefork": ("--pool", "prefork", "--size", "2"),
}
CONFIG = "transport: {{use: {0}, lease: {1}s}}\nbackend: {0}"
TRANSPORTS = ("sqlite", "filesystem")
TASKS = """
from dray.testing.ledger import RunLog

RUNS = RunLog(HERE / "runs.jsonl")

@app.task
def quick(n: int) -> int:
    with RUNS.run():
        time.sleep(0.004)
        return n

@app.task(retry=Retry(on=ValueError, max=1, delay=0))
def retried(n: int) -> int:
    with RUNS.run():
        if current().attempt == 0:
            raise ValueError(n)
        return n

@app.task
def failing(n: int) -> int:
    with RUNS.run():
        raise ValueError(n)
"""
PRODUCER = """
from pathlib import Path
from dray import Dray
from dray.testing.ledger import Ledger
from tests.test_failpoints import send_all
with Dray(config="dray.yaml") as app:
    send_all(app, Ledger("ledger.jsonl"))
"""

# --- the table ---------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a failpoint sits."""

    process: str
    """Which process it hits: producer, worker, or task (the child under prefork, else the worker)."""
    nth: int
    """The hit that fails: late enough that much has been done, early enough that it comes."""


TABLE = {
    "before_publish": Point("producer", 20),
    "confirmed": Point("producer", 20),
    "received": Point("worker", 4),
    "handed_over": Point("worker", 4),
    "running": Point("task", 15),
    "encoded": Point("task", 10),
    "stored": Point("worker", 5),
    "follow_ups_sent": Point("worker", 3),
    "acknowledged": Point("worker", 5),
    "draining": Point("worker", 1),
}
ATOMIC = ("sqlite",)
"""Transports that publish follow-ups and remove their cause in one transaction: nothing can happen in between."""
ACTIONS = ("kill", "stop", "raise", "exit")
SETTLING = ("stored", "follow_ups_sent", "acknowledged")


class Case(NamedTuple):
    point: str
    action: str
    pool: str
    transport: str

    @property
    def hits(self) -> str:
        """The process that it hits: producer, worker, child."""
        process = TABLE[self.point].process
        if process == "task":
            return "child" if self.pool == "prefork" else "worker"
        return process


class Bound(NamedTuple):
    """Extra runs that a fault may be charged with: the sum of what is set."""

    why: str
    per_fault: int = 0
    unsettled: bool = False
    """Tasks that had begun when the process ended, and whose message was still in the store."""
    held: bool = False
    """Deliveries that the stopped worker held: another ran them, and it may run them too when it wakes."""


def bound(case: Case) -> Bound:
    """What G4 allows in this case."""
    point, action, hits = case.point, case.action, case.hits
    if point == "before_publish":
        return Bound("nothing was sent: sending again sends it once")
    if point == "confirmed":
        if action == "stop":
            return Bound("the producer only pauses")
        return Bound("it was stored, nobody learned so, and it is sent again under its id", per_fault=1)
    if hits == "child":
        if point == "encoded" and action in ("kill", "exit"):
            return Bound("exactly the run whose child died after the function", per_fault=1)
        return Bound("the function had not begun, or the parent keeps the lease, or it is the task's own failure")
    twice = point == "follow_ups_sent"  # published, and what caused it is still there: it will be published once more
    if action == "stop":
        return Bound("its leases ran out, others ran what it held", per_fault=int(twice), held=True)
    if action in ("kill", "exit"):
        return Bound("what it had begun and not settled", per_fault=int(twice), unsettled=True)
    if point == "draining":
        return Bound("a shutdown that fails is a worker that dies: exit code 1", unsettled=True)
    return Bound(
        {
            "received": "not begun; handed out again when the lease has ended",
            "handed_over": "the receiving loop connects again; what was handed over runs and is settled",
            "running": "the task's own failure: its retry policy decides; without one it is dead with this reason",
            "encoded": "as in running: an error of the run, whatever the function did before",
        }.get(point, "the batch is settled again, and what is settled stays so")
    )


def cases() -> Iterator[Case]:
    for point, action, pool, transport in itertools.product(TABLE, ACTIONS, POOLS, TRANSPORTS):
        if point == "follow_ups_sent" and transport in ATOMIC:
            continue
        if TABLE[point].process == "producer" and pool != "threads":
            continue  # a producer has no pool
        if point == "confirmed" and action == "raise":
            action = "uncertain"  # "certainly not stored" would be a lie there
        yield Case(point, action, pool, transport)
    for point, transport in itertools.product(SETTLING, TRANSPORTS):
        if point != "follow_ups_sent" or transport not in ATOMIC:
            yield Case(point, "uncertain", "threads", transport)


# --- one case ----------------------------------------------------------------------------------------------


def kind(n: int) -> str:
    return {4: "retried", 5: "failing"}.get(n % 6, "quick")


def send_all(app: Dray, ledger: Ledger) -> None:
    """Send what the ledger does not call confirmed yet; in the test's process, or in a producer's own."""
    done = read_ledger(ledger.path) if ledger.path.exists() else {}
    for n in range(COUNT):
        send_one(app, ledger, n, done)


def send_one(app: Dray, ledger: Ledger, n: int, done: dict[str, str]) -> None:
    task_id = f"{kind(n)}-{n}"
    if done.get(task_id) != "confirmed":
        with ledger.sending(task_id):
            app.send_task(f"tasks.{kind(n)}", [n], task_id=task_id)


class Stage:
    """One case's project, workers and observations."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.case = case
        self.project = Project(folder, CONFIG.format(case.transport, LEASE_S), TASKS)
        self.project.env["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parents[1]}"
        self.project.env["PYTHONFAULTHANDLER"] = "1"
        self.app = Dray(config=str(folder / "dray.yaml"))
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.runs = folder / "runs.jsonl"
        self.faults = folder / "faults.log"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.sending: Future[None] = Future()
        self.killed = 0
        self.charged = 0
        self._stopped: dict[int, float] = {}
        self._continued: set[int] = set()

    @property
    def arms(self) -> dict[str, str]:
        point, action = self.case.point, self.case.action
        return {
            "DRAY_FAILPOINTS": f"{point}={action}@{TABLE[point].nth}",
            "DRAY_FAILPOINTS_LOG": str(self.faults),
        }

    def worker(self, **env: str) -> subprocess.Popen[bytes]:
        self.workers.append(self.project.start(*POOLS[self.case.pool], **env))
        return self.workers[-1]

    def produce(self, **env: str) -> subprocess.Popen[bytes]:
        with open(self.project.folder / "worker.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", PRODUCER],
                cwd=self.project.folder,
                env={**self.project.env, **env},
                stdout=log,
                stderr=log,
            )

    # --- what is seen

    def fired(self) -> list[int]:
        """The pids of the processes that the fault has hit so far."""
        return [int(line.split()[2]) for line in self.faults.read_text().splitlines()] if self.faults.exists() else []

    def in_store(self) -> int:
        stats = self.app.transport.stats(["default"])["default"]
        return stats.ready + stats.leased + stats.delayed

    def unsettled(self) -> int:
        """Tasks that have begun, less those that are gone from the store."""
        sent = sum(state == "confirmed" for state in read_ledger(self.ledger.path).values())
        return len({run.id for run in read_runs(self.runs)}) - (sent - self.in_store())

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
        self.project.until(condition, f"{self.case}: {what}", timeout_s)

    def ran(self, count: int) -> bool:
        return self.runs.exists() and self.runs.read_bytes().count(b"start") >= count

    # --- what is done

    def send_all(self) -> None:
        """From another thread: a stopped process may hold the database's lock, and it is we who wake it."""
        with ThreadPoolExecutor(1) as pool:
            self.sending = pool.submit(send_all, self.app, self.ledger)
            pool.shutdown(wait=False)

    def finish(self) -> None:
        """Let stopped processes go on once their leases are over; wait until nothing is in the store."""

        def done() -> bool:
            self.wake_stopped()
            return self.sending.done() and self.in_store() == 0 and self._continued >= set(self._stopped)

        self.until(done, "an empty store")
        self.sending.result()

    def wake_stopped(self) -> None:
        now = time.monotonic()
        for pid in self.fired() if self.case.action == "stop" else ():
            stopped_s = now - self._stopped.setdefault(pid, now)
            # If it holds a lock of the database, nobody gets further without it.
            enough = self.case.hits == "child" or self.in_store() == 0 or stopped_s > 2.5 * LEASE_S
            if pid not in self._continued and stopped_s > 1.5 * LEASE_S and enough:
                os.kill(pid, signal.SIGCONT)
                self._continued.add(pid)

    def end_workers(self) -> None:
        """Warm stop of all that live. One that is draining has had its signal."""
        for worker in self.workers:
            if worker.returncode is None and not (worker is self.workers[0] and self.case.point == "draining"):
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers[self.killed :]:
            try:
                assert worker.wait(15) == 0, self.project.log()
            except subprocess.TimeoutExpired:
                worker.send_signal(signal.SIGABRT)  # where do its threads wait?
                worker.wait()
                raise AssertionError(self.project.log()) from None

    def audit(self) -> Report:
        return audit(self.ledger.path, self.runs, self.app.transport, self.app.backend)

    def close(self) -> None:
        self.app.close()
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path, request.param)
    yield made
    made.close()


def parameters(hits: str) -> pytest.MarkDecorator:
    found = [case for case in cases() if (case.hits == "producer") is (hits == "producer")]
    return pytest.mark.parametrize("stage", found, ids=["-".join(case) for case in found], indirect=True)


def test_the_table_knows_every_failpoint() -> None:
    assert set(TABLE) == set(POINTS)


@parameters("producer")
def test_a_fault_in_the_producer(stage: Stage) -> None:
    stage.worker()
    producer = stage.produce(**stage.arms)
    if stage.case.action == "stop":
        stage.until(lambda: bool(stage.fired()), "the fault")
        os.kill(producer.pid, signal.SIGCONT)
    code = producer.wait(20)
    assert code == {"kill": -signal.SIGKILL, "exit": 70, "stop": 0}.get(stage.case.action, 1), stage.project.log()
    again = stage.produce()
    assert again.wait(20) == 0, stage.project.log()
    stage.until(lambda: stage.in_store() == 0, "an empty store")
    stage.end_workers()
    check(stage)


@parameters("worker")
def test_a_fault_in_the_worker(stage: Stage) -> None:
    case = stage.case
    worker = stage.worker(**stage.arms)
    for n in (-1, -2):
        send_one(stage.app, stage.ledger, 6 * n, {})
    stage.until(lambda: stage.ran(2) and stage.in_store() == 0, "the first tasks")
    before = Resources.of(worker.pid, case)
    stage.send_all()
    if case.point == "draining":
        stage.until(lambda: stage.ran(COUNT // 3), "a third of the tasks")
        worker.send_signal(signal.SIGTERM)
    stage.until(lambda: bool(stage.fired()), "the fault")
    if case.hits == "worker" and (
        case.action in ("kill", "exit") or (case.point, case.action) == ("draining", "raise")
    ):
        replace_dead(stage, worker)
    elif case.hits == "worker" and case.action == "stop":
        stage.charged = stage.app.transport.stats(["default"])["default"].leased
        stage.worker()
    stage.finish()
    if not stage.killed and case.point != "draining":
        stage.until(lambda: Resources.of(worker.pid, case).fits(before), "as many descriptors and threads as before", 8)
    stage.end_workers()
    check(stage)


def replace_dead(stage: Stage, worker: subprocess.Popen[bytes]) -> None:
    code = worker.wait(10)
    assert code == {"kill": -signal.SIGKILL, "exit": 70}.get(stage.case.action, 1), stage.project.log()
    stage.until(lambda: not group_lives(worker.pid), "the end of its children")
    stage.sending.result()
    stage.killed = 1
    stage.charged = stage.unsettled()
    stage.worker()


class Resources(NamedTuple):
    """What a process holds."""

    descriptors: Counter[str]
    """Pipes, sockets, FIFOs and files; a database's own files are pooled and left out."""
    threads: int
    children: int

    @classmethod
    def of(cls, pid: int, case: Case) -> Resources:
        found: Counter[str] = Counter()
        process = psutil.Process(pid)
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                path = os.readlink(f"/proc/{pid}/fd/{fd}")
                if "dray.db" not in path or "-wake" in path:
                    found["fifo" if is_fifo(f"/proc/{pid}/fd/{fd}") else path.partition(":")[0]] += 1
        assert process.memory_info().rss < RSS_MAX
        return cls(found, process.num_threads(), len(process.children(recursive=True)))

    def fits(self, before: Resources) -> bool:
        """Nothing more than before, but for the thread that watches held outcomes, which is started when it is needed."""
        return (
            self.descriptors == before.descriptors
            and self.threads <= before.threads + 1
            and self.children == before.children
        )


def is_fifo(path: str | Path) -> bool:
    return stat.S_ISFIFO(os.stat(path).st_mode)


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def check(stage: Stage) -> None:
    """The invariants."""
    case, report, log = stage.case, stage.audit(), stage.project.log()
    faults = stage.fired()
    assert faults, "the fault never fired: the case shows nothing"
    assert report.sent["confirmed"] >= COUNT
    assert report.lost == report.unexpected == report.without_result == [], (report, log)
    assert report.waiting == report.undecided == 0
    allowed = bound(case)
    most = allowed.per_fault * len(faults) + stage.charged * (allowed.unsettled or allowed.held)
    assert report.extra_runs <= most, (most, report, log)
    if not allowed.held and case.hits != "producer":
        assert report.overlapping == []
        assert "was lost" not in log, log
    own = {f"{kind(n)}-{n}" for n in range(COUNT) if kind(n) == "failing"}
    assert own <= set(report.dead)
    fails_tasks = case.action == "raise" and case.point in ("running", "encoded")
    assert len(set(report.dead) - own) <= fails_tasks * len(faults), report
    check_nothing_left(stage)


def check_nothing_left(stage: Stage) -> None:
    for worker in stage.workers:
        assert not group_lives(worker.pid), "processes outlived their worker"
    stage.app.close()
    fifos = [path for path in stage.project.folder.rglob("*") if is_fifo(path)]
    # Of a killed worker one bell may be left until a worker that starts a minute later removes it.
    assert len(fifos) <= stage.killed, fifos
