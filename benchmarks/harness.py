"""A folder with a configuration, worker processes in it, and what is read from outside: progress, memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from progress import Reader

ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """One measurement's own folder: the store, the configuration, the progress counters, the workers' log."""

    def __init__(self, config: str = "", results: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dray-bench-"))
        self.progress = self.folder / "progress"
        backend = "backend: sqlite\n" if results else ""
        text = f"transport: sqlite\n{backend}imports: [benchmarks.tasks]\n{config}"
        (self.folder / "dray.yaml").write_text(text)
        self.env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        self.env |= {"PYTHONPATH": str(ROOT), "BENCH_PROGRESS": str(self.progress)}
        self.reader = Reader(self.progress)

    def drive(self, code: str, timeout_s: float = 300.0) -> str:
        """The last line that a fresh Python process prints for ``code``, with ``app``, ``noop`` and ``nap`` at hand."""
        prelude = "import time\nfrom benchmarks.tasks import app, noop, nap\n"
        done = subprocess.run(
            [sys.executable, "-c", prelude + code],
            env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{code}\n{done.stderr[-2000:]}")
        return (done.stdout.strip().splitlines() or [""])[-1]

    @contextlib.contextmanager
    def worker(self, *arguments: str) -> Iterator[psutil.Process]:
        with open(self.folder / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dray", "worker", "benchmarks.tasks:app", "--log-level", "WARNING", *arguments],
                env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def await_total(self, count: int, timeout_s: float = 240.0, every_s: float = 0.001) -> float:
        """Seconds on the performance counter when ``count`` tasks have run."""
        deadline = time.perf_counter() + timeout_s
        while self.reader.total() < count:
            if time.perf_counter() > deadline:
                log = (self.folder / "worker.log").read_text()[-2000:]
                raise RuntimeError(f"{self.reader.total()} of {count} tasks ran in {timeout_s} s\n{log}")
            time.sleep(every_s)
        return time.perf_counter()

    def drain(self, count: int, timed: int | None = None, *arguments: str) -> float:
        """Rate between the first and the last of ``timed`` tasks, with ``count`` queued before the worker starts."""
        timed = timed or count
        self.drive(f"app.send_many(noop.s() for _ in range({count}))")
        before = self.reader.total()
        with self.worker(*arguments):
            first = self.await_total(before + 1, every_s=0.0002)
            already = self.reader.total() - before
            last = self.await_total(before + timed)
        return (timed - already) / (last - first)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pss_bytes(process: psutil.Process) -> int:
    """Proportional memory of a process and all below it."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += member.memory_full_info().pss
    return total


def percentiles(seconds: list[float]) -> Mapping[str, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3), "p99_ms": round(p99 * 1e3, 3)}
