"""The embedded result back end: results in a SQLite file, by default the transport's."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures, Seconds
from dray.core.errors import TooLarge
from dray.core.message import TERMINAL, State, StoredResult
from dray.plugins._sqlite import MAX_BODY_BYTES, WORKER_LOG_BYTES, Database, database_path, spread
from dray.plugins._sqlite_bell import Bell, await_ring, forget_rings, ring, take_waiters

_ENDED = ", ".join(f"'{state.value}'" for state in sorted(TERMINAL))
_STORE = f"""
INSERT INTO result (id, state, expires, body) VALUES (?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, expires = excluded.expires, body = excluded.body
    WHERE state NOT IN ({_ENDED}) OR expires <= ?"""  # noqa: S608
_SWEEP_EVERY_S = 1.0
_SWEEP_ROWS = 500
_ANY = "r"
"""What a waiter for very many results waits for: any result. The keys of single ones are this and the id."""
_KEYS_MAX = 64


class SqliteBackend(ResultBackend):
    """Results, and who has arrived at a barrier, in a SQLite file that the processes of one machine share.

    Responsibilities: stores in one transaction per batch, never over a terminal state; wakes those who wait; forgets
    what expired, a little with every store.
    """

    api: ClassVar[int] = 1
    features = ResultFeatures(durability=Durability.D2, push=True, max_body_bytes=MAX_BODY_BYTES)

    @dataclass(frozen=True, slots=True)
    class Options:
        """One of ``url`` and ``path``, or neither: ``.dray/dray.db``, the transport's default too."""

        url: str | None = None
        """``sqlite:///relative.db`` or ``sqlite:////absolute/path.db``."""
        path: str | None = None
        """A path instead of a URL; relative to the configuration\'s folder."""
        synchronous: Literal["normal", "full"] = "normal"
        """``full``: each commit reaches the disk, and survives a power loss."""
        busy_timeout: Seconds = 10.0
        """How long to wait for another process that keeps the file locked."""
        barrier_expires: Seconds = 30 * 86400.0
        """How long the members of a group that never completes are remembered after the last one arrived."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        durability = Durability.D3 if options.synchronous == "full" else Durability.D2
        self.features = replace(self.features, durability=durability)
        path = database_path(options.url, options.path, context.base)
        self.database = Database(path, options.synchronous, options.busy_timeout, context)
        self.database.log_limit_bytes = WORKER_LOG_BYTES  # workers store; callers hardly write
        self._now = context.clock.time
        self._swept_at = -math.inf
        self._stored_since = 0
        self._bells: list[Bell] = []

    def open(self) -> None:
        self.database.open()

    def close(self) -> None:
        while self._bells:
            self._bells.pop().close()
        self.database.close()

    # --- results -------------------------------------------------------------------------------------------

    def store(self, results: Sequence[StoredResult]) -> None:
        now = self._now()
        rows, news = [], []
        for id_, state, body, expires_at in results:
            if len(body) > MAX_BODY_BYTES:
                raise TooLarge(
                    f"the result of {id_} is {len(body):,} bytes; sqlite takes {MAX_BODY_BYTES:,}: "
                    "store the data elsewhere and return a reference to it"
                )
            rows.append((id_, state.value, expires_at, body, now))
            if state in TERMINAL:
                news.append(_ANY + id_)

        def work(db: sqlite3.Connection) -> set[str]:
            db.executemany(_STORE, rows)
            self._sweep(db, now, len(rows))
            return _waiters(db, news)

        if rows:
            ring(self.database.path, self.database.write(work))

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        return self.database.read(lambda db: self._fetch(db, ids))

    def delete(self, ids: Sequence[str]) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM result WHERE id = ?", [(id_,) for id_ in ids])

        if ids:
            self.database.write(work)

    def _fetch(self, db: sqlite3.Connection, ids: Sequence[str], extra: str = "") -> dict[str, StoredResult]:
        now, found = self._now(), {}
        for marks, chunk in spread(ids):
            statement = f"SELECT id, state, body, expires FROM result WHERE id IN ({marks}) {extra}"  # noqa: S608
            for id_, state, body, expires in db.execute(statement, chunk):
                if expires is None or expires > now:
                    found[id_] = StoredResult(id_, State(state), body, expires)
        return found

    # --- waiting -------------------------------------------------------------------------------------------

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        ended = f"AND state IN ({_ENDED})"
        found = self.database.read(lambda db: self._fetch(db, ids, ended))
        if found or timeout_s <= 0 or not ids:
            return found
        deadline = time.monotonic() + timeout_s  # real time, as the pipe's: a test's clock cannot end a system call
        keys = [_ANY + id_ for id_ in ids] if len(ids) <= _KEYS_MAX else [_ANY]
        bell = self._bells.pop() if self._bells else Bell(self.database.path)
        rung = False

        def look(db: sqlite3.Connection) -> dict[str, StoredResult]:
            found = self._fetch(db, ids, ended)
            if not found:
                await_ring(db, keys, bell)
            elif not rung or len(keys) > 1:
                forget_rings(db, bell)
            return found

        try:
            while not (found := self.database.write(look)):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    self.database.write(lambda db: forget_rings(db, bell))
                    return found
                rung = bool(bell.wait(left_s))
            return found
        finally:
            self._bells.append(bell)

    # --- barriers ------------------------------------------------------------------------------------------

    def arrive(self, group: str, member: str, size: int) -> bool:
        expires = self._now() + self.options.barrier_expires

        def work(db: sqlite3.Connection) -> bool:
            new = db.execute("INSERT OR IGNORE INTO barrier_member VALUES (?, ?)", (group, member)).rowcount
            db.execute(
                "INSERT INTO barrier VALUES (?, 1, ?, ?) ON CONFLICT (name) DO UPDATE SET expires = excluded.expires, "
                "arrived = arrived + ?, last = CASE ? WHEN 1 THEN excluded.last ELSE last END",
                (group, member, expires, new, new),
            )
            arrived, last = db.execute("SELECT arrived, last FROM barrier WHERE name = ?", (group,)).fetchone()
            return bool(arrived == size and last == member)

        return self.database.write(work)

    # --- forgetting ----------------------------------------------------------------------------------------

    def _sweep(self, db: sqlite3.Connection, now: float, stored: int) -> None:
        """Once a second at most, delete what expired: more rows than came in, to keep up, yet not all at once."""
        self._stored_since += stored
        if now - self._swept_at < _SWEEP_EVERY_S:
            return
        limit = _SWEEP_ROWS + 2 * self._stored_since
        self._swept_at, self._stored_since = now, 0
        db.execute("DELETE FROM result WHERE id IN (SELECT id FROM result WHERE expires <= ? LIMIT ?)", (now, limit))
        over = db.execute("DELETE FROM barrier WHERE expires <= ? RETURNING name", (now,)).fetchall()
        db.executemany("DELETE FROM barrier_member WHERE barrier = ?", over)


def _waiters(db: sqlite3.Connection, keys: list[str]) -> set[str]:
    """Within a transaction: the bells to ring. Mostly nobody waits for any of a large batch."""
    if not keys or not db.execute("SELECT 1 FROM waiter WHERE key >= ? LIMIT 1", (_ANY,)).fetchone():
        return set()
    return take_waiters(db, [*keys, _ANY])
