"""Measures one peer of dray: ``python benchmarks/peers/run.py PEER enqueue|drain|roundtrip N [--broker URL] [--results]``.

Without a broker the peer uses its embedded store (Huey SQLite, Celery files); the others have none. Prints one JSON line. Needs the environments that ``make bench-peers`` makes; itself needs only the standard library.
Every run has a folder of its own, ends within ``--timeout`` seconds and leaves no process behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from progress import Reader, load  # noqa: E402

PEERS = ("huey", "celery", "celery-solo", "dramatiq", "taskiq", "saq", "rq")
"""Each with the variant of its worker, if it has several."""
EMBEDDED = ("huey", "celery")
MEASURES = ("enqueue", "drain", "roundtrip", "memory")
LOST_MAX = 20
Figures = dict[str, Any]
processes = load("bench_processes")


class PeerError(Exception):
    """A peer could not be measured; the message says why."""


class PeerRun:
    """One measurement of one peer.

    Owns the folder that the peer stores its queue in, the environment of its processes and the deadline.
    """

    def __init__(self, peer: str, folder: Path, results: bool, timeout_s: float, broker: str, backend: str) -> None:
        self.peer = peer
        self.bin = HERE / f".venv-{environment(peer)}" / "bin"
        if not installed(peer):
            raise PeerError(f"{peer} is not installed: run `make bench-peers` first")
        self.folder = folder
        self.reader = Reader(folder / "progress")
        self.deadline = time.monotonic() + timeout_s
        self.env = clean_environment() | {
            "PYTHONPATH": str(HERE),
            "PEER_STORE": str(folder),
            "PEER_BROKER": broker,
            "PEER_BACKEND": backend,
            "PEER_RESULTS": "1" if results else "0",
            "TMPDIR": str(folder),  # where kombu moves what it takes
            "C_FORCE_ROOT": "1",  # Celery warns root
        }

    def left_s(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    def drive(self, measure: str, count: int = 1) -> Figures:
        command = [str(self.bin / "python"), str(HERE / "driver.py"), self.peer, measure, str(count)]
        try:
            done = subprocess.run(
                command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=self.left_s(), check=True
            )
        except subprocess.CalledProcessError as error:
            raise PeerError(f"{self.peer} {measure} failed: {error.stderr[-800:]}") from error
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{self.peer} {measure} of {count} did not end in time") from error
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
        return figures

    @contextmanager
    def worker(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The peer's worker processes; each is the leader of a group that ends with the context."""
        known = self.drive("workers")
        workers = []
        try:
            for number, (program, *arguments) in enumerate(known["workers"]):
                with open(self.folder / f"worker{number}.log", "wb") as log:
                    workers.append(subprocess.Popen(
                        [self.bin / program, *arguments], env=self.env | known["env"], cwd=self.folder,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    ))  # fmt: skip
            yield workers
        finally:
            stop_groups(workers)

    def worker_log(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in self.folder.glob("worker*.log"))

    def drain(self, count: int) -> Figures:
        """The rate between the first and the last executed task of a queue filled beforehand."""
        queued = self.drive("enqueue", count)
        with self.worker() as workers:
            self._until(1, workers)
            pids = [pid for worker in workers for pid in processes.tree(worker.pid)]
            cpu_s, already, began = processes.cpu_s(pids), self.reader.total(), time.perf_counter()
            ended = self._until(count, workers)
            pids = [pid for worker in workers for pid in processes.tree(worker.pid)]
            cpu_s = processes.cpu_s(pids) - cpu_s
        if already == count:
            raise PeerError(f"{self.peer}: {count} tasks are too few, all ran before the first look")
        return {
            "rate": round((count - already) / (ended - began), 1),
            "seconds": round(ended - began, 3),
            "worker_cpu_us": round(cpu_s / (count - already) * 1e6, 1),
            "enqueue_rate": queued["rate"],
        }

    def _until(self, count: int, workers: list[subprocess.Popen[bytes]]) -> float:
        """When ``count`` tasks have run."""
        while (done := self.reader.total()) < count:
            if any(worker.poll() is not None for worker in workers) or time.monotonic() > self.deadline:
                what = f"{self.peer}: {done} of {count} tasks ran before the worker ended or time ran out"
                raise PeerError(f"{what}\n{self.worker_log()}")
            time.sleep(0.002)
        return time.perf_counter()

    def memory(self, _: int) -> Figures:
        """Proportional memory of the idle worker, after one task."""
        self.drive("enqueue", 2)
        with self.worker() as workers:
            self._until(2, workers)
            time.sleep(1)
            pids = [pid for worker in workers for pid in processes.tree(worker.pid)]
            return {"pss_mb": round(processes.pss_mb(pids), 1), "processes": len(pids)}

    def roundtrip(self, count: int) -> Figures:
        """Call and result, one at a time. After a lost task the worker is started anew and the loss reported.

        Kombu's filesystem transport takes files that are still being written; its worker then stops.
        """
        took: list[float] = []
        lost = 0
        while len(took) < count:
            with self.worker():
                turn = self.drive("roundtrip", count - len(took))
            took += turn["took_ms"]
            lost += turn["lost"] is not None
            if turn["lost"] and (lost > LOST_MAX or time.monotonic() > self.deadline):
                raise PeerError(f"{self.peer}: {lost} tasks lost, the last: {turn['lost']}\n{self.worker_log()}")
        took.sort()
        return {
            "p50_ms": round(took[count // 2], 3),
            "p99_ms": round(took[min(count - 1, count * 99 // 100)], 3),
            "seconds": round(sum(took) / 1000, 3),
            "lost": lost,
        }

    def enqueue(self, count: int) -> Figures:
        return self.drive("enqueue", count)


def clean_environment() -> dict[str, str]:
    """Ours without what slows Python down."""
    unset = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    return {key: value for key, value in os.environ.items() if key not in unset}


def environment(peer: str) -> str:
    """The name of a peer's virtual environment, which its variants share."""
    return peer.partition("-")[0]


def installed(peer: str) -> bool:
    return (HERE / f".venv-{environment(peer)}" / ".installed").exists()


def stop_groups(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ends the workers and the children in their process groups, by force if they do not go soon."""
    for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        for worker in workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, number)
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(patience_s)


def measure(
    peer: str, what: str, count: int, results: bool = False, timeout_s: float = 120.0, broker: str = "",
    backend: str = "",
) -> Figures:  # fmt: skip
    """One figure as a mapping: peer, measure, n, results, seconds and ``rate`` or ``p50_ms`` and ``p99_ms``.

    ``broker`` is a URL (``amqp://``, ``redis://``), or nothing for the embedded store; ``backend`` the URL of the Redis
    that keeps results then.
    """
    if what == "roundtrip":
        results = True
    folder = Path(tempfile.mkdtemp(prefix=f"peer-{peer}-"))
    try:
        run = PeerRun(peer, folder, results, timeout_s, broker, backend)
        figures: Figures = getattr(run, what)(count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"peer": peer, "measure": what, "n": count, "results": results} | figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("n", type=int)
    parser.add_argument("--results", action="store_true", help="store results (a round trip always does)")
    parser.add_argument("--broker", default="", metavar="URL", help="amqp://... or redis://...; default: the embedded store")
    parser.add_argument("--backend", default="", metavar="URL", help="a Redis for results, beside a broker")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    given = parser.parse_args()
    if given.n < 2:
        parser.error("N must be at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clean-up runs
    try:
        figures = measure(
            given.peer, given.measure, given.n, given.results, given.timeout, given.broker, given.backend
        )
        print(json.dumps(figures), flush=True)
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
