"""The Redis transport against real servers: what the conformance kit cannot know of Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import Consumer, Durability
from dray.core.errors import ConfigError, TransportError, Unavailable
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.plugins.transports.redis import RedisTransport
from dray.testing import plugin_context
from dray.testing.harness import Background
from tests.servers import RedisCluster, RedisServer, SharedRedis

PROMPT_S = 5.0


@contextmanager
def opened(url: str | tuple[str, ...], prefix: str = "t", **options: Any) -> Iterator[RedisTransport]:
    transport = RedisTransport(
        RedisTransport.Options(url=url, prefix=prefix, **options), plugin_context("redis", SystemClock())
    )
    try:
        transport.open()
        yield transport
    finally:
        transport.close()


@pytest.fixture
def transport(redis_server: SharedRedis, redis_prefix: str) -> Iterator[RedisTransport]:
    with opened(redis_server.url(), redis_prefix) as transport:
        yield transport
        for key in keys_of(transport):
            transport._redis.call("DEL", key)


@contextmanager
def consuming(transport: RedisTransport, *queues: str) -> Iterator[Consumer]:
    consumer = transport.consumer(queues or ("q",), 1)
    try:
        yield consumer
    finally:
        consumer.close()


def message(id_: str, queue: str = "q", body: bytes = b"", **fields: Any) -> Outgoing:
    return Outgoing(queue, id_, body, {"task": "t"}, **fields)


def acknowledge(transport: RedisTransport, deliveries: list[Delivery]) -> list[Delivery]:
    return transport.settle([Settlement(delivery, Action.ACK) for delivery in deliveries])


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.id for delivery in deliveries]


def keys_of(transport: RedisTransport) -> list[bytes]:
    prefix = transport.options.prefix
    redis = transport._redis
    found: list[bytes] = redis.call("KEYS", f"{prefix}:*") + redis.call("KEYS", f"{{{prefix}:*")
    return sorted(found)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PROMPT_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.005)


def blocked_clients(transport: RedisTransport) -> int:
    info: bytes = transport._redis.call("INFO", "clients")
    return next(int(line.partition(b":")[2]) for line in info.split() if line.startswith(b"blocked_clients"))


# --- time is the server's ------------------------------------------------------------------------------------


def test_leases_end_by_the_servers_clock_and_come_back_first_and_in_order(
    redis_server: SharedRedis, redis_prefix: str
) -> None:
    with opened(redis_server.url(), redis_prefix, lease=0.3) as transport, consuming(transport) as consumer:
        transport.send([message(f"m{number:02}") for number in range(20)])
        held = consumer.receive(12, 0)
        started = time.monotonic()
        transport.send([message("new")])
        rest = consumer.receive(100, 0)
        assert ids(rest) == [f"m{number:02}" for number in range(12, 20)] + ["new"]
        assert transport.extend(rest, 60) == []
        back = consumer.receive(100, PROMPT_S)
        assert 0.25 < time.monotonic() - started < 1.5
        assert ids(back) == ids(held)
        assert {delivery.delivery_count for delivery in back} == {2}
        assert acknowledge(transport, held) == held
        assert acknowledge(transport, back + rest) == []


def test_a_clock_that_is_wrong_here_changes_no_lease(redis_server: SharedRedis, redis_prefix: str) -> None:
    class Fast(SystemClock):
        @staticmethod
        def time() -> float:
            return time.time() + 3600

    options = RedisTransport.Options(url=redis_server.url(), prefix=redis_prefix, lease=60)
    fast = RedisTransport(options, plugin_context("redis", Fast()))
    fast.open()
    with opened(redis_server.url(), redis_prefix) as right, consuming(right) as consumer:
        right.send([message("m")])
        with consuming(fast) as ahead:
            (held,) = ahead.receive(1, 0)
            assert fast.extend([held], 60) == []
            assert consumer.receive(1, 0.05) == []
            right.send([message("n")])
            (other,) = consumer.receive(1, 0)
            assert ahead.receive(1, 0) == []
        assert acknowledge(fast, [held]) == []
        assert acknowledge(right, [other]) == []
    fast.close()


def test_a_thousand_delayed_messages_come_in_the_order_they_are_due(transport: RedisTransport) -> None:
    due = time.time() + 0.3
    numbers = list(range(1000))
    transport.send([message(f"{number:04}", not_before=due + number / 1000) for number in reversed(numbers)])
    with consuming(transport) as consumer:
        found: list[str] = []
        deadline = time.monotonic() + 10
        while len(found) < len(numbers) and time.monotonic() < deadline:
            some = consumer.receive(700, 1)
            assert acknowledge(transport, some) == []
            found += ids(some)
    assert found == [f"{number:04}" for number in numbers]


# --- waking --------------------------------------------------------------------------------------------------


def test_one_message_wakes_one_consumer(transport: RedisTransport) -> None:
    """And each of a batch that nobody takes whole wakes another."""
    got: list[str] = []
    claims = threading.Semaphore(0)
    background = Background()
    consumers = [transport.consumer(["q"], 1) for _ in range(6)]

    def work(consumer: Consumer) -> None:
        got.extend(ids(consumer.receive(1, PROMPT_S)))
        claims.release()

    for consumer in consumers:
        background.start(work, consumer)
    until(lambda: transport._redis.call("LLEN", f"{{{transport.options.prefix}:q}}:bell") == 0, "no bell yet")
    until(lambda: blocked_clients(transport) >= 6, "the consumers do not wait")
    transport.send([message("one")])
    assert claims.acquire(timeout=PROMPT_S)
    assert not claims.acquire(timeout=0.2), "a consumer came back with nothing"
    transport.send([message(f"more {number}") for number in range(5)])
    background.join()
    assert sorted(got) == [*(f"more {number}" for number in range(5)), "one"]
    for consumer in consumers:
        consumer.close()


def test_who_is_woken_for_one_queue_and_filled_by_another_passes_it_on(transport: RedisTransport) -> None:
    with consuming(transport, "first", "second") as both, consuming(transport, "second") as other:
        found: list[str] = []
        background = Background()
        background.start(lambda: found.extend(ids(other.receive(1, PROMPT_S))))
        both._owed = {f"{{{transport.options.prefix}:second}}"}  # type: ignore[attr-defined]
        until(lambda: blocked_clients(transport) >= 1, "it does not wait")
        transport.send([message("a", "first")])
        base = f"{{{transport.options.prefix}:second}}"
        transport._redis.call("RPUSH", f"{base}:0", b"d1" + b"0" * 23 + b"m\0")  # without a ring
        assert ids(both.receive(1, 0)) == ["a"]
        background.join()
        assert found == ["m"]


def test_a_delayed_message_is_watched_by_one_and_by_another_when_that_one_is_busy(transport: RedisTransport) -> None:
    with consuming(transport) as watcher, consuming(transport) as idle:
        transport.send([message("late", not_before=time.time() + 0.8)])
        found: list[tuple[str, float]] = []

        def work(consumer: Consumer) -> None:
            found.extend((delivery.id, time.time()) for delivery in consumer.receive(1, PROMPT_S))

        background = Background()
        background.start(work, watcher)
        until(lambda: blocked_clients(transport) >= 1, "it does not wait")
        background.start(work, idle)
        until(lambda: blocked_clients(transport) >= 2, "they do not wait")
        started = time.time()
        transport.send([message("now")])  # the watcher waits the longest: it is woken, and goes to work
        background.join()
        (_, soon), (_, late) = sorted(found, key=lambda item: item[1])
        assert [id_ for id_, _ in sorted(found, key=lambda item: item[1])] == ["now", "late"]
        assert soon - started < 0.5
        assert late - started < 1.5


def test_a_receive_survives_nothing_but_says_so_when_the_server_restarts_under_it() -> None:
    with RedisServer(appendonly=True) as server, opened(server.url()) as transport:
        consumer = transport.consumer(["q"], 1)
        errors: list[Exception] = []

        def wait() -> None:
            try:
                consumer.receive(1, 30)
            except Unavailable as error:
                errors.append(error)

        background = Background()
        background.start(wait)
        until(lambda: blocked_clients(transport) == 1, "it does not wait")
        server.stop()
        server.start()
        background.join(PROMPT_S)
        assert errors
        assert "wait for messages" in str(errors[0])
        consumer.close()
        transport.send([message("after")])
        with consuming(transport) as again:
            assert ids(again.receive(1, PROMPT_S)) == ["after"]


# --- what somebody else does to the server ---------------------------------------------------------------------


def test_flushall_underneath_loses_what_was_there_and_nothing_after() -> None:
    with RedisServer() as server, opened(server.url()) as transport, consuming(transport) as consumer:
        transport.send([message("gone")])
        (held,) = consumer.receive(1, 0)
        transport._redis.call("FLUSHALL")
        assert acknowledge(transport, [held]) == [held]
        assert transport.extend([held], 10) == [held]
        transport.send([message("new")])
        (new,) = consumer.receive(1, PROMPT_S)
        assert new.id == "new"
        assert new.receipt > held.receipt, "a receipt from before could settle what came after"
        assert acknowledge(transport, [held, new]) == [held]


def test_scripts_are_sent_again_after_a_script_flush(transport: RedisTransport) -> None:
    with consuming(transport) as consumer:
        for _ in range(2):
            transport._redis.call("SCRIPT", "FLUSH")
            transport.send([message("a"), message("b", "other")])
            transport._redis.call("SCRIPT", "FLUSH")
            (delivery,) = consumer.receive(1, 0)
            transport._redis.call("SCRIPT", "FLUSH")
            assert acknowledge(transport, [delivery]) == []


def test_what_was_put_into_a_queue_by_hand_is_handed_out_and_can_be_put_aside(transport: RedisTransport) -> None:
    base = f"{{{transport.options.prefix}:q}}"
    bodies = [b"hello", b"", b"\x00\xff", b'{"id": 1}', b"d1" + b"0" * 23, b"d1" + b"0" * 22 + b"9id\0no headers"]
    transport._redis.call("RPUSH", f"{base}:0", *bodies)
    assert len(transport.peek("q", 10)) == 6
    with consuming(transport) as consumer:
        found = consumer.receive(10, 0)
        assert len({delivery.id for delivery in found}) == 6
        assert [delivery.body for delivery in found[:5]] == bodies[:5]
        assert all(delivery.headers == {} for delivery in found)
        assert transport.settle([Settlement(delivery, Action.DEAD, (), "foreign") for delivery in found]) == []
        letters = transport.dead_get(ids(found))
        assert sorted(letter.body for letter in letters) == sorted(delivery.body for delivery in found)
        assert sorted(transport.dead_purge(ids(found))) == sorted(ids(found))
        assert consumer.receive(10, 0) == []


@pytest.mark.parametrize("name", ["0", "leases", "delayed", "numbers", "levels"])
def test_a_key_of_another_type_is_named_and_costs_no_message(transport: RedisTransport, name: str) -> None:
    base = f"{{{transport.options.prefix}:q}}"
    transport._redis.call("SADD", f"{base}:{name}", "mine")
    errors: list[TransportError] = []
    with consuming(transport) as consumer:
        try:
            transport.send([message("m"), message("later", not_before=time.time() + 0.001)])
            consumer.receive(10, 0)
        except TransportError as error:
            errors.append(error)
        assert f"{base}:{name}' is a set" in str(errors[0])
        assert "`prefix`" in str(errors[0])
        transport._redis.call("DEL", f"{base}:{name}")
        transport.send([message("m")])
        until(lambda: transport.stats(["q"])["q"].ready >= 1, "nothing is ready")
        assert "m" in ids(consumer.receive(10, 0))


def test_a_full_server_refuses_to_send_and_can_be_drained() -> None:
    with RedisServer(maxmemory="5mb") as server, opened(server.url()) as transport:
        sent = 0
        with pytest.raises(TransportError, match="maxmemory"):
            for sent in range(10_000):
                transport.send([message(f"m{sent}", body=b"x" * 10_000)])
        with consuming(transport) as consumer:
            taken = 0
            while found := consumer.receive(10, 0):
                taken += len(found)
                retry = [Settlement(found[0], Action.ACK, (message("retry", "elsewhere"),))] if taken == 10 else []
                done = [Settlement(delivery, Action.ACK) for delivery in found[len(retry) :]]
                assert transport.settle(retry + done) == []
        assert taken == sent
        assert transport.peek("elsewhere", 1)[0].id == "retry"


# --- what the server promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "durability"),
    [
        ({}, Durability.D1),
        ({"appendonly": True}, Durability.D1),
        ({"appendonly": True, "appendfsync": "always"}, Durability.D3),
    ],
)
def test_durability_is_what_the_server_keeps(settings: dict[str, Any], durability: Durability) -> None:
    with RedisServer(**settings) as server, opened(server.url()) as transport:
        assert transport.features.durability == durability


def test_a_failover_lowers_what_is_kept() -> None:
    """Redis replicates after it answers."""
    with RedisServer(appendonly=True, appendfsync="always") as server:
        urls = (server.url(), "redis://127.0.0.1:1")
        with opened(urls) as transport:
            assert transport.features.durability == Durability.D1


def test_a_server_that_throws_keys_away_is_refused() -> None:
    with RedisServer(maxmemory="50mb", maxmemory_policy="allkeys-lru") as server:
        evicting = RedisTransport(RedisTransport.Options(url=server.url()), plugin_context("redis"))
        with pytest.raises(ConfigError, match="CONFIG SET maxmemory-policy noeviction"):
            evicting.open()


def test_a_replica_is_refused() -> None:
    with RedisServer() as master, RedisServer(replicaof=f"127.0.0.1 {master.port}") as replica:
        transport = RedisTransport(RedisTransport.Options(url=replica.url()), plugin_context("redis"))
        with pytest.raises(Unavailable, match="master"):
            transport.open()


# --- nothing leaks ---------------------------------------------------------------------------------------------


def test_nothing_but_a_few_small_keys_is_left_of_what_was_settled(transport: RedisTransport) -> None:
    soon = time.time() + 0.05
    with consuming(transport, "a", "b") as consumer:
        for number in range(300):
            transport.send(
                [message(f"m{number}", "ab"[number % 2], priority=number % 10, not_before=soon if number % 3 else None)]
            )
        transport.bury({"m1": "revoked"}, time.time() + 0.2, hasten=True)
        actions = [Action.ACK, Action.DEAD, Action.RELEASE]
        done = 0
        deadline = time.monotonic() + 10
        while done < 300 and time.monotonic() < deadline:
            found = consumer.receive(7, 0.2)
            batch = [Settlement(delivery, actions[at % 3], (), "why") for at, delivery in enumerate(found)]
            assert transport.settle(batch) == []
            done += sum(settlement.action is not Action.RELEASE for settlement in batch)
        assert done == 300
        letters = transport.dead_list(None, 1000)
        assert sorted(transport.dead_purge(ids_of(letters))) == sorted(ids_of(letters))
        assert transport.stats(["a", "b"])["a"] == (0, 0, 0, 0, None)
        until(lambda: not any(b":tomb:" in key for key in keys_of(transport)), "the tombstone does not expire")
    prefix = transport.options.prefix.encode()
    allowed = {prefix + b":queues"}
    for queue in (b"a", b"b"):
        allowed |= {b"{%b:%b}:%b" % (prefix, queue, name) for name in (b"numbers", b"bell", b"watch")}
    assert set(keys_of(transport)) <= allowed


def ids_of(letters: Any) -> list[str]:
    return [letter.id for letter in letters]


def test_old_dead_letters_are_forgotten(redis_server: SharedRedis, redis_prefix: str) -> None:
    with opened(redis_server.url(), redis_prefix, dead_expires=0.05) as transport, consuming(transport) as consumer:
        for number in range(3):
            transport.send([message(f"m{number}")])
            transport.settle([Settlement(consumer.receive(1, 0)[0], Action.DEAD, (), "why")])
            threading.Event().wait(0.06)
        assert ids_of(transport.dead_list(None, 10)) == ["m2"]
        assert transport.dead_get(["m0", "m1"]) == []
        assert transport._redis.call("ZCARD", f"{{{redis_prefix}:q}}:deadids") == 1


def test_a_large_batch_of_large_messages_is_sent_in_parts(transport: RedisTransport) -> None:
    transport.send([message(f"m{number}", body=b"x" * (2**20 - 9)) for number in range(40)])
    transport.send([message(f"s{number}") for number in range(2500)])
    assert transport.stats(["q"])["q"].ready == 2540
    assert transport.purge("q") == 2540


# --- clusters --------------------------------------------------------------------------------------------------


def test_a_consumer_of_several_slots_is_woken_by_each() -> None:
    with RedisCluster() as cluster, opened(cluster.url()) as transport:
        queues = [f"q{number}" for number in range(5)]
        assert not transport.features.atomic_then
        with consuming(transport, *queues) as consumer:
            for queue in queues * 2:
                found: list[Delivery] = []
                background = Background()
                background.start(lambda found=found: found.extend(consumer.receive(1, 30)))
                threading.Event().wait(0.02)
                transport.send([message("m", queue)])
                background.join(PROMPT_S)
                assert [delivery.queue for delivery in found] == [queue]
                assert acknowledge(transport, found) == []
        assert sorted(transport.queues()) == queues


def test_a_slot_that_moves_under_load_loses_nothing() -> None:
    with RedisCluster() as cluster, opened(cluster.url(), timeout=2) as transport, consuming(transport) as consumer:
        transport.send([message(f"m{number}", body=b"x" * 100) for number in range(300)])
        held = consumer.receive(20, 0)
        transport.send([message(f"d{number}", not_before=time.time() + 0.5) for number in range(50)])
        sent, seen = {f"m{number}" for number in range(300)} | {f"d{number}" for number in range(50)}, set(ids(held))
        confirmed: list[str] = []
        over = threading.Event()

        def send() -> None:
            number = 0
            while not over.is_set():
                number += 1
                try:
                    transport.send([message(f"n{number}")])
                except TransportError:
                    over.wait(0.01)
                else:
                    confirmed.append(f"n{number}")

        def move() -> None:
            base = f"{{{transport.options.prefix}:q}}"
            for _ in range(3):
                source = cluster.owner_of(base)
                target = next(server for server in cluster.servers if server is not source)
                cluster.move_slot_of(base, target, 1)
            over.set()

        background = Background()
        background.start(send)
        background.start(move)
        deadline = time.monotonic() + 30
        with consuming(transport) as worker:
            while (not over.is_set() or not seen.issuperset([*sent, *confirmed])) and time.monotonic() < deadline:
                try:
                    found = worker.receive(7, 0)
                    seen.update(ids(found))
                    acknowledge(transport, found)
                except TransportError:
                    over.wait(0.01)
                if over.is_set():
                    background.join()  # the last one is confirmed
        assert seen.issuperset([*sent, *confirmed])
        assert acknowledge(transport, held) == []


# --- permissions -----------------------------------------------------------------------------------------------


def test_a_user_needs_no_more_than_the_page_says() -> None:
    with RedisServer() as server:
        with opened(server.url()) as admin:
            rules = ["on", ">secret", "~{mine:*", "~mine:*", "&mine:*", "+@all", "-@admin", "-@dangerous", "+info"]
            admin._redis.call("ACL", "SETUSER", "worker", *rules)
        url = server.url().replace("redis://", "redis://worker:secret@")
        with opened(url, "mine") as transport, consuming(transport, "a", "b") as consumer:
            transport.send([message("m", "a"), message("n", "b"), message("later", "a", not_before=time.time() + 60)])
            transport.bury({"later": "revoked"}, time.time() + 60, hasten=True)
            assert transport.buried(["m", "later"]) == {"later": "revoked"}
            found = consumer.receive(10, 0)
            assert sorted(ids(found)) == ["later", "m", "n"]
            assert transport.extend(found, 10) == []
            then = (message("next", "b"),)
            assert transport.settle([Settlement(delivery, Action.DEAD, then, "why") for delivery in found]) == []
            assert len(transport.dead_list(None, 10)) == 3
            assert transport.peek("b", 10)[0].id == "next"
            heard = threading.Event()
            stop = transport.listen("c", lambda _: heard.set())
            transport.broadcast("c", b"hello")
            assert heard.wait(PROMPT_S)
            stop()
        with pytest.raises(Unavailable, match="prefix"), opened(url, "yours") as transport:
            transport.send([message("m")])
