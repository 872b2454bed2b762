"""A throw-away set-up for ``dray demo`` and ``dray bench``: a temporary folder, and a worker process that uses it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dray.cli import Failure
from dray.core.app import Dray
from dray.core.supervisor import LIFELINE

CONFIG = """\
transport: {transport}
backend: {transport}
workers:
  default: {{pool: {pool}{options}}}
"""
STOP_S = 30.0
LOG_LINES = 15


def folder(transport: str, pool: str, size: int | None) -> contextlib.AbstractContextManager[Path]:
    """A temporary folder with a ``dray.yaml`` in it: one plugin is the transport and keeps the results."""
    options = "" if size is None else f", size: {size}"
    return configured(CONFIG.format(transport=transport, pool=pool, options=options))


@contextlib.contextmanager
def configured(config: str) -> Iterator[Path]:
    """A temporary folder with this ``dray.yaml`` in it; the environment's settings don't count meanwhile."""
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("DRAY_")}
    try:
        with tempfile.TemporaryDirectory(prefix="dray-") as name:
            (Path(name) / "dray.yaml").write_text(config, encoding="utf-8")
            yield Path(name)
    finally:
        os.environ.update(settings)


def caller(folder: Path) -> Dray:
    """An application for this process that talks to the worker of that folder."""
    return Dray(config=folder / "dray.yaml")


class LocalWorker:
    """A ``dray worker`` process over a folder of :func:`folder`: a context manager. It never outlives this process."""

    def __init__(self, folder: Path, target: str, *options: str) -> None:
        config = str(folder / "dray.yaml")
        self._command = [sys.executable, "-m", "dray", "worker", target, "--config", config, *options]
        self._log = folder / "worker.log"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The worker's own process, the parent of those that run tasks."""
        assert self._process is not None, "used as a context manager"  # noqa: S101
        return self._process.pid

    def check(self) -> None:
        """Raises ``Failure`` with the end of the log when the worker is gone."""
        assert self._process is not None  # noqa: S101
        code = self._process.poll()
        if code is not None:
            raise Failure(f"the worker ended with code {code}:\n{self.log()}")

    def log(self) -> str:
        """The last lines that the worker wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def __enter__(self) -> LocalWorker:
        reader, self._lifeline = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  (our own command line)
                self._command,
                cwd=self._folder,
                env={**os.environ, LIFELINE: str(reader)},
                pass_fds=(reader,),
                stderr=log,
                stdout=log,
                start_new_session=True,
            )
        os.close(reader)
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process is not None  # noqa: S101
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(self._lifeline)
