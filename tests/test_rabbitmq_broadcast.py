"""Broadcasts over RabbitMQ: everybody who listens hears, also after the connection was lost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dray.core.errors import Unavailable
from dray.plugins._rabbitmq_address import Tls, addresses
from dray.plugins._rabbitmq_broadcast import Broadcast
from dray.plugins._rabbitmq_link import Dialer, LinkOptions
from dray.plugins._rabbitmq_publisher import Publisher
from dray.testing import plugin_context


class Process:
    def __init__(self, url: str, stack: ExitStack) -> None:
        context = plugin_context("rabbitmq")
        self.dialers = [Dialer(addresses(url), Tls(), LinkOptions(), context, name) for name in ("publish", "consume")]
        for dialer in self.dialers:
            dialer.open()
            stack.callback(dialer.close)
        self.broadcast = Broadcast("t", self.dialers[1], Publisher(self.dialers[0]), context)
        stack.callback(self.broadcast.close)


@pytest.fixture
def processes(rabbitmq_url: str) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        yield [Process(rabbitmq_url, stack) for _ in range(3)]


def heard(box: queue.Queue[bytes], count: int) -> list[bytes]:
    return [box.get(timeout=10) for _ in range(count)]


def test_everybody_who_listens_hears_everything_in_order(processes: list[Process]) -> None:
    boxes = [queue.Queue[bytes]() for _ in processes]
    processes[0].broadcast.broadcast("control", b"too early")
    for process, box in zip(processes, boxes, strict=True):
        process.broadcast.listen("control", box.put)
    other = queue.Queue[bytes]()
    processes[0].broadcast.listen("events", other.put)
    payloads = [b"%d" % number for number in range(50)]
    for payload in payloads:
        processes[1].broadcast.broadcast("control", payload)
    assert [heard(box, 50) for box in boxes] == [payloads] * 3
    assert other.empty()


def test_a_channel_that_nobody_listens_to_takes_everything(processes: list[Process]) -> None:
    processes[0].broadcast.broadcast("nobody", b"x" * 100_000)


def test_who_stopped_hears_nothing_and_leaves_no_queue(processes: list[Process]) -> None:
    stopped, other = queue.Queue[bytes](), queue.Queue[bytes]()
    stop = processes[0].broadcast.listen("c", stopped.put)
    processes[1].broadcast.listen("c", other.put)
    stop()
    stop()
    processes[1].broadcast.broadcast("c", b"x")
    assert heard(other, 1) == [b"x"]
    assert stopped.empty()


def test_a_listener_may_stop_itself_and_one_that_fails_goes_on(processes: list[Process]) -> None:
    heard_by_failing, stopped = queue.Queue[bytes](), threading.Event()

    def fail(payload: bytes) -> None:
        heard_by_failing.put(payload)
        raise ValueError("a listener of the test")

    def once(_: bytes) -> None:
        stop()
        stopped.set()

    processes[0].broadcast.listen("c", fail)
    stop = processes[0].broadcast.listen("c", once)
    for payload in (b"1", b"2"):
        processes[1].broadcast.broadcast("c", payload)
    assert heard(heard_by_failing, 2) == [b"1", b"2"]
    assert stopped.wait(10)


def test_who_lost_the_connection_listens_again(processes: list[Process]) -> None:
    box = queue.Queue[bytes]()
    processes[0].broadcast.listen("c", box.put)
    processes[1].broadcast.broadcast("c", b"before")
    assert heard(box, 1) == [b"before"]
    processes[0].dialers[1].link().close()
    deadline = time.monotonic() + 20
    while box.empty():
        assert time.monotonic() < deadline
        processes[1].broadcast.broadcast("c", b"after")
        threading.Event().wait(0.05)
    assert box.get() == b"after"


def test_listening_without_a_broker_is_unavailable(processes: list[Process]) -> None:
    processes[0].dialers[1].close()
    with pytest.raises(Unavailable):
        processes[0].broadcast.listen("c", lambda _: None)
