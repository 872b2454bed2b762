"""Tasks that take longer than the broker's consumer timeout, on a broker that cannot be told to wait longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from dray.core.message import Delivery
from dray.plugins._rabbitmq_acks import Acks
from dray.plugins._rabbitmq_address import Tls, addresses
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_hold import Holds
from dray.plugins._rabbitmq_link import Dialer, LinkOptions
from dray.plugins._rabbitmq_publisher import Parcel, Publisher
from dray.testing import plugin_context
from tests.servers import RabbitMQServer

TIMEOUT_S = 8
"""The broker's, which looks once a second. The lease is a quarter."""


class Feed:
    """What the transport has for a channel: which tags are ours, and their acknowledgement."""

    def __init__(self, dialer: Dialer, queue: str) -> None:
        self.acks, self.lock, self.error = Acks(0.0), threading.Lock(), list[Exception]()
        self.came: list[tuple[int, Any, bytes]] = []
        self.channel: Channel = dialer.link().channel(on_close=self.error.append)
        self.channel.call("basic_qos", prefetch_count=10)
        self.channel.consume(queue, self._take)

    def _take(self, method: Any, properties: Any, body: bytes) -> None:
        with self.lock:
            self.acks.delivered(method.delivery_tag)
        self.came.append((method.delivery_tag, properties, body))

    def owns(self, tag: int) -> bool:
        with self.lock:
            return not self.error and tag in self.acks

    def finish(self, tags: list[int]) -> list[int]:
        if self.error:
            return tags
        with self.lock:
            stale = self.acks.finish(tags, 0.0)
            top, singly = self.acks.due(0.0)
        for tag, multiple in [(top, True)] * bool(top) + [(tag, False) for tag in singly]:
            self.channel.post(lambda channel, tag=tag, multiple=multiple: channel.basic_ack(tag, multiple))  # type: ignore[misc]
        return stale


class Receipt(NamedTuple):
    feed: Feed
    tag: int
    level: int = 0


class Worker:
    """What one worker process has."""

    def __init__(self, server: RabbitMQServer, stack: ExitStack, vhost: str, quorum: bool) -> None:
        context = plugin_context("rabbitmq")
        self.dialers = [
            Dialer(addresses(server.url(vhost)), Tls(), LinkOptions(answer_timeout_s=5), context, name)
            for name in ("publish", "consume")
        ]
        for dialer in self.dialers:
            dialer.open()
            stack.callback(dialer.close)
        self.publisher = Publisher(self.dialers[0])
        arguments = {"x-queue-type": "quorum" if quorum else "classic"}
        self.dialers[1].link().channel().call("queue_declare", queue="t.work", durable=True, arguments=arguments)
        self.holds = Holds(
            "t",
            self.dialers[1],
            self.publisher,
            context,
            timeout_s=TIMEOUT_S,
            is_quorum=quorum,
            name_of=lambda queue, level: f"t.{queue}",
            copy=lambda each, queue: Parcel("", queue, each.body, each.id, 0, {"dray-count": each.delivery_count}),
        )
        stack.callback(self.holds.close)

    def send(self, *bodies: bytes) -> None:
        assert not self.publisher.publish([Parcel("", "t.work", body, message_id=body.decode()) for body in bodies])

    def take(self, count: int) -> list[Delivery]:
        """Receive and watch, as the transport does."""
        self.feed = Feed(self.dialers[1], "t.work")
        until(lambda: len(self.feed.came) == count)
        deliveries = [
            Delivery("work", properties.message_id, body, {}, Receipt(self.feed, tag), count_of(properties) + 1)
            for tag, properties, body in self.feed.came
        ]
        self.holds.watch(deliveries)
        return deliveries

    def settle(self, *deliveries: Delivery) -> list[Any]:
        """The receipts that are not ours, as the transport finds them."""
        lost = [each.receipt for each in deliveries if each.receipt.feed.finish([each.receipt.tag])]
        return self.holds.finish(lost)

    def hold_queues(self, server: RabbitMQServer) -> int:
        text = server.eval(
            'length([Q || Q <- rabbit_amqqueue:list_names(), binary:match(element(4, Q), <<"t.hold.">>) /= nomatch])'
        )
        return int(text)


def count_of(properties: Any) -> int:
    headers = properties.headers or {}
    return int(headers.get("dray-count", 0)) + int(headers.get("x-delivery-count", 0))


def until(check: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[RabbitMQServer]:
    with RabbitMQServer(consumer_timeout=TIMEOUT_S * 1000, channel_tick_interval=1000) as running:
        yield running


@pytest.fixture(params=[True, False], ids=["quorum", "classic"])
def workers(server: RabbitMQServer, request: pytest.FixtureRequest) -> Iterator[Callable[[], Worker]]:
    with ExitStack() as stack:
        vhost = server.add_vhost()
        stack.callback(server.delete_vhost, vhost)
        yield lambda: Worker(server, stack, vhost, request.param)


def test_a_task_twice_as_long_as_the_timeout_runs_once(server: RabbitMQServer, workers: Callable[[], Worker]) -> None:
    worker = workers()
    worker.send(b"long", b"short")
    long, short = worker.take(2)
    assert worker.settle(short) == []
    started = time.monotonic()
    until(lambda: worker.holds.owns(long.receipt), TIMEOUT_S)
    until(lambda: time.monotonic() > started + TIMEOUT_S * 2, TIMEOUT_S * 3)
    assert not worker.feed.error
    assert len(worker.feed.came) == 2
    assert worker.holds.owns(long.receipt)
    assert worker.settle(long) == []
    assert worker.settle(long) == [long.receipt]
    until(lambda: worker.hold_queues(server) == 0)
    until(
        lambda: (
            worker.dialers[1].link().channel().call("queue_declare", queue="t.work", passive=True).method.message_count
            == 0
        )
    )
    assert len(worker.feed.came) == 2


def test_when_the_worker_dies_the_task_runs_again_and_counts(
    server: RabbitMQServer, workers: Callable[[], Worker]
) -> None:
    worker, other = workers(), workers()
    worker.send(b"long")
    (long,) = worker.take(1)
    assert long.delivery_count == 1
    until(lambda: worker.holds.owns(long.receipt), TIMEOUT_S)
    worker.holds.close()
    for dialer in worker.dialers:
        dialer.close()
    (again,) = other.take(1)
    assert (again.id, again.body, again.delivery_count) == ("long", b"long", 2)
    assert not worker.holds.owns(long.receipt)
    assert other.settle(again) == []


def test_who_was_stopped_past_the_lease_is_told(server: RabbitMQServer, workers: Callable[[], Worker]) -> None:
    worker, other = workers(), workers()
    worker.send(b"long")
    (long,) = worker.take(1)
    until(lambda: worker.holds.owns(long.receipt), TIMEOUT_S)
    worker.feed.channel.close()
    worker.holds.close()  # renews no more, as if it were stopped
    (again,) = other.take(1)
    assert worker.settle(long) == [long.receipt]
    assert other.settle(again) == []


def test_held_deliveries_survive_a_lost_connection(server: RabbitMQServer, workers: Callable[[], Worker]) -> None:
    worker = workers()
    worker.send(b"long")
    (long,) = worker.take(1)
    until(lambda: worker.holds.owns(long.receipt), TIMEOUT_S)
    for dialer in worker.dialers:
        dialer.link().close()
    started = time.monotonic()
    until(lambda: time.monotonic() > started + worker.holds.lease_s * 2)
    assert worker.holds.owns(long.receipt)
    assert worker.settle(long) == []


def test_what_is_settled_is_forgotten(server: RabbitMQServer, workers: Callable[[], Worker]) -> None:
    """However fast tasks are, what is remembered is about what is out."""

    class Settled:
        @staticmethod
        def owns(tag: int) -> bool:
            return tag % 1000 == 0

    worker = workers()
    for first in range(0, 50_000, 100):
        worker.holds.watch([Delivery("q", "id", b"", {}, Receipt(Settled, first + n)) for n in range(100)])  # type: ignore[arg-type]
    assert sum(len(batch) for _, batch in worker.holds._watched) < 5000
