"""The ladder of delays: ways that are computed, and messages that really wait."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.plugins._rabbitmq_delays import HANDS, LONGEST_S, Declaration, Delays, Route

YEAR_S = 366 * 86400.0
QUORUM = pytest.mark.parametrize("quorum", [True, False], ids=["quorum", "classic"])


# --- computed --------------------------------------------------------------------------------------------------


class Exchanges:
    """What RabbitMQ does with the declarations: topic bindings, TTLs, dead-lettering."""

    def __init__(self) -> None:
        self.queues: dict[str, dict[str, Any]] = {}
        self.bindings: list[tuple[str, str, str, bool]] = []

    def declare(self, declarations: Iterable[Declaration]) -> None:
        for method, arguments in declarations:
            if method == "queue_declare":
                self.queues[arguments["queue"]] = arguments["arguments"]
            elif method == "queue_bind":
                self.bindings.append((arguments["exchange"], arguments["routing_key"], arguments["queue"], True))
            elif method == "exchange_bind":
                self.bindings.append((arguments["source"], arguments["routing_key"], arguments["destination"], False))

    def queues_for(self, exchange: str, key: str) -> list[str]:
        found = []
        for source, pattern, destination, is_queue in self.bindings:
            if source == exchange and matches(pattern.split("."), key.split(".")):
                found += [destination] if is_queue else self.queues_for(destination, key)
        return found

    def wait_ms(self, exchange: str, key: str, target: str) -> list[int]:
        """The TTLs on the way to the target, which is the only way."""
        waits: list[int] = []
        while True:
            (queue,) = self.queues_for(exchange, key)
            if queue == target:
                return waits
            waits.append(self.queues[queue]["x-message-ttl"])
            exchange = self.queues[queue]["x-dead-letter-exchange"]


def matches(pattern: list[str], key: list[str]) -> bool:
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(matches(pattern[1:], key[at:]) for at in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and matches(pattern[1:], key[1:])


@given(st.floats(-1, LONGEST_S) | st.integers(0, 48).map(lambda days: days * 86400.0), st.text(max_size=200))
def test_the_way_is_as_long_as_the_delay(delay_s: float, queue: str) -> None:
    delays, exchanges = Delays("dray", quorum=True), Exchanges()
    exchanges.declare(delays.exchanges())
    exchanges.declare([delays.arrival(queue), delays.arrival(queue + "other")])
    route = delays.route(queue, delay_s)
    for wait in route.waits:
        exchanges.declare(delays.waiting(*wait))
    waits = exchanges.wait_ms(route.exchange, route.key, queue)
    assert waits == sorted(waits, reverse=True)
    assert all(0 < wait < 2**32 for wait in waits)
    assert len(waits) <= len(HANDS)
    assert 0 <= round(sum(waits) - delay_s * 1000, 3) <= 10 or sum(waits) == 10
    assert route.rest_s == 0
    assert len(route.key) < 60


@pytest.mark.parametrize("delay_s", [0.3, 1, 5, 30, 60, 300, 3600, 86400, 7 * 86400])
def test_what_people_ask_for_is_one_hop(delay_s: float) -> None:
    assert len(Delays("dray", quorum=True).route("q", delay_s).waits) == 1


@pytest.mark.parametrize("delay_s", [LONGEST_S + 0.001, YEAR_S, 30 * YEAR_S])
def test_what_is_longer_than_the_ladder_is_told(delay_s: float) -> None:
    route = Delays("dray", quorum=True).route("q", delay_s)
    assert route.rest_s == pytest.approx(delay_s - LONGEST_S)
    assert len(route.waits) == len(HANDS)


def test_queues_have_names_for_people() -> None:
    delays = Delays("dray", quorum=True)
    names = [delays.queue_name(at, position) for at, position in delays.route("q", 90061.25).waits]
    assert names == [
        "dray.delay.1d",
        "dray.delay.1h",
        "dray.delay.1m",
        "dray.delay.1s",
        "dray.delay.200ms",
        "dray.delay.50ms",
    ]


# --- in the broker ---------------------------------------------------------------------------------------------


class Ladder:
    def __init__(self, url: str, quorum: bool) -> None:
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.delays = Delays("t", quorum)
        self.declared: set[object] = set()
        self.declare(self.delays.exchanges())
        kind = "quorum" if quorum else "classic"
        self.channel.queue_declare("t.q.work", durable=True, arguments={"x-queue-type": kind})
        self.declare([self.delays.arrival("t.q.work")])

    def declare(self, declarations: Iterable[Declaration]) -> None:
        for method, arguments in declarations:
            getattr(self.channel, method)(**arguments)

    def prepare(self, delay_s: float) -> Route:
        route = self.delays.route("t.q.work", delay_s)
        for wait in route.waits:
            if wait not in self.declared:
                self.declare(self.delays.waiting(*wait))
                self.declared.add(wait)
        return route

    def send(self, body: bytes, delay_s: float) -> None:
        route = self.prepare(delay_s)
        properties = pika.BasicProperties(delivery_mode=2, headers={"due": repr(time.time() + delay_s)})
        self.channel.basic_publish(route.exchange, route.key, body, properties, mandatory=True)

    def arrivals(self, count: int, timeout_s: float = 60) -> list[tuple[bytes, float]]:
        """Bodies as they arrive, and by how many seconds each is late."""
        found = list[tuple[bytes, float]]()
        for method, properties, body in self.channel.consume("t.q.work", inactivity_timeout=timeout_s):
            assert method is not None, f"only {len(found)} of {count} arrived"
            found.append((body, time.time() - float(properties.headers["due"])))
            self.channel.basic_ack(method.delivery_tag)
            if len(found) == count:
                break
        self.channel.cancel()
        return found


@pytest.fixture(params=[True, False], ids=["quorum", "classic"])
def ladder(rabbitmq_url: str, request: pytest.FixtureRequest) -> Iterator[Ladder]:
    ladder = Ladder(rabbitmq_url, request.param)
    yield ladder
    ladder.connection.close()


def test_a_short_delay_does_not_wait_behind_a_long_one(ladder: Ladder) -> None:
    delays = (4.0, 0.3, 2.51, 1.27, 0.0)
    for delay_s in delays:
        ladder.prepare(delay_s)
    for delay_s in delays:
        ladder.send(b"%.2f" % delay_s, delay_s)
    found = ladder.arrivals(5)
    assert [body for body, _ in found] == [b"0.00", b"0.30", b"1.27", b"2.51", b"4.00"]
    assert all(late_s >= 0 for _, late_s in found)


def test_equal_delays_keep_their_order(ladder: Ladder) -> None:
    ladder.send(b"declares", 0.73)
    for number in range(200):
        ladder.send(b"%d" % number, 0.73)
    assert [body for body, _ in ladder.arrivals(201)][1:] == [b"%d" % number for number in range(200)]


def test_none_is_lost_and_none_is_early(ladder: Ladder) -> None:
    for number in range(1000):
        ladder.send(b"%d" % number, 0.05 + number % 97 / 50)
    found = ladder.arrivals(1000)
    assert sorted(int(body) for body, _ in found) == list(range(1000))
    assert min(late_s for _, late_s in found) >= 0
