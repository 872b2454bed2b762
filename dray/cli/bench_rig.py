"""Where a measurement takes place: a folder with a configuration and counters, a worker, callers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import yaml

from dray.cli import Failure
from dray.cli.bench_load import Figures, Load
from dray.cli.bench_processes import cpu_s, pss_mb, tree
from dray.cli.bench_progress import Reader
from dray.cli.bench_tasks import QUEUE, RAN, SENT
from dray.cli.local import LOG_LINES, LocalWorker, caller
from dray.core.contracts import Inspectable

TARGET = "dray.cli.bench_tasks:app"
PATIENCE_S = 60.0
LOOK_S = 0.002
SETTLE_S = 1.0
Tell = Callable[[str, int, int], object]
"""Called with what is counted, how many there are, and how many there will be."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured. The plugins are what a configuration may say: a name, a URL, a mapping."""

    transport: object
    backend: object
    pool: object
    size: int | None
    batch: int
    threads: int
    broker_pid: int | None

    def config(self) -> str:
        """As ``dray.yaml``. The results of a measurement are nobody's: they expire soon."""
        entry: dict[str, object] = {"queues": [QUEUE], "pool": self.pool}
        if self.size is not None:
            entry["size"] = self.size
        plugins = {"transport": self.transport, "backend": self.backend}
        return yaml.safe_dump(
            {**plugins, "default_queue": QUEUE, "result_expires": "2m", "workers": {"default": entry}}
        )


class Caller(Protocol):
    """Whoever makes the calls: connected when the context is entered."""

    def go(self) -> None:
        """Begin."""

    def result(self) -> Figures:
        """Wait for the end; the figures of ``Load.run``."""
        ...


class Rig:
    """One measurement's folder, worker and callers, each of them a process of its own.

    Responsibilities: to start and stop them, to wait for tasks to be executed without touching the broker, to notice
    when nothing moves any more.
    """

    def __init__(self, folder: Path, setup: Setup, tell: Tell) -> None:
        self.folder = folder
        self.setup = setup
        self._tell = tell
        self._ran = Reader(folder / RAN)
        self._sent = Reader(folder / SENT)
        self._worker: LocalWorker | None = None
        self._caller: _ProcessCaller | None = None

    def run(self, measure: Callable[[Rig], Figures]) -> Figures:
        """Measure, in an empty queue, and leave an empty queue."""
        self._empty()
        try:
            figures = measure(self)
        finally:
            left = self._empty()
        return figures | {"left": left}

    def _empty(self) -> int | None:
        """Purge the queue; how many were in it, ready or leased. None: the transport cannot tell."""
        with caller(self.folder) as app:
            transport = app.transport
            if not isinstance(transport, Inspectable):
                return None
            transport.declare([QUEUE])
            stats = transport.stats([QUEUE])[QUEUE]
            transport.purge(QUEUE)
            return stats.ready + (stats.leased or 0)

    # --- callers -------------------------------------------------------------------------------------------

    def caller(self, kind: str, count: int, threads: int = 1) -> contextlib.AbstractContextManager[Caller]:
        """Someone who is about to make ``count`` calls, see ``Load``."""
        self._caller = _ProcessCaller(self, kind, count, threads)
        return self._caller

    def load(self, kind: str, count: int, threads: int = 1) -> Figures:
        """Make ``count`` calls, now."""
        with self.caller(kind, count, threads) as someone:
            someone.go()
            return someone.result()

    def sent(self) -> int:
        """How many tasks callers have queued."""
        return self._sent.total()

    def tell(self, what: str, done: int, total: int) -> None:
        """Show how far it is."""
        self._tell(what, done, total)

    # --- the worker ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """A worker, from its start to its warm stop."""
        with LocalWorker(self.folder, TARGET, "--log-level", "warning") as worker:
            self._worker = worker
            yield
        self._worker = None

    def ran(self) -> int:
        """How many tasks were executed."""
        return self._ran.total()

    def until(self, total: int, what: str = "executed") -> float:
        """Wait for ``total`` executed tasks in all; when they were, on ``time.perf_counter``.

        Raises ``Failure`` when the worker is gone, or when nothing has moved for a minute.
        """
        before, moved = -1, time.monotonic()
        while (done := self.ran()) < total:
            if done != before:
                before, moved = done, time.monotonic()
            elif time.monotonic() - moved > PATIENCE_S:
                raise Failure(f"{total - done:,} of {total:,} tasks did not run in {PATIENCE_S:.0f} s\n{self._log()}")
            self.tell(what, done, total)
            self.check()
            time.sleep(LOOK_S)
        now = time.perf_counter()
        self.tell(what, total, total)
        return now

    def check(self) -> None:
        """Raises ``Failure`` when the worker or the caller has failed."""
        if self._worker is not None:
            self._worker.check()
        if self._caller is not None:
            self._caller.check()

    def worker_cpu_s(self) -> float | None:
        """Processor time of the worker and its children."""
        return cpu_s(tree(self._worker.pid)) if self._worker is not None else None

    def worker_pss_mb(self) -> float | None:
        """Memory of the worker and its children, once they have come to rest."""
        time.sleep(SETTLE_S)
        return pss_mb(tree(self._worker.pid)) if self._worker is not None else None

    def broker_cpu_s(self) -> float | None:
        """Processor time of the broker's process, if it is known."""
        return cpu_s([self.setup.broker_pid]) if self.setup.broker_pid is not None else None

    def _log(self) -> str:
        return f"the worker says:\n{self._worker.log()}" if self._worker is not None else ""


class _ProcessCaller:
    """A caller in a process of its own."""

    def __init__(self, rig: Rig, kind: str, count: int, threads: int) -> None:
        numbers = [str(count), str(rig.setup.batch), str(threads)]
        self._command = [sys.executable, "-m", "dray.cli.bench_load", str(rig.folder), kind, *numbers]
        self._rig = rig
        self._count = count
        self._log = rig.folder / "caller.log"

    def __enter__(self) -> _ProcessCaller:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  (our own command line)
                self._command,
                cwd=self._rig.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self._line()  # connected
        except BaseException:
            self.__exit__()
            raise
        return self

    def go(self) -> None:
        stdin = self._pipe(self._process.stdin)
        stdin.write("go\n")
        stdin.flush()

    def result(self) -> Figures:
        before = self._rig.sent()
        while self._process.poll() is None:
            self._rig.tell("queued", min(self._rig.sent() - before, self._count), self._count)
            self._rig.check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        return self._line()

    def check(self) -> None:
        """Raises ``Failure`` when it has failed."""
        if self._process.poll():
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise Failure(f"the caller ended with code {self._process.returncode}:\n{end}")

    def _line(self) -> Figures:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            self._process.wait(PATIENCE_S)
            self.check()
        figures: Figures = json.loads(line)
        return figures

    @staticmethod
    def _pipe(stream: IO[str] | None) -> IO[str]:
        assert stream is not None  # noqa: S101  (asked for above)
        return stream

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class InProcessRig(Rig):
    """For a transport that no other process reaches: the worker on the main thread, the caller on another."""

    def __init__(self, folder: Path, setup: Setup, tell: Tell) -> None:
        super().__init__(folder, setup, tell)
        self._app = caller(folder)
        self._load = Load(self._app, folder)
        self._inside = self._app.worker()
        self._go, self._wanted = threading.Event(), False

    def run(self, measure: Callable[[Rig], Figures]) -> Figures:
        found: list[Figures | BaseException] = []

        def measure_beside() -> None:
            try:
                found.append(measure(self))
            except BaseException as error:
                found.append(error)
            self._go.set()
            self._inside.stop()

        beside = threading.Thread(target=measure_beside, name="dray-bench")
        beside.start()
        self._go.wait()
        if self._wanted:
            self._inside.run()
        beside.join()
        self._app.close()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    @contextlib.contextmanager
    def caller(self, kind: str, count: int, threads: int = 1) -> Iterator[Caller]:
        yield _ThreadCaller(lambda: self._load.run(kind, count, self.setup.batch, threads, lambda: None))

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        self._wanted = True
        self._go.set()
        yield
        self._inside.stop()


class _ThreadCaller:
    """A caller on the current thread."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run

    def go(self) -> None:
        return

    def result(self) -> Figures:
        figures: Figures = self._run()
        return figures
