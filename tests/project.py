"""A user's project in a folder: configuration, tasks, real worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

TASKS = """
import os, time
from pathlib import Path
from dray import Dray, Retry, current

app = Dray()
HERE = Path(__file__).parent

def log(name):
    fd = os.open(HERE / "runs.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{name}\\n".encode())
    os.close(fd)

@app.task
def note(n: int) -> int:
    log(n)
    return n

@app.task
def slow(n: int, seconds: float = 0.002) -> int:
    log(n)
    time.sleep(seconds)
    return n
"""


class Project:
    """One folder; ``worker`` starts a real worker process in it."""

    def __init__(self, folder: Path, config: str = "", tasks: str = "") -> None:
        self.folder = folder
        (folder / "dray.yaml").write_text(textwrap.dedent(config) + "\nimports: [tasks]\n")
        (folder / "tasks.py").write_text(TASKS + textwrap.dedent(tasks))
        self.env = {**os.environ, "PYTHONPATH": str(folder)}
        self.env.pop("PYTEST_XDIST_WORKER", None)

    def python(self, code: str, timeout_s: float = 60) -> str:
        """What a fresh process prints for ``code``, with everything of ``tasks`` imported."""
        done = subprocess.run(
            [sys.executable, "-c", "from tasks import *\n" + textwrap.dedent(code)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "worker.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dray", "worker", "tasks:app", *arguments],
                cwd=self.folder,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def worker(self, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        process = self.start(*arguments, **env)
        try:
            yield process
        finally:
            stop(process)

    def log(self) -> str:
        path = self.folder / "worker.log"
        return path.read_text() if path.exists() else ""

    def runs(self) -> Counter[str]:
        """How often each name was logged by a task."""
        path = self.folder / "runs.log"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s\n{self.log()[-3000:]}"
            time.sleep(0.005)


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a prefork worker that run tasks: the fork server's children."""
    try:
        servers = psutil.Process(process.pid).children()
        return [child for server in servers for child in server.children()]
    except psutil.Error:
        return []


def stop(process: subprocess.Popen[bytes]) -> int:
    """Warm stop; by force after 20 s."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
