"""What is seldom asked of the SQLite transport: a look into queues, dead letters, tombstones, cleaning up."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dray.core.errors import DecodeError, TransportError
from dray.core.message import DeadLetter, Outgoing, QueueStats
from dray.core.wire import unpack_headers
from dray.plugins._sqlite import Database, spread
from dray.plugins._sqlite_bell import queue_keys, take_waiters

_AT_ONCE = 5000
"""Rows deleted in one transaction: others get their turn in between."""

# The first name, then the next greater one, until there is none: a few probes, however many rows.
_NAMES = """
WITH RECURSIVE name (name) AS (
    SELECT min(queue) FROM message WHERE due {0} 0
    UNION ALL SELECT (SELECT min(queue) FROM message WHERE due {0} 0 AND queue > name) FROM name WHERE name IS NOT NULL)
SELECT name FROM name WHERE name IS NOT NULL"""
_ALL_NAMES = f"""
SELECT * FROM ({_NAMES.format("=")}) UNION SELECT * FROM ({_NAMES.format(">")})
UNION SELECT queue FROM dead UNION SELECT name FROM queue ORDER BY 1"""  # noqa: S608
_OLDEST = """
SELECT min((SELECT born FROM message WHERE queue = ? AND due = 0 AND rank = level.column1 ORDER BY born LIMIT 1))
FROM (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9)) AS level"""
_DEAD = "SELECT id, queue, body, headers, reason, died, count FROM dead"


def try_write(database: Database, work: Callable[[sqlite3.Connection], object]) -> None:
    """For tidying up, where failing does no harm."""
    with contextlib.suppress(TransportError):
        database.write(work)


def sweep(db: sqlite3.Connection, now: float, dead_before: float) -> None:
    """Delete some of what is over; called often enough that some is all."""
    db.execute(
        "DELETE FROM tombstone WHERE id IN (SELECT id FROM tombstone WHERE expires <= ? LIMIT ?)", (now, _AT_ONCE)
    )
    db.execute("DELETE FROM dead WHERE seq IN (SELECT seq FROM dead WHERE died <= ? LIMIT ?)", (dead_before, _AT_ONCE))


# --- queues ------------------------------------------------------------------------------------------------


def queues(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute(_ALL_NAMES)]


def stats(db: sqlite3.Connection, queue: str, now: float) -> QueueStats:
    """Ready includes what came due, or whose lease ended, and was not claimed yet."""
    ready = db.execute("SELECT count(*) FROM message WHERE queue = ? AND due = 0", (queue,)).fetchone()[0]
    oldest = db.execute(_OLDEST, (queue,)).fetchone()[0]
    come, come_oldest = db.execute(
        "SELECT count(*), min(born) FROM message WHERE queue = ? AND due > 0 AND due <= ?", (queue, now)
    ).fetchone()
    later, leased = db.execute(
        "SELECT count(*), count(epoch) FROM message WHERE queue = ? AND due > 0 AND due > ?", (queue, now)
    ).fetchone()
    dead = db.execute("SELECT count(*) FROM dead WHERE queue = ?", (queue,)).fetchone()[0]
    ages = [max(now - born, 0.0) for born in (oldest, come_oldest) if born is not None]
    return QueueStats(ready + come, leased, later - leased, dead, max(ages, default=None))


def peek(db: sqlite3.Connection, queue: str, now: float, limit: int) -> list[Outgoing]:
    columns = "SELECT id, body, headers, rank, due FROM message WHERE"
    ready = db.execute(
        f"{columns} queue = ? AND due = 0 ORDER BY rank, born, seq LIMIT ?",
        (queue, limit),
    ).fetchall()
    if len(ready) < limit:
        ready += db.execute(
            f"{columns} queue = ? AND due > 0 AND (due <= ? OR epoch IS NULL) ORDER BY due, rank, seq LIMIT ?",
            (queue, now, limit - len(ready)),
        ).fetchall()
    return [
        Outgoing(queue, id_, body, headers_of(headers), 9 - rank, due if due > now else None)
        for id_, body, headers, rank, due in ready
    ]


def purge(database: Database, queue: str, now: float) -> int:
    """In steps, and only what is there now: a purge beside busy senders ends."""
    last = database.read(lambda db: db.execute("SELECT max(seq) FROM message").fetchone()[0]) or 0
    total = 0
    for waiting, values in (("due = 0", ()), ("due > 0 AND (due <= ? OR epoch IS NULL)", (now,))):
        some = f"SELECT seq FROM message WHERE queue = ? AND {waiting} AND seq <= ? LIMIT {_AT_ONCE}"  # noqa: S608
        step = partial(_delete, f"DELETE FROM message WHERE seq IN ({some})", (queue, *values, last))  # noqa: S608
        while (count := database.write(step)) > 0:
            total += count
    return total


def _delete(statement: str, values: tuple[object, ...], db: sqlite3.Connection) -> int:
    return db.execute(statement, values).rowcount


def headers_of(block: bytes) -> dict[str, str]:
    """The headers; none if the row is damaged: the worker then puts the message aside, with a reason."""
    try:
        return unpack_headers(block)
    except DecodeError:
        return {}


# --- dead letters ------------------------------------------------------------------------------------------


def dead_list(db: sqlite3.Connection, queue: str | None, limit: int) -> list[DeadLetter]:
    where, values = ("", ()) if queue is None else ("WHERE queue = ?", (queue,))
    rows = db.execute(f"{_DEAD} {where} ORDER BY seq DESC LIMIT ?", (*values, limit))
    return [_letter(row) for row in rows]


def dead_get(db: sqlite3.Connection, ids: Sequence[str]) -> list[DeadLetter]:
    return [_letter(row) for marks, chunk in spread(ids) for row in db.execute(f"{_DEAD} WHERE id IN ({marks})", chunk)]


def dead_purge(db: sqlite3.Connection, ids: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for marks, chunk in spread(ids):
        rows = db.execute(f"DELETE FROM dead WHERE id IN ({marks}) RETURNING id", chunk).fetchall()  # noqa: S608
        found.update((row[0], None) for row in rows)
    return list(found)


def _letter(row: tuple[str, str, bytes, bytes, str, float, int]) -> DeadLetter:
    id_, queue, body, headers, reason, died, count = row
    return DeadLetter(id_, queue, body, headers_of(headers), reason, died, count)


# --- tombstones --------------------------------------------------------------------------------------------


def bury(database: Database, marks: Mapping[str, str], expires_at: float, hasten: bool) -> set[str]:
    """The bells to ring after the commit.

    There is no index on ids: delayed messages are looked for beside the writers. One that comes in meanwhile waits for
    its time; the worker that gets it asks for tombstones then.
    """
    ids = list(marks)

    def look(db: sqlite3.Connection) -> list[tuple[int, str]]:
        return [
            row
            for places, chunk in spread(ids)
            for row in db.execute(
                f"SELECT seq, queue FROM message WHERE due > 0 AND epoch IS NULL AND id IN ({places})",  # noqa: S608
                chunk,
            )
        ]

    delayed = database.read(look) if hasten and ids else []

    def work(db: sqlite3.Connection) -> set[str]:
        rows = [(id_, mark, expires_at) for id_, mark in marks.items()]
        db.executemany("INSERT OR REPLACE INTO tombstone VALUES (?, ?, ?)", rows)
        update = "UPDATE message SET due = 0 WHERE seq = ? AND due > 0 AND epoch IS NULL"
        queues_ = {queue for seq, queue in delayed if db.execute(update, (seq,)).rowcount}
        return take_waiters(db, queue_keys(queues_)) if queues_ else set()

    return database.write(work) if ids else set()


def buried(db: sqlite3.Connection, ids: Sequence[str], now: float) -> dict[str, str]:
    found: dict[str, str] = {}
    if db.execute("SELECT 1 FROM tombstone LIMIT 1").fetchone():
        for marks, chunk in spread(ids):
            statement = f"SELECT id, mark FROM tombstone WHERE id IN ({marks}) AND expires > ?"  # noqa: S608
            found.update(db.execute(statement, (*chunk, now)))
    return found
