"""Bells: how a process that waits for news in a SQLite database is woken, across processes and without polling."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sqlite3
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dray.core.errors import Unavailable
from dray.plugins._sqlite import spread

WAKE = b"w"
_RING = b"r"


class Bell:
    """Something that another process can ring: a named pipe next to the database that its owner reads.

    A waiter writes its bell's name into the table ``waiter`` in the same transaction that found nothing. Who commits
    something new takes the names out in that transaction, and rings after the commit: no wake is lost, nobody polls.
    That a bell's pipe has no reader proves that its owner is dead; the kernel closes it whatever the process died of.
    """

    def __init__(self, database: Path) -> None:
        folder = _bell_folder(database)
        self.name = os.urandom(8).hex()
        self._path = folder / self.name
        self._guard = threading.RLock()  # reentrant: wake() may interrupt close() in a signal handler
        try:
            folder.mkdir(exist_ok=True)
            os.mkfifo(self._path, 0o666)
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot make a named pipe here: {error}") from error
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        _close_in_child(self)

    def wait(self, timeout_s: float) -> bytes:
        """Wait until rung, at most ``timeout_s`` seconds; what was heard, with ``WAKE`` in it after :meth:`wake`."""
        if not self._poll.poll(min(max(timeout_s, 0), 3600) * 1000):
            return b""
        return os.read(self._fd, 65536)

    def wake(self) -> None:
        """End the current or the next :meth:`wait`. Any thread; a signal handler."""
        with self._guard, contextlib.suppress(BlockingIOError):  # full: enough was said
            if self._fd >= 0:
                os.write(self._fd, WAKE)

    def close(self) -> None:
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Close, and leave the pipe to the process that this one was forked from."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _close_in_child(bell: Bell) -> None:
    """A child that keeps its parent's pipes open would make the parent look alive for ever."""
    reference = weakref.ref(bell)

    def after() -> None:
        if (live := reference()) is not None:
            live.drop()

    os.register_at_fork(after_in_child=after)


def _bell_folder(database: Path) -> Path:
    return database.with_name(database.name + "-wake")


def queue_keys(queues: Iterable[str]) -> list[str]:
    """What waiters for messages in these queues wait for."""
    return [f"q{queue}" for queue in set(queues)]


def await_ring(connection: sqlite3.Connection, keys: Sequence[str], bell: Bell) -> None:
    """Within a transaction: ring ``bell`` when one of ``keys`` has news."""
    connection.executemany("INSERT OR IGNORE INTO waiter VALUES (?, ?)", [(key, bell.name) for key in keys])


def forget_rings(connection: sqlite3.Connection, bell: Bell) -> None:
    """Within a transaction: nothing of ``bell`` is awaited any more."""
    connection.execute("DELETE FROM waiter WHERE bell = ?", (bell.name,))


def take_waiters(connection: sqlite3.Connection, keys: Sequence[str]) -> set[str]:
    """Within a transaction: the names of the bells to ring after the commit, for news on ``keys``."""
    bells: set[str] = set()
    for marks, chunk in spread(keys):
        rows = connection.execute(f"DELETE FROM waiter WHERE key IN ({marks}) RETURNING bell", chunk).fetchall()  # noqa: S608
        bells.update(row[0] for row in rows)
    return bells


def ring(database: Path, names: set[str]) -> None:
    """Ring these; those of the dead are removed."""
    for name in names:
        if answers(database, name, _RING) is False:
            remove(database, name)


def answers(database: Path, name: str, say: bytes = b"") -> bool | None:
    """Is the owner of this bell alive? False: certainly dead; None: unknown. ``say`` is written into it."""
    try:
        fd = os.open(_bell_folder(database) / name, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        return False if error.errno == errno.ENXIO else None  # nobody reads; gone, or another user's
    try:
        if say:
            os.write(fd, say)
    except OSError:  # full: it will wake up anyway
        pass
    finally:
        os.close(fd)
    return True


def remove(database: Path, name: str) -> None:
    (_bell_folder(database) / name).unlink(missing_ok=True)


def sweep_bells(database: Path, keep: Collection[str]) -> None:
    """Remove the bells of killed processes, but for ``keep``; young ones may not have been opened yet."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(_bell_folder(database)):
            old = time.time() - entry.stat().st_mtime > 60
            if old and entry.name not in keep and answers(database, entry.name) is False:
                remove(database, entry.name)
