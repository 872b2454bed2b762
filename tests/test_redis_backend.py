"""Results in Redis beyond the kit: how callers wait, what is left behind, what a failover does to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dray.core.clock import SystemClock
from dray.core.errors import TransportError, Unavailable
from dray.core.message import State, StoredResult
from dray.plugins import _redis_waiters
from dray.plugins.backends.redis import RedisBackend
from dray.testing import plugin_context
from dray.testing.harness import Background
from tests.servers import RedisCluster, RedisSentinelTrio, RedisServer
from tests.servers_process import until

FAST: dict[str, Any] = {"timeout": 0.5, "connect_timeout": 1.0, "heartbeat": 0.3}


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


Connect = Callable[..., RedisBackend]


@pytest.fixture
def connect(redis_prefix: str) -> Iterator[Connect]:
    """Opened back ends: each stands for a process."""
    made: list[RedisBackend] = []

    def make(url: str, **options: Any) -> RedisBackend:
        settings = RedisBackend.Options(url=url, **{"prefix": redis_prefix, **options})
        made.append(RedisBackend(settings, plugin_context("redis", SystemClock())))
        made[-1].open()
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def result(id_: str, state: State = State.SUCCESS, body: bytes = b"x", expires_in_s: float = 60.0) -> StoredResult:
    return StoredResult(id_, state, body, time.time() + expires_in_s)


class Waiting:
    """Threads that wait, each for ids of its own."""

    def __init__(self) -> None:
        self.found: dict[str, StoredResult] = {}
        self._background = Background()

    def start(self, backend: RedisBackend, *ids: str, timeout_s: float = 20.0) -> None:
        self._background.start(lambda: self.found.update(backend.wait(ids, timeout_s)))

    def join(self, timeout_s: float = 20.0) -> dict[str, StoredResult]:
        self._background.join(timeout_s)
        return self.found


def registered(server: RedisServer, prefix: str) -> int:
    """For how many results somebody waits."""
    return sum(server.command("GETRANGE", key, 0, 0) in ("w", "s") for key in server.command("KEYS", f"{prefix}:r:*"))


# --- waiting -----------------------------------------------------------------------------------------------


def test_however_many_wait_there_is_one_connection_for_it(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    waiter, worker = connect(server.url()), connect(server.url())
    waiting = Waiting()
    for number in range(60):
        waiting.start(waiter, f"r{number}", "shared")
    until(lambda: registered(server, redis_prefix) == 61, "all wait")
    assert server.command("CLIENT", "LIST", "TYPE", "pubsub").count("name=dray") == 1
    worker.store([result(f"r{number}") for number in range(60)])
    assert set(waiting.join()) == {f"r{number}" for number in range(60)}


def test_all_who_wait_for_the_same_result_get_it(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    processes = [connect(server.url()) for _ in range(3)]
    waits = [Waiting() for _ in range(6)]
    for number, waiting in enumerate(waits):
        waiting.start(processes[number % 3], "r")
    until(lambda: registered(server, redis_prefix) == 1, "some wait")
    stored = result("r")
    processes[0].store([stored])
    for waiting in waits:
        assert waiting.join() == {"r": stored}


def test_waiting_costs_one_request_however_often_it_is_asked_again(server: RedisServer, connect: Connect) -> None:
    """``GroupResult.get`` asks for all that is left each time that one has ended."""
    waiter, worker = connect(server.url()), connect(server.url())
    ids = [f"r{number}" for number in range(50)]
    assert waiter.wait(ids, 0.01) == {}
    server.command("CONFIG", "RESETSTAT")
    for number in range(50):
        background = Waiting()
        background.start(waiter, *ids[number:])
        worker.store([result(ids[number])])
        assert set(background.join()) == {ids[number]}
    stats = server.command("INFO", "commandstats")
    assert stats["cmdstat_evalsha"]["calls"] <= 50 + 55  # those of the worker, and hardly any of the waiter


@pytest.mark.parametrize("body_bytes", [0, 8000, 9000, 3 * 2**20])
def test_a_result_of_any_size_is_pushed_or_fetched(
    server: RedisServer, connect: Connect, redis_prefix: str, body_bytes: int
) -> None:
    waiter, worker = connect(server.url()), connect(server.url())
    waiting = Waiting()
    waiting.start(waiter, "r")
    until(lambda: registered(server, redis_prefix) == 1, "it waits")
    stored = result("r", body=b"x" * body_bytes)
    worker.store([stored])
    assert waiting.join() == {"r": stored}


def test_states_on_the_way_keep_who_waits(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    waiter, worker = connect(server.url()), connect(server.url())
    worker.store([result("before", State.STARTED, b"50 %")])
    waiting = Waiting()
    waiting.start(waiter, "before", "later")
    until(lambda: registered(server, redis_prefix) == 2, "it waits")
    for state in (State.STARTED, State.RETRY, State.STARTED):
        worker.store([result("later", state, b"progress"), result("before", state, b"progress")])
        assert worker.fetch(["later"])["later"].body == b"progress"
        assert worker.fetch(["before"])["before"].state == state
    worker.store([result("later", body=b"done")])
    assert waiting.join()["later"].body == b"done"
    assert waiter.fetch(["later"])["later"].body == b"done"


def test_who_waits_longer_than_it_is_remembered_is_woken(
    server: RedisServer, connect: Connect, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what renews a registration that FLUSHALL, a failover or an impatient operator has removed."""
    monkeypatch.setattr(_redis_waiters, "_RENEW_S", 0.2)
    waiter, worker = connect(server.url()), connect(server.url())
    waiting = Waiting()
    waiting.start(waiter, "r")
    until(lambda: registered(server, redis_prefix) == 1, "it waits")
    server.command("FLUSHALL")
    until(lambda: registered(server, redis_prefix) == 1, "it waits again")
    worker.store([result("r")])
    assert set(waiting.join()) == {"r"}


@pytest.mark.parametrize("stored", ["while deaf", "later"])
def test_a_listener_that_is_cut_off_looks_again(
    server: RedisServer, connect: Connect, redis_prefix: str, stored: str
) -> None:
    waiter, worker = connect(server.url()), connect(server.url())
    waiting = Waiting()
    waiting.start(waiter, "r")
    until(lambda: registered(server, redis_prefix) == 1, "it waits")
    server.command("CLIENT", "KILL", "TYPE", "pubsub")
    if stored == "later":
        until(lambda: bool(server.command("CLIENT", "LIST", "TYPE", "pubsub")), "it listens again")
    worker.store([result("r")])
    started = time.monotonic()
    assert set(waiting.join()) == {"r"}
    assert time.monotonic() - started < 5


def test_a_wait_lives_through_a_restart_of_the_server(connect: Connect, redis_prefix: str) -> None:
    with RedisServer() as server:  # keeps nothing: not even who waits
        waiter = connect(server.url(), **FAST)
        waiting = Waiting()
        waiting.start(waiter, "r")
        until(lambda: registered(server, redis_prefix) == 1, "it waits")
        server.restart()
        connect(server.url()).store([result("r")])
        assert set(waiting.join()) == {"r"}


def test_a_wait_without_a_server_ends_in_time_with_an_error(connect: Connect) -> None:
    with RedisServer() as server:
        waiter = connect(server.url(), **FAST)
        server.kill()
        started = time.monotonic()
        with pytest.raises(TransportError, match="cannot connect"):
            waiter.wait(["r"], 1.0)
        assert time.monotonic() - started < 4


def test_a_wait_ends_when_its_back_end_is_closed(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    waiter = connect(server.url())
    raised: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(Unavailable, match="closed by this process") as caught:
            waiter.wait(["r"], 30)
        raised.append(caught.value)

    background = Background()
    background.start(wait)
    until(lambda: registered(server, redis_prefix) == 1, "it waits")
    waiter.close()
    background.join(10)
    assert raised


# --- what is left behind -----------------------------------------------------------------------------------


def test_nothing_stays_for_ever_that_nobody_owns(server: RedisServer, connect: Connect) -> None:
    backend = connect(server.url(), barrier_expires=100.0)
    backend.wait(["awaited", "started"], 0.01)
    backend.store([result("started", State.STARTED), result("r")])
    backend.wait(["started"], 0.01)
    backend.arrive("group", "member", 2)
    left_s = {key: server.command("TTL", key) for key in server.command("KEYS", "*")}
    assert len(left_s) == 4
    assert all(0 < seconds <= 100 for seconds in left_s.values()), left_s


def test_a_result_expires_by_the_servers_clock(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    """The clock of this machine may be another: what counts is how long the worker meant to keep it."""
    backend = connect(server.url())
    backend.store([result("soon", expires_in_s=0.2), result("past", expires_in_s=-5), result("late")])
    until(lambda: server.command("DBSIZE") == 1, "two have expired")
    assert set(backend.fetch(["soon", "past", "late"])) == {"late"}
    assert 58_000 < server.command("PTTL", f"{redis_prefix}:r:late") <= 60_000


def test_who_waited_is_told_of_a_result_that_is_over_at_once(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    waiter = connect(server.url())
    waiting = Waiting()
    waiting.start(waiter, "r")
    until(lambda: registered(server, redis_prefix) == 1, "it waits")
    connect(server.url()).store([result("r", expires_in_s=-1)])
    assert set(waiting.join()) == {"r"}


def test_prefixes_keep_applications_apart(server: RedisServer, connect: Connect) -> None:
    ours, theirs = connect(server.url(), prefix="ours"), connect(server.url(), prefix="theirs")
    ours.store([result("r", body=b"ours")])
    assert theirs.fetch(["r"]) == {}
    theirs.store([result("r", body=b"theirs")])
    assert ours.fetch(["r"])["r"].body == b"ours"
    assert not ours.arrive("g", "a", 2)
    assert not theirs.arrive("g", "b", 2)


# --- failover ----------------------------------------------------------------------------------------------


def test_after_a_failover_by_sentinels_all_goes_on(connect: Connect, redis_prefix: str) -> None:
    with RedisSentinelTrio() as trio:
        waiter, worker = connect(trio.url(), **FAST), connect(trio.url(), **FAST)
        waiting = Waiting()
        waiting.start(waiter, "r", timeout_s=40)
        until(lambda: registered(trio.master, redis_prefix) == 1, "it waits")
        trio.master.kill()
        until(lambda: works(lambda: worker.store([result("r")])), "storing works again", 30)
        assert set(waiting.join(30)) == {"r"}
        assert set(waiter.fetch(["r"])) == {"r"}


def test_after_a_node_of_a_cluster_died_all_goes_on(connect: Connect) -> None:
    with RedisCluster(3, replicas=1) as cluster:
        waiter, worker = connect(cluster.url(), **FAST), connect(cluster.url(), **FAST)
        waits = [Waiting() for _ in range(12)]
        for number, waiting in enumerate(waits):
            waiting.start(waiter, f"r{number}", timeout_s=40)
        masters = cluster.servers[:3]
        until(lambda: sum(server.command("DBSIZE") for server in masters) == 12, "all wait")
        masters[0].kill()
        stored = [result(f"r{number}") for number in range(12)]
        until(lambda: works(lambda: worker.store(stored)), "storing works again", 30)
        for number, waiting in enumerate(waits):
            assert waiting.join(40) == {f"r{number}": stored[number]}
        assert len(worker.fetch([f"r{number}" for number in range(12)])) == 12


def test_results_are_stored_and_awaited_while_slots_move(connect: Connect, redis_prefix: str) -> None:
    with RedisCluster(3) as cluster:
        waiter, worker = connect(cluster.url()), connect(cluster.url())
        stop, count = threading.Event(), [0]

        def work() -> None:
            while not stop.is_set():
                ids = [f"r{count[0]}-{number}" for number in range(150)]  # in nearly all of the slots
                stored = [result(id_) for id_ in ids]
                at_last(lambda: worker.store(stored))  # noqa: B023
                assert len(waiter.wait(ids, 20)) > 0
                assert set(at_last(lambda: waiter.fetch(ids))) == set(ids)  # noqa: B023
                count[0] += 1

        background = Background()
        background.start(work)
        for bucket in range(4):
            key = f"{redis_prefix}:r:{{{bucket}}}:"
            owner = cluster.owner_of(key)
            cluster.move_slot_of(key, next(server for server in cluster.servers if server is not owner), count=5)
        stop.set()
        background.join(60)
        assert count[0]


def at_last(call: Callable[[], Any]) -> Any:
    """What it returns once it is not refused any more: a slot that is half moved takes no batches."""
    answers: list[Any] = []
    until(lambda: works(lambda: answers.append(call())), "it works")
    return answers[0]


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except TransportError:
        return False
    return True
