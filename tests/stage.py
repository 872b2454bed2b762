"""Where a case of the failpoint matrix plays: a project, its workers, and what can be seen of them."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

from dray import Dray
from dray.testing.ledger import Ledger, Report, audit, read_ledger, read_runs
from tests.produce import send_all
from tests.project import Project

LEASE_S = 1.0
RSS_MAX = 150 * 2**20
POOLS = {
    "solo": ("--pool", "solo"),
    "threads": ("--pool", "threads", "--size", "2"),
    "prefork": ("--pool", "prefork", "--size", "2"),
}
CONFIG = "transport: {{use: {0}, lease: {1}s}}\nbackend: {0}"
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


class Case(NamedTuple):
    """One cell of the matrix."""

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
        self.leased_most = 0
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
                [sys.executable, "-m", "tests.produce"],
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

    def note_leased(self) -> bool:
        """Keep the most that was seen leased at once."""
        self.leased_most = max(self.leased_most, self.app.transport.stats(["default"])["default"].leased)
        return True

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
        pool = ThreadPoolExecutor(1)
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

    def replace_dead(self, worker: subprocess.Popen[bytes]) -> None:
        """See how it died, note what it may be charged with, start another."""
        code = worker.wait(10)
        assert code == {"kill": -signal.SIGKILL, "exit": 70}.get(self.case.action, 1), self.project.log()
        self.until(lambda: not group_lives(worker.pid), "the end of its children")
        self.sending.result()
        self.killed = 1
        self.charged = self.unsettled()
        self.worker()

    def until_ready(self, worker: subprocess.Popen[bytes]) -> None:
        """Wait until a worker has started all that it needs, and can be stopped."""
        self.until(lambda: f" {worker.pid} worker default is ready" in self.project.log(), "a worker that is ready")

    def until_given_back(self, worker: subprocess.Popen[bytes], before: Resources) -> None:
        """Wait until a worker holds no more than it did."""
        held: list[Resources] = []

        def fits() -> bool:
            held[:] = [Resources.of(worker.pid, self.case)]
            return held[0].fits(before)

        try:
            self.until(fits, f"no more than {before}", 8)
        except AssertionError:
            raise AssertionError(f"{self.case}: held {before}, holds {held}\n{self.project.log()[-3000:]}") from None

    def end_workers(self) -> None:
        """Warm stop of all that live. One that is draining has had its signal."""
        for worker in self.workers:
            if worker.returncode is None and not (worker is self.workers[0] and self.case.point == "draining"):
                self.until_ready(worker)
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
        """Nothing more than before, but for the thread that watches held outcomes, which starts when it is needed."""
        fewer = self.descriptors <= before.descriptors and self.threads <= before.threads + 1
        return fewer and self.children == before.children


def is_fifo(path: str | Path) -> bool:
    return stat.S_ISFIFO(os.stat(path).st_mode)


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
