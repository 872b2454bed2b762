"""The database file that the SQLite transport and the SQLite result back end share."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from dray.core.contracts import PluginContext
from dray.core.errors import ConfigError, TransportError, Unavailable, Uncertain

T = TypeVar("T")

MAX_BODY_BYTES = 16 * 2**20
WORKER_LOG_BYTES = 16 * 2**20
"""Past this size a worker writes the write-ahead log back, long before a sender would have to."""
_SENDER_LOG_BYTES = 64 * 2**20
_APPLICATION_ID = 0x64726179  # "dray": tells our files from other programs'
_SCHEMA_VERSION = 1

# Messages are handed out by rank (9 - priority) and born: when they were sent, or came due if that was later.
# Ready messages have due = 0; others (delayed, or leased: epoch set) the time at which they are to become ready.
# Partial indexes keep the two apart, so that a claim looks at exactly the rows it takes, however many others there are.
# There is no index on message.id: only bury() would use it, and it would slow every send by a third.
_SCHEMA = """
CREATE TABLE message (
    seq INTEGER PRIMARY KEY, queue TEXT NOT NULL, id TEXT NOT NULL, rank INTEGER NOT NULL, due REAL NOT NULL,
    epoch INTEGER, count INTEGER NOT NULL, born REAL NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX message_ready ON message (queue, rank, born) WHERE due = 0;
CREATE INDEX message_due ON message (queue, due) WHERE due > 0;
CREATE TABLE dead (
    seq INTEGER PRIMARY KEY, queue TEXT NOT NULL, id TEXT NOT NULL, rank INTEGER NOT NULL, count INTEGER NOT NULL,
    died REAL NOT NULL, reason TEXT NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX dead_id ON dead (id);
CREATE INDEX dead_died ON dead (died);
CREATE TABLE tombstone (id TEXT PRIMARY KEY, mark TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX tombstone_expires ON tombstone (expires);
CREATE TABLE queue (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE owner (id INTEGER PRIMARY KEY AUTOINCREMENT, bell TEXT NOT NULL);
CREATE TABLE broadcast (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, channel TEXT NOT NULL, said REAL NOT NULL, payload BLOB NOT NULL);
CREATE TABLE waiter (key TEXT, bell TEXT, PRIMARY KEY (key, bell)) WITHOUT ROWID;
CREATE INDEX waiter_bell ON waiter (bell);
CREATE TABLE result (id TEXT PRIMARY KEY, state TEXT NOT NULL, expires REAL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX result_expires ON result (expires) WHERE expires IS NOT NULL;
CREATE TABLE barrier (
    name TEXT PRIMARY KEY, arrived INTEGER NOT NULL, last TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX barrier_expires ON barrier (expires);
CREATE TABLE barrier_member (barrier TEXT, member TEXT, PRIMARY KEY (barrier, member)) WITHOUT ROWID;
"""


def database_path(url: str | None, path: str | None, base: Path) -> Path:
    """The file that the options name; default ``.dray/dray.db`` under ``base``."""
    if url is not None and path is not None:
        raise ConfigError("sqlite: give either url or path, not both")
    if url is not None:
        scheme, separator, rest = url.partition(":///")
        if scheme != "sqlite" or not separator or "?" in rest:
            raise ConfigError("sqlite: the url is not sqlite:///relative.db or sqlite:////absolute/path.db")
        path = unquote(rest)
    if path == ":memory:":
        raise ConfigError("sqlite: a database in memory cannot be shared; use the memory plugin instead")
    return base / Path(path or ".dray/dray.db").expanduser()


def spread(values: Sequence[str | int]) -> Iterator[tuple[str, list[str | int]]]:
    """``values`` in chunks, each with its ``?,?,...``; few distinct sizes, so that prepared statements are reused."""
    at = 0
    while at < len(values):
        left = len(values) - at
        size = next((size for size in (1, 16, 128) if left <= size), 512)
        chunk = list(values[at : at + size])
        yield ",".join("?" * size), chunk + chunk[-1:] * (size - len(chunk))
        at += size


class _Connection(sqlite3.Connection):
    inode: int


class Database:
    """One database file.

    Responsibilities: creates the file and its schema; keeps idle connections; runs reads and transactions, waiting
    in short random steps while another process writes; maps driver errors; keeps the write-ahead log bounded; holds
    no connection while the process forks.

    Connections are pooled, not tied to threads: as many as calls overlap, whatever kind of thread makes them. A file
    that was deleted or replaced is noticed at the next call, and opened (or made) anew.
    """

    def __init__(self, path: Path, synchronous: str, busy_timeout_s: float, context: PluginContext) -> None:
        self.path = path
        self.log_limit_bytes = _SENDER_LOG_BYTES
        """The write-ahead log is written back past this size, and not let grow past twice this size."""
        self._log = f"{path}-wal"
        self._synchronous = synchronous
        self._busy_timeout_s = busy_timeout_s
        self._logger = context.logger
        self._random = random.Random(context.random.getrandbits(64) ^ os.getpid())
        self._log_patience_bytes = 0
        self._idle: list[_Connection] = []
        self._busy = 0
        self._closed = False
        self._gate = threading.Condition(threading.Lock())
        self._turn = threading.Lock()
        self._writing_back = threading.Lock()
        _guard_forks(self)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in one transaction that holds the write lock from its start; commit.

        ``Unavailable``: nothing was done. ``Uncertain``: the commit failed in a way that may have left it done.
        """
        # Threads of this process queue on a lock of ours, which hands over at once; SQLite's can only be polled.
        if not self._turn.acquire(timeout=self._busy_timeout_s):
            raise Unavailable(f"{self.path}: other threads of this process kept it busy for {self._busy_timeout_s:g} s")
        try:
            with self._connection() as connection:
                self._retry(lambda: connection.execute("BEGIN IMMEDIATE"))
                result = self._transact(connection, work)
        finally:
            self._turn.release()
        self._bound_log()
        return result

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work``, which only reads, on one consistent state of the database."""

        def attempt() -> T:
            connection.execute("BEGIN")
            try:
                return work(connection)
            finally:
                _roll_back(connection)

        with self._connection() as connection:
            return self._retry(attempt)

    def open(self) -> None:
        """Make the file if need be, and check that it can be written."""
        self._closed = False
        self.write(lambda connection: connection.execute("UPDATE queue SET name = name WHERE 0"))

    def close(self) -> None:
        """Close all connections; what others are just using is closed when they are through."""
        with self._gate:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            result = work(connection)
        except BaseException:
            _roll_back(connection)
            raise
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # A log frame with the commit mark may be on disk after an I/O error; not after any other.
            _roll_back(connection)
            if _code(error) == sqlite3.SQLITE_IOERR:
                raise Uncertain(f"{self.path}: writing failed during the commit: {error}") from error
            raise
        return result

    # --- connections ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._gate:
            if self._closed:
                raise Unavailable(f"{self.path}: closed already")
            self._busy += 1
            connection = self._idle.pop() if self._idle else None
        try:
            if connection is not None and not self._is_current(connection):
                self._logger.warning("%s was deleted or replaced while in use: opening it anew", self.path)
                connection.close()
                connection = None
            if connection is None:
                connection = self._retry(self._connect)
            yield connection
        except (sqlite3.Error, OSError) as error:
            if connection is not None and _code(error) != sqlite3.SQLITE_BUSY:
                connection.close()
                connection = None
            raise self._explain(error) from error
        finally:
            with self._gate:
                self._busy -= 1
                if connection is not None:
                    _roll_back(connection)  # left open only by an interrupt between two statements
                    if self._closed:
                        connection.close()
                    else:
                        self._idle.append(connection)
                if not self._busy:
                    self._gate.notify_all()

    def _is_current(self, connection: _Connection) -> bool:
        try:
            return os.stat(self.path).st_ino == connection.inode
        except FileNotFoundError:
            return False

    def _connect(self) -> _Connection:
        folder = self.path.parent
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if folder.name == ".dray":
                (folder / ".gitignore").write_text("*\n")
        connection = sqlite3.connect(
            self.path, timeout=0, isolation_level=None, check_same_thread=False, factory=_Connection
        )
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                self._create(connection)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise Unavailable(
                    f"{self.path} was made by a newer dray (schema {version}, this one knows {_SCHEMA_VERSION}): "
                    "upgrade dray here, or use another file"
                )
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            # Written back by _bound_log, never inside a commit; freed space is not wiped; 8 MB of cache.
            for pragma in ("wal_autocheckpoint=0", "secure_delete=OFF", "cache_size=-8000", "temp_store=MEMORY"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.inode = os.stat(self.path).st_ino
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        """Make the schema; two processes may try at once."""
        # Small pages: a single send changes three of them, and whole pages go to the log.
        connection.execute("PRAGMA page_size=2048")
        connection.execute("PRAGMA auto_vacuum=NONE")
        if connection.execute("SELECT EXISTS (SELECT 1 FROM sqlite_master)").fetchone()[0]:
            if connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
                return
            raise Unavailable(f"{self.path} is a database of another program: give dray a file of its own")
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise Unavailable(
                f"{self.path}: this file system cannot share memory between processes, which WAL mode needs"
            )
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        connection.execute("COMMIT")

    def _retry(self, attempt: Callable[[], T]) -> T:
        """Call again while another process holds the lock. SQLite's own waiting would sleep up to 100 ms at a time."""
        deadline, pause_s = 0.0, 0.0
        while True:
            try:
                return attempt()
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY:
                    raise
                now = time.monotonic()
                deadline = deadline or now + self._busy_timeout_s
                if now >= deadline:
                    raise
            pause_s = min(pause_s + 0.0002, 0.001)
            time.sleep(pause_s * self._random.uniform(0.5, 1.0))

    def _explain(self, error: Exception) -> TransportError:
        code = _code(error)
        if code == sqlite3.SQLITE_BUSY:
            reason = f"another process kept it locked for {self._busy_timeout_s:g} s (a backup, or a database browser?)"
        elif code == sqlite3.SQLITE_FULL:
            reason = "the disk, or the quota, is full: make room, then try again"
        elif code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM} or isinstance(
            error, OSError
        ):
            reason = f"the file and its folder must exist and be writable: {error}"
        elif code in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}:
            reason = f"not a database, or damaged ({error}): restore it, or move it away and let dray make a new one"
        else:
            reason = f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
        return Unavailable(f"{self.path}: {reason}")

    # --- the write-ahead log -------------------------------------------------------------------------------

    def _bound_log(self) -> None:
        try:
            log_bytes = os.stat(self._log).st_size
        except FileNotFoundError:
            return
        if log_bytes > max(self.log_limit_bytes, self._log_patience_bytes) and self._writing_back.acquire(
            blocking=False
        ):
            try:
                self._write_back(log_bytes)
            finally:
                self._writing_back.release()

    def _write_back(self, log_bytes: int) -> None:
        """Copy the log into the database, beside other writers. If none was writing, the next starts the log anew.

        Else it grows; past twice the limit writers are made to wait until it is copied and emptied.
        """
        # The file keeps its length when the log starts anew, so the next time is when it grew some more.
        self._log_patience_bytes = log_bytes + self.log_limit_bytes // 4
        with self._connection() as connection:
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if log_bytes > 2 * self.log_limit_bytes:
                    connection.execute("PRAGMA busy_timeout=20")
                    if not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                        self._log_patience_bytes = 0
                    connection.execute("PRAGMA busy_timeout=0")
            except sqlite3.Error as error:  # what was committed is safe in the log
                self._logger.warning("%s: the write-ahead log could not be written back: %s", self.path, error)

    # --- forks ---------------------------------------------------------------------------------------------

    def before_fork(self) -> bool:
        """Let running calls end, close all, keep new ones out until the fork is over.

        SQLite keeps one record of a file's locks per process. A child that inherits it believes in locks that only
        its parent holds, and takes none itself: so there must be nothing to inherit. False: gave up, after a second.
        """
        if not self._gate.acquire(timeout=1.0):
            return False
        self._gate.wait_for(lambda: not self._busy, timeout=1.0)
        while self._idle:
            self._idle.pop().close()
        return True

    def after_fork(self) -> None:
        """The fork is over, on either side."""
        self._gate.release()


def _guard_forks(database: Database) -> None:
    reference = weakref.ref(database)

    def before() -> None:
        if (live := reference()) is not None and live.before_fork():
            held.append(live)

    def after() -> None:
        while held:
            held.pop().after_fork()

    held: list[Database] = []
    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)


def _roll_back(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):  # a failed one is undone by closing the connection, which follows
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # without the extended part
