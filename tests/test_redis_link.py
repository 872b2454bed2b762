"""The connection to Redis: what it survives, what it says when it cannot, what it never does twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import Durability
from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.plugins._redis import Redis, RedisOptions, Script
from dray.testing import ChaosProxy, plugin_context
from tests.servers import HOST, RedisCluster, RedisSentinelTrio, RedisServer
from tests.servers_process import until

ADD = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
FAST: dict[str, Any] = {"timeout": 0.5, "connect_timeout": 1.0, "heartbeat": 0.3}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """For tests that neither kill nor configure it."""
    with RedisServer() as started:
        yield started


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def connect() -> Iterator[Callable[..., Redis]]:
    """Makes clients, and closes them."""
    made: list[Redis] = []

    def make(url: str | tuple[str, ...], **options: Any) -> Redis:
        made.append(Redis(RedisOptions(url=url, **options), plugin_context("redis", SystemClock()), [ADD]))
        return made[-1]

    yield make
    for redis in made:
        redis.close()


Connect = Callable[..., Redis]


# --- commands ----------------------------------------------------------------------------------------------


def test_a_batch_is_answered_in_its_order_over_one_connection(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    redis = connect(server.url())
    keys = [f"{redis_prefix}:{number}" for number in range(300)]
    assert redis.run([("SET", key, number) for number, key in enumerate(keys)]) == [b"OK"] * 300
    assert redis.run([("GET", key) for key in keys]) == [b"%d" % number for number in range(300)]
    assert redis.run([]) == []
    names = server.command("CLIENT", "LIST").count("name=dray")
    assert names == 1


def test_values_of_any_size_and_content_come_back(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    redis = connect(server.url())
    for value in (b"", b"\r\n$5\r\n*3\x00", bytes(range(256)) * 10_000):
        redis.call("SET", redis_prefix, value)
        assert redis.call("GET", redis_prefix) == value


def test_connections_go_to_one_thread_at_a_time(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    redis = connect(server.url())
    wrong: list[object] = []

    def work(number: int) -> None:
        for step in range(100):
            value = f"{number}-{step}".encode()
            answers = redis.run([("ECHO", value), ("INCR", redis_prefix)])
            if answers[0] != value:
                wrong.append(answers)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert redis.call("GET", redis_prefix) == b"800"


def test_a_forgotten_script_is_sent_again_within_the_batch(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url())
    for expected in (1, 2):
        own_server.command("SCRIPT", "FLUSH")
        answers = redis.run([ADD(["n"], [1]), ("GET", "n"), ADD(["m"], [10 * expected])])
        assert answers[0] == expected
    assert redis.run([("GET", "n"), ("GET", "m")]) == [b"2", b"30"]


def test_a_refusal_stands_in_its_place_and_the_rest_is_done(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    redis = connect(server.url())
    commands = [("SET", redis_prefix, "text"), ("LPUSH", redis_prefix, "item"), ("GET", redis_prefix)]
    done, refusal, value = redis.attempt(commands)
    assert (done, value) == (b"OK", b"text")
    assert isinstance(refusal, Unavailable)
    with pytest.raises(Uncertain, match="2 of 3 commands were done"):
        redis.run(commands)
    with pytest.raises(Unavailable, match="`prefix`"):
        redis.call("LPUSH", redis_prefix, "item")


def test_arguments_of_an_unknown_command_are_not_shown(server: RedisServer, connect: Connect) -> None:
    with pytest.raises(Unavailable) as raised:
        connect(server.url()).call("NOSUCH", "a user's secret")
    assert "7.0" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_call_that_is_interrupted_leaves_no_answer_to_the_next(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    """A soft time limit is raised anywhere, in the middle of a call as well."""
    redis = connect(server.url())
    redis.call("PING")

    class Limit(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Limit

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Limit):
            redis.call("BLPOP", redis_prefix, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    server.command("LPUSH", redis_prefix, "late")
    assert redis.call("ECHO", "mine") == b"mine"


def test_after_close_all_is_unavailable_and_open_connects_again(server: RedisServer, connect: Connect) -> None:
    redis = connect(server.url())
    redis.open()
    redis.close()
    redis.close()
    for call in (lambda: redis.call("PING"), redis.dial, lambda: redis.listener):
        with pytest.raises(Unavailable, match="closed by this process"):
            call()
    redis.open()
    assert redis.call("PING") == b"PONG"


# --- broken connections ------------------------------------------------------------------------------------


def test_the_first_call_after_a_restart_works(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url())
    for count in range(3):
        redis.call("SET", "key", count)
        own_server.restart()
        assert redis.call("LPUSH", "list", "once") == 1  # neither an error nor twice


def test_what_idled_behind_a_dead_line_is_tried_before_it_is_used(server: RedisServer, connect: Connect) -> None:
    with ChaosProxy((HOST, server.port)) as proxy:
        redis = connect(f"redis://{HOST}:{proxy.port}", **FAST)
        redis.call("PING")
        proxy.set(swallow_up=True)  # as a firewall that has forgotten the connection
        threading.Event().wait(FAST["heartbeat"] * 1.2)
        with pytest.raises(Unavailable, match="no answer"):  # not Uncertain: what was asked was never sent
            redis.call("LPUSH", "never", "sent")
        proxy.heal()
        assert redis.call("EXISTS", "never") == 0


def test_a_lost_answer_is_uncertain_and_nothing_is_done_twice(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    with ChaosProxy((HOST, server.port)) as proxy:
        redis = connect(f"redis://{HOST}:{proxy.port}", **FAST)
        redis.call("PING")
        proxy.set(swallow_down=True)
        with pytest.raises(Uncertain, match="no answer"):
            redis.call("INCR", redis_prefix)
        proxy.heal()
        assert redis.call("GET", redis_prefix) == b"1"


def test_what_may_be_done_again_is_sent_once_more(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    with ChaosProxy((HOST, server.port)) as proxy:
        redis = connect(f"redis://{HOST}:{proxy.port}", **FAST)
        redis.call("PING")
        proxy.set(cut_down_after=1)
        assert redis.call("INCR", redis_prefix, again=True) == 2
        proxy.set(swallow_down=True)
        with pytest.raises(Uncertain):  # and not Unavailable, as the second attempt alone would say
            redis.call("INCR", redis_prefix, again=True)
        proxy.heal()
        assert redis.call("GET", redis_prefix) == b"3"


def test_a_server_that_stands_still_is_noticed(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url(), **FAST)
    redis.call("PING")
    own_server.pause()
    try:
        started = time.monotonic()
        with pytest.raises(TransportError, match="no answer"):
            redis.call("PING")
        assert time.monotonic() - started < 3
    finally:
        own_server.resume()
    assert redis.call("PING") == b"PONG"


# --- where the master is -----------------------------------------------------------------------------------


def test_the_first_writable_master_of_several_is_used(connect: Connect) -> None:
    with RedisServer() as master, RedisServer(replicaof=(HOST, master.port)) as replica:
        redis = connect((f"redis://{HOST}:1", replica.url(), master.url()))
        redis.call("SET", "key", "value")
        assert master.command("GET", "key") == "value"
        master.kill()
        replica.command("REPLICAOF", "NO", "ONE")
        redis.call("SET", "key", "later")
        assert replica.command("GET", "key") == "later"


def test_a_master_that_becomes_a_replica_is_left_without_an_error(connect: Connect) -> None:
    with RedisServer() as first, RedisServer() as second:
        redis = connect((first.url(), second.url()))
        redis.call("INCR", "key")
        first.command("REPLICAOF", HOST, second.port)
        assert redis.call("INCR", "other") == 1
        assert second.command("GET", "other") == "1"


def test_when_none_can_be_reached_each_is_named(server: RedisServer, connect: Connect) -> None:
    with RedisServer(replicaof=(HOST, server.port)) as replica:
        redis = connect((f"redis://{HOST}:1", replica.url()))
        with pytest.raises(Unavailable) as raised:
            redis.call("PING")
    assert f"{HOST}:1" in str(raised.value)
    assert "replica" in str(raised.value)


def test_sentinels_lead_to_the_new_master(connect: Connect) -> None:
    with RedisSentinelTrio(appendonly=True, appendfsync="always") as trio:
        redis = connect(trio.url(), **FAST)
        server = redis.open()
        assert server.durability == Durability.D1
        assert "failover" in server.window
        heard = Heard()
        redis.listener.subscribe("news", heard.deliver, heard.missed)
        redis.call("SET", "key", "before")
        old = trio.master
        old.kill()
        until(lambda: answered(lambda: redis.call("SET", "key", "after")), "the new master is found", 20)
        new = trio.await_other_master(old)
        assert new.command("GET", "key") == "after"
        until(lambda: heard.misses == 1, "the listener is back")
        redis.call("PUBLISH", "news", "hello")
        until(lambda: heard.payloads == [b"hello"], "the listener hears")


def test_sentinels_that_know_no_such_master_say_so(connect: Connect) -> None:
    with RedisSentinelTrio() as trio:
        redis = connect(trio.url().replace("/dray/", "/other/"))
        with pytest.raises(Unavailable, match="no master of this name: check the one in `url`"):
            redis.open()


def test_no_sentinel_at_all_says_so(server: RedisServer, connect: Connect) -> None:
    with pytest.raises(Unavailable, match="Sentinel"):
        connect(f"redis+sentinel://{HOST}:{server.port}/master").open()


def test_a_password_of_the_sentinels_is_told_apart(connect: Connect) -> None:
    with RedisServer(requirepass="secret") as server:  # says NOAUTH as a Sentinel does
        where = f"redis+sentinel://{HOST}:{server.port}/master"
        for password in (None, "wrong"):
            with pytest.raises(Unavailable, match="`sentinel_password`"):
                connect(where, sentinel_password=password).open()
        with pytest.raises(Unavailable, match=r"is it a Sentinel|older than"):
            connect(where, sentinel_password="secret").open()


# --- cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(3, replicas=1) as started:
        yield started


def test_a_batch_goes_to_all_nodes_of_a_cluster(cluster: RedisCluster, connect: Connect, redis_prefix: str) -> None:
    redis = connect(cluster.url())
    assert redis.open().is_cluster
    keys = [f"{redis_prefix}:{number}" for number in range(200)]
    assert redis.run([ADD([key], [number]) for number, key in enumerate(keys)]) == list(range(200))
    assert redis.run([("GET", key) for key in keys]) == [b"%d" % number for number in range(200)]
    assert len({cluster.owner_of(key).port for key in keys[:30]}) == 3


def test_slots_that_move_lose_and_double_nothing(cluster: RedisCluster, connect: Connect, redis_prefix: str) -> None:
    """While one thread counts, the slot of its key moves to and fro: MOVED, ASK and TRYAGAIN are all followed."""
    redis = connect(cluster.url())
    tagged = [f"{{{redis_prefix}}}:{number}" for number in range(40)]
    rounds, stop, errors = [0], threading.Event(), list[BaseException]()

    def count() -> None:
        try:
            while not stop.is_set():
                redis.run([ADD([key], [1]) for key in tagged])
                until(lambda: answered(lambda: redis.call("EXISTS", *tagged[:5])), "the keys are together again")
                rounds[0] += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        masters = [server for server in cluster.servers if server.command("ROLE")[0] == "master"]
        for move in range(6):
            owner = cluster.owner_of(tagged[0])
            until(lambda at=rounds[0]: rounds[0] > at or bool(errors), "another round")  # type: ignore[misc]
            others = [server for server in masters if server is not owner]
            cluster.move_slot_of(tagged[0], others[move % len(others)], count=3)
    finally:
        stop.set()
        thread.join(30)
    assert not errors
    assert redis.run([("GET", key) for key in tagged]) == [b"%d" % rounds[0]] * 40


def test_a_cluster_goes_on_with_the_replica_of_a_dead_master(connect: Connect, redis_prefix: str) -> None:
    with RedisCluster(3, replicas=1) as cluster:
        redis = connect(cluster.url(), **FAST)
        keys = [f"{redis_prefix}:{number}" for number in range(30)]
        redis.run([("SET", key, "before") for key in keys])
        cluster.owner_of(keys[0]).kill()
        answers = redis.attempt([("SET", key, "after") for key in keys])
        failed = [answer for answer in answers if isinstance(answer, TransportError)]
        assert 0 < len(failed) < len(keys)
        until(lambda: answered(lambda: redis.run([("SET", key, "after") for key in keys])), "the replica serves", 30)
        assert redis.run([("GET", key) for key in keys]) == [b"after"] * 30


def test_a_cluster_is_recognised_from_either_side(cluster: RedisCluster, server: RedisServer, connect: Connect) -> None:
    with pytest.raises(Unavailable, match=r"write `url` as redis\+cluster://"):
        connect(cluster.servers[0].url()).open()
    with pytest.raises(Unavailable, match="write `url` as redis://"):
        connect(f"redis+cluster://{HOST}:{server.port}").open()


# --- listening ---------------------------------------------------------------------------------------------


class Heard:
    """What a listener was told."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.misses = 0

    def deliver(self, payload: bytes) -> None:
        self.payloads.append(payload)

    def missed(self) -> None:
        self.misses += 1


def answered(call: Callable[[], object]) -> bool:
    try:
        call()
    except TransportError:
        return False
    return True


def test_what_is_published_once_it_listens_is_heard(server: RedisServer, connect: Connect, redis_prefix: str) -> None:
    redis = connect(server.url())
    first, second, other = Heard(), Heard(), Heard()
    stops = [redis.listener.subscribe(redis_prefix, heard.deliver) for heard in (first, second)]
    redis.listener.subscribe(f"{redis_prefix}:other", other.deliver)
    redis.call("PUBLISH", redis_prefix, b"\x00one")
    until(lambda: first.payloads == second.payloads == [b"\x00one"], "both hear")
    stops[0]()
    redis.call("PUBLISH", redis_prefix, b"two")
    until(lambda: second.payloads == [b"\x00one", b"two"], "the other one hears")
    stops[1]()
    until(lambda: server.command("PUBSUB", "NUMSUB", redis_prefix)[1] == 0, "nobody is subscribed")
    assert first.payloads == [b"\x00one"]
    assert other.payloads == []
    again = Heard()
    redis.listener.subscribe(redis_prefix, again.deliver)
    redis.call("PUBLISH", redis_prefix, b"three")
    until(lambda: again.payloads == [b"three"], "who came back hears")


def test_many_threads_share_one_connection_to_listen(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url())
    heard = [Heard() for _ in range(40)]
    threads = [
        threading.Thread(target=redis.listener.subscribe, args=(f"channel{number % 10}", one.deliver))
        for number, one in enumerate(heard)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [redis.call("PUBLISH", f"channel{number}", "x") for number in range(10)] == [1] * 10
    until(lambda: all(one.payloads == [b"x"] for one in heard), "all hear")


def test_a_listener_that_raises_stops_nobody(
    server: RedisServer, connect: Connect, redis_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis = connect(server.url())
    heard = Heard()

    def fail(payload: bytes) -> None:
        raise RuntimeError("a bug in a listener")

    redis.listener.subscribe(redis_prefix, fail)
    redis.listener.subscribe(redis_prefix, heard.deliver)
    for _ in range(2):
        redis.call("PUBLISH", redis_prefix, "x")
    until(lambda: heard.payloads == [b"x", b"x"], "the other one hears")
    assert "a bug in a listener" in caplog.text


def test_after_a_break_it_listens_again_and_says_so(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url(), **FAST)
    heard = Heard()
    redis.listener.subscribe("a", heard.deliver, heard.missed)
    redis.listener.subscribe("b", heard.deliver)
    for count in (1, 2):
        if count == 1:
            own_server.command("CLIENT", "KILL", "TYPE", "pubsub")
        else:
            own_server.restart()
        until(lambda count=count: heard.misses == count, "it says that it may have missed something")  # type: ignore[misc]
        for channel in "ab":
            redis.call("PUBLISH", channel, channel)
        until(lambda count=count: heard.payloads == [b"a", b"b"] * count, "it hears again")  # type: ignore[misc]


def test_a_silent_line_is_noticed_within_two_heartbeats(
    server: RedisServer, connect: Connect, redis_prefix: str
) -> None:
    with ChaosProxy((HOST, server.port)) as proxy:
        redis = connect(f"redis://{HOST}:{proxy.port}", **FAST)
        heard = Heard()
        redis.listener.subscribe(redis_prefix, heard.deliver, heard.missed)
        threading.Event().wait(FAST["heartbeat"] * 4)
        assert heard.misses == 0  # silence alone is no reason
        proxy.set(swallow_up=True, swallow_down=True)
        until(lambda: proxy.connections > 1, "it connects anew", FAST["heartbeat"] * 2 + 2)
        proxy.heal()
        until(lambda: heard.misses == 1, "it is back")


def test_nobody_to_listen_to_is_an_error_at_once(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url())
    own_server.kill()
    started = time.monotonic()
    with pytest.raises(Unavailable, match="cannot connect"):
        redis.listener.subscribe("channel", lambda payload: None)
    assert time.monotonic() - started < 3
    own_server.start()
    heard = Heard()
    redis.listener.subscribe("channel", heard.deliver)
    redis.call("PUBLISH", "channel", "x")
    until(lambda: heard.payloads == [b"x"], "it hears")


def test_a_forbidden_channel_is_an_error_and_the_others_are_heard(own_server: RedisServer, connect: Connect) -> None:
    own_server.command("ACL", "SETUSER", "limited", "on", ">secret", "+@all", "~*", "resetchannels", "&mine:*")
    redis = connect(own_server.url(), username="limited", password="secret")
    heard = Heard()
    redis.listener.subscribe("mine:a", heard.deliver)
    with pytest.raises(Unavailable, match=r"theirs:a: the user may not do this"):
        redis.listener.subscribe("theirs:a", heard.deliver)
    redis.call("PUBLISH", "mine:a", "x")
    until(lambda: heard.payloads == [b"x"], "it hears")


def test_close_ends_the_listener(own_server: RedisServer, connect: Connect) -> None:
    redis = connect(own_server.url())
    redis.listener.subscribe("channel", lambda payload: None)
    threads = [thread for thread in threading.enumerate() if thread.name == "dray-redis-listener"]
    redis.close()
    assert not any(thread.is_alive() for thread in threads)
    until(lambda: "name=dray " not in own_server.command("CLIENT", "LIST"), "all connections are closed")


# --- a Unix socket -----------------------------------------------------------------------------------------


def test_a_unix_socket_works_and_a_wrong_path_is_named(connect: Connect, tmp_path: Path) -> None:
    with RedisServer(unixsocket=True) as server:
        redis = connect(server.unix_url(3))
        redis.call("SET", "key", "value")
        assert redis.run([("GET", "key"), ("CLIENT", "INFO")])[0] == b"value"
        assert b" db=3 " in redis.call("CLIENT", "INFO")
    with pytest.raises(Unavailable, match="the path in `url`"):
        connect(f"unix://{tmp_path}/nothing.sock").open()
