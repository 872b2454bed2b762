"""The embedded transport: one SQLite file, no server. Statements that look into queues are in ``_sqlite_admin``."""

from __future__ import annotations

import itertools
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from dray.core.contracts import Consumer, Durability, PluginContext, Seconds, Transport, TransportFeatures
from dray.core.errors import ConfigError, TooLarge
from dray.core.message import Action, DeadLetter, Delivery, Outgoing, QueueStats, Settlement
from dray.core.wire import pack_headers
from dray.plugins import _sqlite_admin as admin
from dray.plugins import _sqlite_bell as bells
from dray.plugins._sqlite import MAX_BODY_BYTES, WORKER_LOG_BYTES, Database, database_path, spread
from dray.plugins._sqlite_broadcast import Audience, say

_INSERT = "INSERT INTO message (queue, id, rank, due, count, born, headers, body) VALUES (?, ?, ?, ?, 0, ?, ?, ?)"
# Messages that came due, and those whose lease ended. The epoch stays: until someone else claims it, the old receipt
# is good. More at a time than a claim takes, so that the promoted are sorted by priority.
_PROMOTE = """
UPDATE message SET due = 0 WHERE seq IN (
    SELECT seq FROM message WHERE queue = ? AND due > 0 AND due <= ? ORDER BY due LIMIT 1000)"""
_CLAIM = """
UPDATE message SET due = ?, epoch = ?, count = count + 1 WHERE seq IN (
    SELECT seq FROM message WHERE queue = ? AND due = 0 ORDER BY rank, born, seq LIMIT ?)
RETURNING rank, born, seq, id, headers, body, count"""
_NEXT_DUE = "SELECT due FROM message WHERE queue = ? AND due > 0 ORDER BY due LIMIT 1"
_BURY = """
INSERT INTO dead (queue, id, rank, count, died, reason, headers, body)
    SELECT queue, id, rank, count, ?, ?, headers, body FROM message WHERE seq = ?"""
_RELEASE = "UPDATE message SET due = 0, epoch = NULL, count = count - 1 WHERE seq = ?"
_RECOVER = "UPDATE message SET due = 0 WHERE due > 0 AND epoch BETWEEN ? AND ?"

_OWNER_SHIFT = 32
_SWEEP_EVERY_S = 60.0
_CHECK_OWNERS_EVERY_S = 1.0

_Row = tuple[str, str, int, float, float, bytes, bytes]


class _Nothing(NamedTuple):
    """What a claim in vain learned."""

    next_due: float
    """When something becomes ready by itself; ``inf``: never."""
    owners: tuple[tuple[int, str], ...]
    """Other transports that may hold leases: number and bell."""


class SqliteTransport(Transport):
    """Messages in one table of a SQLite file that any number of processes on one machine share.

    Responsibilities: stores, claims, settles and extends in one transaction per batch; rings waiting consumers; gives
    back what dead workers held. A claim writes its epoch into the rows it takes; a receipt ``(seq, epoch)`` is good
    as long as the row still carries that epoch, that is until another consumer claims it, even past the lease's end.
    Epochs are never used twice: the number of their transport (of the table ``owner``) and a counter.
    """

    api: ClassVar[int] = 1
    features = TransportFeatures(
        durability=Durability.D2,
        lease_s=30.0,
        max_delay_s=math.inf,
        priorities=10,
        atomic_then=True,
        dead_letter=True,
        release=True,
        max_body_bytes=MAX_BODY_BYTES,
        hastens=True,
    )

    @dataclass(frozen=True, slots=True)
    class Options:
        """One of ``url`` and ``path``, or neither: ``.dray/dray.db``."""

        url: str | None = None
        """``sqlite:///relative.db`` or ``sqlite:////absolute/path.db``."""
        path: str | None = None
        """A path instead of a URL; relative to the configuration\'s folder."""
        synchronous: Literal["normal", "full"] = "normal"
        """``full``: each commit reaches the disk, and survives a power loss."""
        lease: Seconds = 30.0
        """How long a delivery is guarded; the worker renews it while the task runs."""
        busy_timeout: Seconds = 10.0
        """How long to wait for another process that keeps the file locked."""
        dead_expires: Seconds = 30 * 86400.0
        """How long dead letters are kept."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        if options.lease <= 0:
            raise ConfigError(f"sqlite: lease must be more than 0 seconds, not {options.lease:g}")
        durability = Durability.D3 if options.synchronous == "full" else Durability.D2
        self.features = replace(self.features, durability=durability, lease_s=options.lease)
        path = database_path(options.url, options.path, context.base)
        self.database = Database(path, options.synchronous, options.busy_timeout, context)
        self._logger: logging.Logger = context.logger
        self._audience = Audience(self.database, context.logger)
        self._now = context.clock.time
        self._owner: tuple[int, bells.Bell] | None = None
        self._owner_lock = threading.Lock()
        self._claims = itertools.count()
        self._owners_checked_at = -math.inf
        self._swept_at = -math.inf

    def open(self) -> None:
        self.database.open()

    def declare(self, queues: Sequence[str]) -> None:
        if queues:
            rows = [(queue,) for queue in queues]
            self.database.write(lambda db: db.executemany("INSERT OR IGNORE INTO queue VALUES (?)", rows))

    def close(self) -> None:
        self._audience.close()
        with self._owner_lock:
            owner, self._owner = self._owner, None
        if owner is not None:
            number, bell = owner
            bell.close()
            admin.try_write(self.database, lambda db: db.execute("DELETE FROM owner WHERE id = ?", (number,)))
        self.database.close()

    # --- sending and settling ------------------------------------------------------------------------------

    def send(self, messages: Sequence[Outgoing]) -> None:
        rows = self._rows(messages)
        keys = bells.queue_keys(row[0] for row in rows)

        def work(db: sqlite3.Connection) -> set[str]:
            db.executemany(_INSERT, rows)
            return bells.take_waiters(db, keys)

        if rows:
            bells.ring(self.database.path, self.database.write(work))

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        if not settlements:
            return []
        follow_ups = [self._rows(settlement.then) if settlement.then else [] for settlement in settlements]
        lost, waiters = self.database.write(lambda db: self._settle(db, settlements, follow_ups))
        bells.ring(self.database.path, waiters)
        return lost

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        if not deliveries:
            return []
        until = self._now() + lease_s

        def work(db: sqlite3.Connection) -> list[Delivery]:
            pairs = list(zip(deliveries, _ownership(db, deliveries), strict=True))
            rows = [(until, delivery.receipt[0]) for delivery, ours in pairs if ours]
            db.executemany("UPDATE message SET due = ? WHERE seq = ?", rows)
            return [delivery for delivery, ours in pairs if not ours]

        return self.database.write(work)

    def _settle(
        self, db: sqlite3.Connection, settlements: Sequence[Settlement], follow_ups: Sequence[list[_Row]]
    ) -> tuple[list[Delivery], set[str]]:
        """Those that were not ours, and the bells to ring after the commit."""
        is_ours = _ownership(db, [settlement.delivery for settlement in settlements])
        gone: list[tuple[int]] = []
        released: list[tuple[int]] = []
        rows: list[_Row] = []
        ready: set[str] = set()
        for (delivery, action, _, reason), ours, then in zip(settlements, is_ours, follow_ups, strict=True):
            if not ours:
                continue
            seq = delivery.receipt[0]
            rows += then
            if action is Action.RELEASE:
                released.append((seq,))
                ready.add(delivery.queue)
                continue
            if action is Action.DEAD:
                db.execute(_BURY, (self._now(), reason or "", seq))
            gone.append((seq,))
        db.executemany("DELETE FROM message WHERE seq = ?", gone)
        db.executemany(_RELEASE, released)
        db.executemany(_INSERT, rows)
        ready.update(row[0] for row in rows)
        lost = [each.delivery for each, ours in zip(settlements, is_ours, strict=True) if not ours]
        return lost, bells.take_waiters(db, bells.queue_keys(ready))

    def _rows(self, messages: Iterable[Outgoing]) -> list[_Row]:
        now, rows = self._now(), []
        for queue, id_, body, headers, priority, not_before, _ in messages:
            block = pack_headers(headers)
            size = len(body) + len(block) - max(2 * len(headers) - 1, 0)  # without the separators
            if size > MAX_BODY_BYTES:
                raise TooLarge(
                    f"message {id_} for queue {queue!r} is {size:,} bytes, headers included; "
                    f"sqlite takes {MAX_BODY_BYTES:,}: store the data elsewhere and pass a reference to it"
                )
            due = not_before if not_before is not None and not_before > now else 0
            rows.append((queue, id_, 9 - priority, due, due or now, block, body))
        return rows

    # --- receiving -----------------------------------------------------------------------------------------

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        del buffer  # nothing is held unclaimed
        self.database.log_limit_bytes = WORKER_LOG_BYTES
        self.declare(queues)
        with self._owner_lock:
            if self._owner is None:
                # Those of dead owners stay: they prove the death, and recover() still has to see it.
                owners = self.database.read(lambda db: db.execute("SELECT bell FROM owner").fetchall())
                bells.sweep_bells(self.database.path, {row[0] for row in owners})
                self._owner = self._register()
        return SqliteConsumer(self, tuple(dict.fromkeys(queues)), bells.Bell(self.database.path))

    def _register(self) -> tuple[int, bells.Bell]:
        bell = bells.Bell(self.database.path)
        insert = "INSERT INTO owner (bell) VALUES (?) RETURNING id"
        return self.database.write(lambda db: db.execute(insert, (bell.name,)).fetchone()[0]), bell

    def claim(self, queues: Sequence[str], limit: int, bell: bells.Bell | None) -> list[Delivery] | _Nothing:
        """Up to ``limit`` messages; or nothing, and then ``bell`` is rung when one comes."""
        now = self._now()
        if now - self._swept_at >= _SWEEP_EVERY_S:
            self._swept_at = now
            admin.try_write(self.database, lambda db: admin.sweep(db, now, now - self.options.dead_expires))
        number, until = self._owner[0] if self._owner else 0, now + self.options.lease
        epoch = number << _OWNER_SHIFT | next(self._claims)

        def work(db: sqlite3.Connection) -> list[Delivery] | _Nothing:
            found: list[Delivery] = []
            for queue in queues:
                db.execute(_PROMOTE, (queue, now))
                taken = db.execute(_CLAIM, (until, epoch, queue, limit - len(found))).fetchall()
                taken.sort()  # by rank, born and seq: RETURNING promises no order
                for _, _, seq, id_, headers, body, count in taken:
                    found.append(Delivery(queue, id_, body, admin.headers_of(headers), (seq, epoch), count, until))
                if len(found) >= limit:
                    break
            if found or bell is None:
                return found
            bells.await_ring(db, bells.queue_keys(queues), bell)
            due = [row[0] for queue in queues for row in db.execute(_NEXT_DUE, (queue,))]
            owners = db.execute("SELECT id, bell FROM owner WHERE id <> ?", (number,)).fetchall() if due else ()
            return _Nothing(min(due, default=math.inf), tuple(owners))

        return self.database.write(work)

    def recover(self, owners: Iterable[tuple[int, str]]) -> bool:
        """Give back at once what the dead among these owners held; True if one was dead. Looks once a second at most.

        The delivery count stays charged: the message may be what killed them.
        """
        if time.monotonic() - self._owners_checked_at < _CHECK_OWNERS_EVERY_S:
            return False
        self._owners_checked_at = time.monotonic()
        dead = [(number, bell) for number, bell in owners if bells.answers(self.database.path, bell) is False]

        def work(db: sqlite3.Connection) -> None:
            for number, _ in dead:
                first = number << _OWNER_SHIFT
                given_back = db.execute(_RECOVER, (first, first + (1 << _OWNER_SHIFT) - 1)).rowcount
                db.execute("DELETE FROM owner WHERE id = ?", (number,))
                if given_back:
                    self._logger.warning("a worker died; %d messages it held are ready again", given_back)

        if dead:
            self.database.write(work)
            for _, bell in dead:
                bells.remove(self.database.path, bell)
        return bool(dead)

    # --- what everybody hears ------------------------------------------------------------------------------

    def broadcast(self, channel: str, payload: bytes) -> None:
        now = self._now()
        bells.ring(self.database.path, self.database.write(lambda db: say(db, channel, payload, now)))

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        return self._audience.add(channel, deliver)

    # --- what lies in the queues, dead letters, tombstones -------------------------------------------------

    def queues(self) -> list[str]:
        return self.database.read(admin.queues)

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        return self.database.read(lambda db: {queue: admin.stats(db, queue, self._now()) for queue in queues})

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        return self.database.read(lambda db: admin.peek(db, queue, self._now(), limit))

    def purge(self, queue: str) -> int:
        return admin.purge(self.database, queue, self._now())

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        return self.database.read(lambda db: admin.dead_list(db, queue, limit))

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        return self.database.read(lambda db: admin.dead_get(db, ids))

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        return self.database.write(lambda db: admin.dead_purge(db, ids))

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        bells.ring(self.database.path, admin.bury(self.database, marks, expires_at, hasten))

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        return self.database.read(lambda db: admin.buried(db, ids, self._now()))

    def exhume(self, ids: Sequence[str]) -> None:
        rows = [(id_,) for id_ in ids]
        self.database.write(lambda db: db.executemany("DELETE FROM tombstone WHERE id = ?", rows))


class SqliteConsumer(Consumer):
    """Claims for one thread, and sleeps on a bell while there is nothing."""

    def __init__(self, transport: SqliteTransport, queues: tuple[str, ...], bell: bells.Bell) -> None:
        self._transport = transport
        self._queues = queues
        self._bell = bell
        self._now = transport.context.clock.time

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        if limit <= 0:
            return []
        deadline = time.monotonic() + timeout_s  # real time, as the pipe's: a test's clock cannot end a system call
        while True:
            left_s = deadline - time.monotonic()
            found = self._transport.claim(self._queues, limit, self._bell if left_s > 0 else None)
            if not isinstance(found, _Nothing):
                return found
            if not self._sleep(found, deadline):
                return []

    def _sleep(self, nothing: _Nothing, deadline: float) -> bool:
        """Until there may be something (True), or :meth:`wake` (False)."""
        while not self._transport.recover(nothing.owners):
            until_due_s = max(nothing.next_due - self._now(), 0)
            left_s = min(deadline - time.monotonic(), until_due_s)
            pause_s = min(left_s, _CHECK_OWNERS_EVERY_S) if nothing.owners else left_s
            heard = self._bell.wait(pause_s)
            if heard:
                return bells.WAKE not in heard
            if pause_s >= left_s:
                return True
        return True

    def wake(self) -> None:
        self._bell.wake()

    def close(self) -> None:
        self._bell.close()
        admin.try_write(self._transport.database, lambda db: bells.forget_rings(db, self._bell))


def _ownership(db: sqlite3.Connection, deliveries: Sequence[Delivery]) -> list[bool]:
    """For each: is it still ours? One that is given twice is ours once."""
    epochs: dict[int, int | None] = {}
    for marks, chunk in spread([delivery.receipt[0] for delivery in deliveries]):
        epochs.update(db.execute(f"SELECT seq, epoch FROM message WHERE seq IN ({marks})", chunk))  # noqa: S608
    # A stale delivery of a message may stand before the current one: only the owner uses the message up.
    return [
        epochs.get(seq) == epoch and epochs.pop(seq) is not None
        for seq, epoch in (delivery.receipt for delivery in deliveries)
    ]
