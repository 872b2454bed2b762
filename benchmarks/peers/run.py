"""Measures one peer of dray: ``python benchmarks/peers/run.py huey|celery enqueue|drain|roundtrip N [--results]``.

Prints one JSON line. Needs the environments that ``make bench-peers`` makes; itself needs only the standard library.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from progress import Reader  # noqa: E402

PEERS = ("huey", "celery")
MEASURES = ("enqueue", "drain", "roundtrip")
LOST_MAX = 20
Figures = dict[str, Any]


class PeerError(Exception):
    """A peer could not be measured; the message says why."""


class PeerRun:
    """One measurement of one peer.

    Owns the folder that the peer stores its queue in, the environment of its processes and the deadline.
    """

    def __init__(self, peer: str, folder: Path, results: bool, timeout_s: float) -> None:
        self.peer = peer
        self.bin = HERE / f".venv-{peer}" / "bin"
        if not (self.bin / "python").exists():
            raise PeerError(f"{peer} is not installed: run `make bench-peers` first")
        self.folder = folder
        (folder / "progress").mkdir()
        self.deadline = time.monotonic() + timeout_s
        self.env = os.environ | {
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PEER_STORE": str(folder),
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
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        program, *arguments = self.drive("worker")["worker"]
        with open(self.folder / "worker.log", "wb") as log:
            worker = subprocess.Popen(
                [self.bin / program, *arguments],
                env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield worker
        finally:
            stop_group(worker)

    def worker_log(self) -> str:
        return (self.folder / "worker.log").read_text(errors="replace")[-1500:]

    def drain(self, count: int) -> Figures:
        """The rate between the first and the last executed task of a queue filled beforehand."""
        self.drive("enqueue", count)
        reader = Reader(self.folder / "progress")
        first: tuple[float, int] | None = None
        with self.worker() as worker:
            started = time.perf_counter()
            while (done := reader.total()) < count:
                now = time.perf_counter()
                if done and first is None:
                    first = (now, done)
                if worker.poll() is not None or time.monotonic() > self.deadline:
                    what = f"{self.peer}: {done} of {count} tasks ran before the worker ended or time ran out"
                    raise PeerError(f"{what}\n{self.worker_log()}")
                time.sleep(0.002)
            now = time.perf_counter()
        since, already = first or (started, 0)
        return {"rate": round((count - already) / (now - since), 1), "seconds": round(now - since, 3)}

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


def stop_group(worker: subprocess.Popen[bytes]) -> None:
    """Ends the worker and the children in its process group, by force if they do not go at once."""
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(worker.pid, number)
        except ProcessLookupError:
            break
        try:
            worker.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def measure(peer: str, what: str, count: int, results: bool = False, timeout_s: float = 120.0) -> Figures:
    """One figure as a mapping: peer, measure, n, results, seconds and ``rate`` or ``p50_ms`` and ``p99_ms``."""
    if what == "roundtrip":
        results = True
    folder = Path(tempfile.mkdtemp(prefix=f"peer-{peer}-"))
    try:
        run = PeerRun(peer, folder, results, timeout_s)
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
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    given = parser.parse_args()
    if given.n < 2:
        parser.error("N must be at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clean-up runs
    try:
        print(json.dumps(measure(given.peer, given.measure, given.n, given.results, given.timeout)), flush=True)
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
