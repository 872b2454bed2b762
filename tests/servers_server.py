"""The life of a private server."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from typing import Self

from tests.servers_process import ServerProcess


class Server:
    """What all private servers can do: start, stop, be killed, paused, restarted on the same ports and data.

    A subclass makes ``_process`` and knows when the server answers. Used with ``with``, or closed by hand.
    """

    _process: ServerProcess
    start_timeout_s = 30.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.running

    def start(self) -> Self:
        self.launch()
        self.wait()
        return self

    def launch(self) -> None:
        """Start without waiting for it; ``wait`` does."""
        self._process.start()

    def wait(self) -> None:
        self._process.wait_until(self._answers, self.start_timeout_s)

    def stop(self) -> None:
        """In good order: what is to be on disk is written. The data stays."""
        self._process.stop()

    def kill(self) -> None:
        """SIGKILL. The data stays."""
        self._process.kill()

    def restart(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.signal(signal.SIGCONT)

    def leave(self) -> None:
        """Let it outlive this object and this process, until its owner dies."""
        self._process.leave()

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        shutil.rmtree(self._process.folder, ignore_errors=True)

    def _answers(self) -> bool:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *failure: object) -> None:
        self.close()


class Group:
    """Servers that start and end together. A subclass names its members."""

    @property
    def members(self) -> Sequence[Server]:
        raise NotImplementedError

    def start(self) -> Self:
        """Those that do not run, at the same time."""
        started = [member for member in self.members if not member.running]
        for member in started:
            member.launch()
        for member in started:
            member.wait()
        return self

    def close(self) -> None:
        for member in self.members:
            member.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *failure: object) -> None:
        self.close()
