"""A server process under a keeper, free ports for it, and where its programs are installed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

KEEPER = Path(__file__).with_name("servers_keeper.py")
HOST = "127.0.0.1"


def missing(reason: str) -> NoReturn:
    """Ends the test: skipped where somebody develops, an error in CI."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        raise RuntimeError(f"CI needs its servers: {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Programs:
    """Where servers are installed: in this system, or in a folder that they are run in with chroot."""

    root: Path = Path("/")

    def find(self, *names: str) -> str:
        """The path, as the server's process sees it, of the first of these that is there."""
        folders = ("usr/lib/rabbitmq/bin", "usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "opt/homebrew/bin")
        for name in names:
            if self.root == Path("/") and (found := shutil.which(name)) and "rabbitmq" not in name:
                return found
            for folder in folders:
                if os.access(self.root / folder / name, os.X_OK):
                    return f"/{folder}/{name}"
        missing(f"{' or '.join(names)} is not installed in {self.root}: sh scripts/install_servers.sh says how")

    def command(self, *arguments: str) -> list[str]:
        return [*arguments] if self.root == Path("/") else ["chroot", str(self.root), *arguments]

    def folder(self, name: str) -> Path:
        temporary = Path(tempfile.gettempdir()) if self.root == Path("/") else self.root / "tmp"
        return Path(tempfile.mkdtemp(prefix=f"dray-{name}-", dir=temporary))

    def inside(self, path: Path) -> str:
        """A path as the server's process sees it."""
        return f"/{path.relative_to(self.root)}"


def free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range: inside it, a client polling for the server may connect to itself."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(lowest // 2, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            if port not in found:
                found.append(port)
    return found


class ServerProcess:
    """One process and the group it leads.

    - started by a keeper, which kills it when the owner dies;
    - killed, stopped, paused and resumed as a group;
    - waited for until it answers, or the tail of its log is the error.
    """

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, owner: int = 0):
        self.command = list(command)
        self.folder = folder
        self.env = {**os.environ, **(env or {})}
        self.owner = owner or os.getpid()
        self.log = folder / f"{Path(command[0]).name}.log"
        self.pid = 0
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    def start(self) -> None:
        assert not self.running, f"{self.command[0]} runs already"
        reading, writing = os.pipe()
        keeper = [sys.executable, "-I", "-S", str(KEEPER), str(self.owner), str(self.folder), str(writing)]
        with self.log.open("ab") as log:
            self._keeper = subprocess.Popen(
                [*keeper, *self.command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                start_new_session=True,
            )
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = pipe.read()
        if not said:
            self._keeper.wait()
            raise RuntimeError(f"{self.command[0]} could not be started:\n{self.tail()}")
        self.pid = int(said)

    def signal(self, number: int) -> None:
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._keeper is None:
            return
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        self._keeper.wait(10)
        self._keeper = None

    def stop(self, timeout_s: float = 20) -> None:
        """SIGTERM, and wait until it is gone; killed when it does not go."""
        if self.running:
            assert self._keeper is not None
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                self.signal(signal.SIGTERM)
                self._keeper.wait(timeout_s)
        self.kill()

    def leave(self) -> None:
        """Let it outlive this object and this process, until the owner dies."""
        if self._keeper is not None:
            self._keeper.returncode = 0  # else Popen complains that nobody waited for it
            self._keeper = None

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        def ready_or_dead() -> bool:
            if not self.running:
                raise RuntimeError(f"{self.command[0]} ended at its start:\n{self.tail()}")
            return ready()

        until(ready_or_dead, f"{self.command[0]} ready, see {self.log}", timeout_s)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "(no log)"


def until(ready: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(0.02)


@contextlib.contextmanager
def connection(port: int, timeout_s: float = 30) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, port), timeout=timeout_s) as opened:
        yield opened
