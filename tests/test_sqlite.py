"""What only SQLite can get wrong: one file shared by processes, its locks, its log, and how waiters are woken."""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import Durability
from dray.core.errors import ConfigError, TooLarge, Unavailable, Uncertain
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.plugins import _sqlite_bell as bells
from dray.plugins._sqlite import MAX_BODY_BYTES
from dray.plugins.backends.sqlite import SqliteBackend
from dray.plugins.transports.sqlite import SqliteTransport
from dray.testing import FakeClock, plugin_context

PATIENCE_S = 20.0


class Shop:
    """Makes transports and back ends on one file, and processes beside; closes and ends them all."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.file = base / ".dray" / "dray.db"
        self._closers: list[Callable[[], object]] = []

    def transport(self, clock: Clock | None = None, **options: Any) -> SqliteTransport:
        context = plugin_context("sqlite", clock or SystemClock(), self.base)
        transport = SqliteTransport(SqliteTransport.Options(**options), context)
        self._closers.append(transport.close)
        return transport

    def backend(self, clock: Clock | None = None, **options: Any) -> SqliteBackend:
        backend = SqliteBackend(
            SqliteBackend.Options(**options), plugin_context("sqlite", clock or SystemClock(), self.base)
        )
        self._closers.append(backend.close)
        return backend

    def process(self, code: str) -> subprocess.Popen[str]:
        """Runs ``code`` with ``transport``, ``backend`` and ``message`` at hand; waits for its first line."""
        head = f"""
            import os, sys, time
            from pathlib import Path
            from dray.core.clock import SystemClock
            from dray.core.message import *
            from dray.plugins.backends.sqlite import SqliteBackend
            from dray.plugins.transports.sqlite import SqliteTransport
            from dray.testing import plugin_context
            context = plugin_context("sqlite", SystemClock(), Path({str(self.base)!r}))
            transport = SqliteTransport(SqliteTransport.Options(), context)
            backend = SqliteBackend(SqliteBackend.Options(), context)
            message = lambda id: Outgoing("q", id, b"body", {{}})
            say = lambda text: print(text, flush=True)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._closers.append(lambda: end(child))
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], PATIENCE_S)[0], "the process says nothing"
        child.first_line = child.stdout.readline().strip()  # type: ignore[attr-defined]
        return child

    def rows(self, statement: str) -> list[Any]:
        connection = sqlite3.connect(self.file)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.close()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def message(id_: str = "m", queue: str = "q", **more: Any) -> Outgoing:
    return Outgoing(queue, id_, b"body", {"task": "t"}, **more)


def result(id_: str, state: State = State.SUCCESS, expires_at: float | None = None) -> StoredResult:
    return StoredResult(id_, state, b"1", expires_at)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.id for delivery in deliveries]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.01)


# --- options and files -------------------------------------------------------------------------------------


def test_the_default_is_a_file_in_a_folder_that_git_ignores(shop: Shop) -> None:
    shop.transport().open()
    assert shop.file.is_file()
    assert (shop.file.parent / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize("form", ["url relative", "url absolute", "path"])
def test_url_and_path_name_the_file(shop: Shop, form: str) -> None:
    options = {
        "url relative": {"url": "sqlite:///sub/a%20b.db"},
        "url absolute": {"url": f"sqlite:///{shop.base}/sub/a b.db"},
        "path": {"path": "sub/a b.db"},
    }[form]
    shop.transport(**options).open()
    assert (shop.base / "sub" / "a b.db").is_file()
    assert not (shop.base / "sub" / ".gitignore").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"url": "sqlite:///a.db", "path": "b.db"},
        {"url": "sqlite:a.db"},
        {"url": "sqlite:///a.db?mode=ro"},
        {"path": ":memory:"},
        {"lease": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(shop: Shop, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        shop.transport(**options)


def test_synchronous_decides_the_durability(shop: Shop) -> None:
    for kind in (shop.transport, shop.backend):
        assert kind().features.durability is Durability.D2  # type: ignore[operator]
        assert kind(synchronous="full").features.durability is Durability.D3  # type: ignore[operator]
    full = shop.transport(synchronous="full")
    assert full.database.read(lambda db: db.execute("PRAGMA synchronous").fetchone()[0]) == 2


def test_transport_and_backend_may_use_two_files(shop: Shop) -> None:
    transport, backend = shop.transport(path="a.db"), shop.backend(path="b.db")
    transport.send([message()])
    backend.store([result("m")])
    assert list(backend.fetch(["m"])) == ["m"]
    assert transport.stats(["q"])["q"].ready == 1


# --- errors ------------------------------------------------------------------------------------------------


def test_a_file_that_another_program_keeps_locked(shop: Shop) -> None:
    transport = shop.transport(busy_timeout=0.1)
    transport.open()
    other = sqlite3.connect(shop.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked") as caught:
        transport.send([message()])
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    other.close()
    transport.send([message("after")])
    assert ids(transport.consumer(["q"], 1).receive(9, 0)) == ["after"]


def test_a_full_disk_stores_nothing_and_is_survived(shop: Shop) -> None:
    transport = shop.transport()
    transport.open()
    pages = transport.database.read(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    transport.database.read(lambda db: db.execute(f"PRAGMA max_page_count={pages + 4}").fetchone())
    with pytest.raises(Unavailable, match="full"):
        transport.send([message(str(n))._replace(body=bytes(1000)) for n in range(100)])
    assert transport.stats(["q"])["q"].ready == 0
    transport.send([message("after")])
    assert ids(transport.consumer(["q"], 1).receive(9, 0)) == ["after"]


def test_a_folder_that_cannot_be_made(shop: Shop) -> None:
    (shop.base / "file").write_text("")
    with pytest.raises(Unavailable, match="writable"):
        shop.transport(path="file/dray.db").open()


def test_a_folder_in_the_place_of_the_file(shop: Shop) -> None:
    with pytest.raises(Unavailable, match="writable"):
        shop.transport(path=".").open()


def test_a_file_that_is_no_database(shop: Shop) -> None:
    (shop.base / "text.db").write_text("certainly not a database\n" * 1000)
    with pytest.raises(Unavailable, match="not a database"):
        shop.transport(path="text.db").open()


def test_the_database_of_another_program_is_left_alone(shop: Shop) -> None:
    other = sqlite3.connect(shop.base / "django.db")
    other.execute("CREATE TABLE auth_user (id)")
    other.commit()
    other.close()
    before = (shop.base / "django.db").read_bytes()
    with pytest.raises(Unavailable, match="another program"):
        shop.transport(path="django.db").open()
    assert (shop.base / "django.db").read_bytes() == before


def test_a_newer_schema_is_refused(shop: Shop) -> None:
    first = shop.transport()
    first.open()
    first.close()
    connection = sqlite3.connect(shop.file)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(Unavailable, match="newer dray"):
        shop.transport().open()


def test_damage_is_told_and_not_taken_for_an_empty_queue(shop: Shop) -> None:
    transport = shop.transport()
    transport.send([message(str(n)) for n in range(1000)])
    transport.close()
    with shop.file.open("r+b") as file:
        file.seek(2048)
        file.write(b"\xff" * (shop.file.stat().st_size - 2048))
    with pytest.raises(Unavailable, match="damaged"):
        shop.transport().send([message()])


def test_an_io_error_in_the_commit_is_uncertain(shop: Shop) -> None:
    class Broken:
        in_transaction = False

        def execute(self, statement: str) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

    with pytest.raises(Uncertain):
        shop.transport().database._transact(Broken(), lambda db: None)  # type: ignore[arg-type]


def test_an_interrupt_inside_a_transaction_undoes_it(shop: Shop) -> None:
    transport = shop.transport()

    def work(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO queue VALUES ('half')")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transport.database.write(work)
    transport.send([message()])
    assert transport.queues() == ["q"]


def test_a_deleted_file_is_made_anew(shop: Shop) -> None:
    transport = shop.transport()
    transport.send([message("lost")])
    for file in shop.file.parent.glob("dray.db*"):
        file.unlink()
    transport.send([message("kept")])
    assert ids(shop.transport().consumer(["q"], 1).receive(9, 0)) == ["kept"]


def test_a_damaged_row_is_handed_out_without_headers(shop: Shop) -> None:
    transport = shop.transport()
    transport.send([message()])
    transport.database.write(lambda db: db.execute("UPDATE message SET headers = x'FF'"))
    assert transport.consumer(["q"], 1).receive(1, 0)[0].headers == {}


def test_a_result_that_is_too_large_stores_nothing(shop: Shop) -> None:
    backend = shop.backend()
    with pytest.raises(TooLarge, match="reference"):
        backend.store([result("small"), result("large")._replace(body=bytes(MAX_BODY_BYTES + 1))])
    assert backend.fetch(["small", "large"]) == {}


# --- the write-ahead log -----------------------------------------------------------------------------------


def test_the_log_stays_bounded(shop: Shop) -> None:
    transport = shop.transport()
    transport.open()
    transport.database.log_limit_bytes = limit = 200_000
    log = shop.file.with_name("dray.db-wal")
    largest = 0
    for n in range(100):
        transport.send([message(f"{n}.{k}") for k in range(20)])
        largest = max(largest, log.stat().st_size)
    assert largest <= 2.5 * limit
    assert transport.stats(["q"])["q"].ready == 2000


def test_a_reader_that_holds_the_log_does_not_stop_senders(shop: Shop) -> None:
    transport = shop.transport()
    transport.open()
    transport.database.log_limit_bytes = 50_000
    reader = sqlite3.connect(shop.file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM message").fetchone()
    for n in range(100):
        transport.send([message(str(n))])
    reader.close()
    for n in range(100):
        transport.send([message(str(n))])
    assert shop.file.with_name("dray.db-wal").stat().st_size < 2_000_000
    assert transport.stats(["q"])["q"].ready == 200


# --- waking ------------------------------------------------------------------------------------------------


def test_no_wake_is_lost_between_processes(shop: Shop) -> None:
    """Each message is sent as soon as the one before arrived: just when the consumer goes to sleep."""
    consumer = shop.transport().consumer(["q"], 1)
    child = shop.process("say('ready')\nfor line in sys.stdin: transport.send([message(line.strip())])")
    assert child.stdin is not None
    for n in range(300):
        child.stdin.write(f"{n}\n")
        child.stdin.flush()
        assert ids(consumer.receive(9, PATIENCE_S)) == [str(n)]


def test_a_result_wakes_who_waits_in_another_process(shop: Shop) -> None:
    backend = shop.backend()
    backend.open()
    child = shop.process(
        "say('ready')\nfor line in sys.stdin: backend.store([StoredResult(line.strip(), State.SUCCESS, b'', None)])"
    )
    assert child.stdin is not None
    for n in range(100):
        others = [f"never-{k}" for k in range(100 if n % 2 else 3)]
        child.stdin.write(f"{n}\n")
        child.stdin.flush()
        assert list(backend.wait([*others, str(n)], PATIENCE_S)) == [str(n)]
    assert shop.rows("SELECT * FROM waiter") == []


def test_waiting_in_vain_leaves_nothing_behind(shop: Shop) -> None:
    backend = shop.backend()
    backend.store([result("started", State.STARTED)])
    assert backend.wait(["started"], 0.05) == {}
    assert shop.rows("SELECT * FROM waiter") == []
    backend.close()
    assert list(shop.file.with_name("dray.db-wake").iterdir()) == []


def test_a_consumer_can_be_woken_from_a_signal_handler(shop: Shop) -> None:
    consumer = shop.transport().consumer(["q"], 1)
    before = signal.signal(signal.SIGUSR1, lambda *_: consumer.wake())
    try:
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        started = time.monotonic()
        assert consumer.receive(1, PATIENCE_S) == []
        assert time.monotonic() - started < PATIENCE_S / 2
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_bells_of_the_dead_are_removed(shop: Shop) -> None:
    transport = shop.transport()
    transport.open()
    child = shop.process("c = transport.consumer(['q'], 1)\nsay('ready')\nc.receive(1, 60)")
    folder = shop.file.with_name("dray.db-wake")
    wait_until(lambda: shop.rows("SELECT * FROM waiter"))
    child.kill()
    child.wait()
    assert len(list(folder.iterdir())) == 2  # one to be woken by, one that shows it lives
    transport.send([message()])  # rings the first, and finds out
    assert shop.rows("SELECT * FROM waiter") == []
    assert len(list(folder.iterdir())) == 1
    os.mkfifo(folder / "stray")
    os.utime(folder / "stray", (1, 1))
    consumer = transport.consumer(["q"], 1)
    assert not (folder / "stray").exists()
    transport.send([message("later", not_before=time.time() + 60)])
    assert len(consumer.receive(9, 0)) == 1
    assert consumer.receive(9, 0.01) == []  # nothing to do: looks for dead owners
    assert len(list(folder.iterdir())) == 2  # those of this one
    consumer.close()
    transport.close()
    assert list(folder.iterdir()) == []


def test_a_bell_that_nobody_may_ring_proves_no_death(shop: Shop) -> None:
    shop.transport().open()
    assert bells.answers(shop.file, "not-there") is None


# --- processes that die ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["beside", "started later"])
def test_what_a_killed_worker_held_is_back_at_once(shop: Shop, other: str) -> None:
    transport = shop.transport()
    transport.send([message(str(n)) for n in range(3)])
    child = shop.process("say(len(transport.consumer(['q'], 1).receive(2, 0)))\ntime.sleep(60)")
    if other == "beside":
        consumer = transport.consumer(["q"], 1)
        assert ids(consumer.receive(9, 0)) == ["2"]
    child.kill()
    child.wait()
    if other == "started later":
        for bell in shop.file.with_name("dray.db-wake").iterdir():
            os.utime(bell, (1, 1))
        consumer = transport.consumer(["q"], 1)
        assert ids(consumer.receive(9, 0)) == ["2"]
    started = time.monotonic()
    back = consumer.receive(9, PATIENCE_S)
    assert [(delivery.id, delivery.delivery_count) for delivery in back] == [("0", 2), ("1", 2)]
    assert time.monotonic() - started < 10  # the lease would have been 30 seconds
    assert len(shop.rows("SELECT * FROM owner")) == 1


def test_a_lease_of_a_stopped_worker_ends_by_the_clock(shop: Shop) -> None:
    clock = FakeClock(time.time())
    transport = shop.transport(clock)
    transport.send([message()])
    child = shop.process("say(len(transport.consumer(['q'], 1).receive(1, 0)))\ntime.sleep(60)")
    os.kill(child.pid, signal.SIGSTOP)
    consumer = transport.consumer(["q"], 1)
    clock.advance(25)
    assert consumer.receive(1, 0.01) == []
    clock.advance(10)
    assert consumer.receive(1, 0)[0].delivery_count == 2


def test_a_worker_that_closed_while_tasks_run_is_not_taken_for_dead(shop: Shop) -> None:
    worker, other = shop.transport(), shop.transport()
    worker.send([message()])
    consumer = worker.consumer(["q"], 1)
    [delivery] = consumer.receive(1, 0)
    consumer.close()
    assert other.consumer(["q"], 1).receive(1, 0.05) == []
    assert worker.settle([Settlement(delivery, Action.ACK)]) == []


def test_a_sender_killed_at_any_moment_leaves_whole_batches(shop: Shop) -> None:
    transport = shop.transport()
    transport.open()
    child = shop.process("say('ready')\nwhile True: transport.send([message('x')] * 100)")
    wait_until(lambda: transport.stats(["q"])["q"].ready >= 1000)
    child.kill()
    child.wait()
    assert transport.stats(["q"])["q"].ready % 100 == 0
    assert shop.rows("PRAGMA integrity_check") == [("ok",)]
    transport.send([message()])


@pytest.mark.parametrize("ends", ["os._exit", "collected"])
def test_a_forked_child_with_its_own_instance_harms_nobody(shop: Shop, ends: str) -> None:
    """In a process of its own: forking a test runner that has threads is asking for trouble."""
    child = shop.process(f"""
        consumer = transport.consumer(["q"], 1)
        transport.send([message("before")])
        held = consumer.receive(1, 0)
        pid = os.fork()
        if pid == 0:
            mine = SqliteTransport(SqliteTransport.Options(), context)
            mine.send([message("child")])
            if {ends!r} == "collected":
                del transport, consumer
                mine.close()
                sys.exit(0)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        transport.send([message("parent")])
        assert transport.settle([Settlement(held[0], Action.ACK)]) == []
        say("forked")
        sys.stdin.readline()
        transport.send([message("late")])
        say("sent")
        sys.stdin.readline()
    """)
    assert child.first_line == "forked"  # type: ignore[attr-defined]
    assert child.stdin is not None
    assert child.stdout is not None
    # Whoever closes last removes the log, unless the parent's lock says that it is still there.
    visitor = shop.transport()
    assert visitor.stats(["q"])["q"].ready == 2
    visitor.close()
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "sent\n"
    reader = shop.transport()
    assert ids(reader.consumer(["q"], 1).receive(9, 0)) == ["child", "parent", "late"]
    assert shop.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_forked_child_that_outlives_its_parent_keeps_its_own_locks(shop: Shop) -> None:
    """With a lock that only the parent had, whoever comes and goes next would remove the log under the child."""
    child = shop.process("""
        transport.send([message("parent")])
        pid = os.fork()
        if pid == 0:
            mine = SqliteTransport(SqliteTransport.Options(), context)
            mine.send([message("child")])
            say("forked")
            sys.stdin.readline()
            mine.send([message("late")])
            say("sent")
            os._exit(0)
        os._exit(0)
    """)
    child.wait()
    assert child.stdin is not None
    assert child.stdout is not None
    visitor = shop.transport()
    assert visitor.stats(["q"])["q"].ready == 2
    visitor.close()
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "sent\n"
    assert ids(shop.transport().consumer(["q"], 1).receive(9, 0)) == ["parent", "child", "late"]
    assert shop.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_fork_in_the_middle_of_other_threads_writes(shop: Shop) -> None:
    child = shop.process("""
        import threading
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                transport.send([message("parent")])
        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads: thread.start()
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                mine = SqliteTransport(SqliteTransport.Options(), context)
                mine.send([message("child")])
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        for thread in threads: thread.join()
        say("done")
    """)
    assert child.first_line == "done"  # type: ignore[attr-defined]
    assert shop.rows("SELECT count(*) FROM message WHERE id = 'child'") == [(20,)]
    assert shop.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_forked_child_does_not_make_a_dead_parent_look_alive(shop: Shop) -> None:
    shop.transport().send([message()])
    child = shop.process("""
        consumer = transport.consumer(["q"], 1)
        assert consumer.receive(1, 0)
        pid = os.fork()
        if pid == 0:
            os.close(1)
            sys.stdin.readline()
            os._exit(0)
        say("forked")
        time.sleep(60)
    """)
    os.kill(child.pid, signal.SIGKILL)
    assert ids(shop.transport().consumer(["q"], 1).receive(1, PATIENCE_S)) == ["m"]


# --- many rows ---------------------------------------------------------------------------------------------


def test_a_claim_looks_at_the_rows_that_it_takes_only(shop: Shop) -> None:
    """Counted in steps of SQLite's own machine, which no busy neighbour disturbs."""

    def steps_of_a_claim() -> int:
        counted = 0

        def tick() -> int:
            nonlocal counted
            counted += 1
            return 0

        transport.database.read(lambda db: db.set_progress_handler(tick, 100))
        assert len(consumer.receive(100, 0)) == 100
        return counted

    transport = shop.transport()
    consumer = transport.consumer(["q"], 100)
    transport.send([message(str(n)) for n in range(200)])
    few = steps_of_a_claim()
    later = time.time() + 3600
    transport.send([message(str(n), not_before=later) for n in range(20_000)])
    transport.send([message(str(n), priority=n % 10) for n in range(20_000)])
    assert steps_of_a_claim() < few * 1.2


# --- keeping house -----------------------------------------------------------------------------------------


def test_tombstones_and_dead_letters_are_forgotten_in_time(shop: Shop) -> None:
    clock = FakeClock()
    transport = shop.transport(clock, dead_expires=1000.0)
    consumer = transport.consumer(["q"], 1)
    transport.bury({"buried": "revoked"}, clock.time() + 500)
    transport.send([message()])
    transport.settle([Settlement(consumer.receive(1, 0)[0], Action.DEAD, (), "poison")])
    clock.advance(499)
    consumer.receive(1, 0)
    assert transport.buried(["buried"]) == {"buried": "revoked"}
    clock.advance(100)
    consumer.receive(1, 0)
    assert shop.rows("SELECT count(*) FROM tombstone") == [(0,)]
    assert [letter.reason for letter in transport.dead_list("q", 9)] == ["poison"]
    clock.advance(500)
    consumer.receive(1, 0)
    assert transport.dead_list("q", 9) == []


def test_expired_results_and_barriers_are_forgotten(shop: Shop) -> None:
    clock = FakeClock()
    backend = shop.backend(clock, barrier_expires=1000.0)
    backend.store([result(str(n), expires_at=clock.time() + 100) for n in range(1200)])
    assert not backend.arrive("group", "a", 2)
    clock.advance(101)
    assert backend.fetch(["0"]) == {}
    for _ in range(4):
        backend.store([result("kept")])
        clock.advance(2)
    assert shop.rows("SELECT id FROM result") == [("kept",)]
    clock.advance(1000)
    backend.store([result("kept")])
    assert shop.rows("SELECT count(*) FROM barrier_member") == [(0,)]
    assert not backend.arrive("group", "b", 2)


def test_an_expired_result_may_be_replaced(shop: Shop) -> None:
    clock = FakeClock()
    backend = shop.backend(clock)
    backend.store([result("m", State.FAILURE, clock.time() + 10)])
    backend.store([result("m", State.SUCCESS, clock.time() + 10)])
    assert backend.fetch(["m"])["m"].state is State.FAILURE
    clock.advance(11)
    backend.store([result("m", State.SUCCESS, clock.time() + 10)])
    assert backend.fetch(["m"])["m"].state is State.SUCCESS


def test_queues_are_found_without_reading_every_row(shop: Shop) -> None:
    transport = shop.transport()
    transport.declare(["declared"])
    transport.send([message("1", "ready"), message("2", "delayed", not_before=time.time() + 99), message("3", "dead")])
    [delivery] = transport.consumer(["dead"], 1).receive(1, 0)
    transport.settle([Settlement(delivery, Action.DEAD, (), "why")])
    assert transport.queues() == ["dead", "declared", "delayed", "ready"]


def test_a_receipt_is_good_until_someone_else_claims_the_message(shop: Shop) -> None:
    clock = FakeClock()
    transport, other = shop.transport(clock), shop.transport(clock)
    transport.send([message("a"), message("b")])
    consumer = transport.consumer(["q"], 1)
    [first], [second] = consumer.receive(1, 0), consumer.receive(1, 0)
    clock.advance(31)
    assert other.stats(["q"])["q"].ready == 2
    assert transport.settle([Settlement(first, Action.ACK)]) == []
    assert ids(other.consumer(["q"], 1).receive(9, 0)) == ["b"]
    assert transport.settle([Settlement(second, Action.ACK)]) == [second]
    assert transport.extend([second], 30) == [second]


def test_purge_takes_more_than_one_step(shop: Shop) -> None:
    transport = shop.transport()
    transport.send([message(str(n)) for n in range(12_000)])
    assert transport.purge("q") == 12_000
