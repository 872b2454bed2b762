"""Broadcasts through a SQLite database: what is said reaches every process that listens, without polling."""

from __future__ import annotations

import itertools
import logging
import sqlite3
import threading
from collections.abc import Callable

from dray.core.errors import TransportError
from dray.plugins._sqlite import Database
from dray.plugins._sqlite_bell import Bell, await_ring, take_waiters

KEPT_S = 60.0
"""A listener that is away for longer misses what was said."""
_RETRY_S = 1.0
_HOUR_S = 3600.0

Deliver = Callable[[bytes], None]
_Listener = tuple[str, int, Deliver]
"""Channel, number of the last thing heard, what to call."""


def say(db: sqlite3.Connection, channel: str, payload: bytes, now: float) -> set[str]:
    """Within a transaction: the names of the bells to ring after the commit."""
    db.execute("DELETE FROM broadcast WHERE said < ?", (now - KEPT_S,))
    db.execute("INSERT INTO broadcast (channel, said, payload) VALUES (?, ?, ?)", (channel, now, payload))
    return take_waiters(db, [_key(channel)])


def _key(channel: str) -> str:
    return f"c{channel}"


def _last(db: sqlite3.Connection) -> int:
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'broadcast'").fetchone()
    return int(found[0]) if found else 0


class Audience:
    """The listeners of one transport, and the thread that reads for all of them and calls them. Any thread."""

    def __init__(self, database: Database, logger: logging.Logger) -> None:
        self._database = database
        self._logger = logger
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._listeners: dict[int, _Listener] = {}
        self._bell: Bell | None = None

    def add(self, channel: str, deliver: Deliver) -> Callable[[], None]:
        """Call ``deliver`` for what is said from now on; returns the call that stops it."""
        last = self._database.read(_last)
        number = next(self._numbers)
        with self._lock:
            if self._bell is None:
                self._bell = Bell(self._database.path)
                threading.Thread(target=self._run, args=(self._bell,), name="dray-broadcast", daemon=True).start()
            self._listeners[number] = (channel, last, deliver)
            self._bell.wake()

        def stop() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return stop

    def close(self) -> None:
        """Let go of all listeners. Idempotent."""
        with self._lock:
            self._listeners.clear()
            bell, self._bell = self._bell, None
        if bell is not None:
            bell.wake()

    def _run(self, bell: Bell) -> None:
        pause_s = _HOUR_S
        while self._bell is bell:
            try:
                pause_s = 0.0 if self._hear(bell) else _HOUR_S
            except TransportError as error:
                self._logger.warning("listening failed, trying again in %g s: %s", _RETRY_S, error)
                pause_s = _RETRY_S
            if pause_s:
                bell.wait(pause_s)
        bell.close()

    def _hear(self, bell: Bell) -> bool:
        """Pass on what was said since the last time; False: nothing was, and the bell is rung when something is."""
        with self._lock:
            listeners = dict(self._listeners)
        channels = sorted({channel for channel, _, _ in listeners.values()})
        first = min((last for _, last, _ in listeners.values()), default=0)

        def work(db: sqlite3.Connection) -> list[tuple[int, str, bytes]]:
            marks = ",".join("?" * len(channels))
            said = db.execute(
                f"SELECT seq, channel, payload FROM broadcast WHERE seq > ? AND channel IN ({marks}) ORDER BY seq",  # noqa: S608
                (first, *channels),
            ).fetchall()
            if not said:
                await_ring(db, [_key(channel) for channel in channels], bell)
            return said

        said = self._database.write(work) if listeners else []
        for number, (channel, last, _) in listeners.items():
            for seq, where, payload in said:
                if where == channel and seq > last:
                    self._pass_on(number, seq, payload)
        return bool(said)

    def _pass_on(self, number: int, seq: int, payload: bytes) -> None:
        with self._lock:
            listener = self._listeners.get(number)
            if listener is None:  # stopped meanwhile
                return
            channel, _, deliver = listener
            self._listeners[number] = (channel, seq, deliver)
        try:
            deliver(payload)
        except Exception:
            self._logger.exception("a listener to the channel %r failed", channel)
