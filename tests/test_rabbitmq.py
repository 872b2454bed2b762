"""What is RabbitMQ's own: settings that are wrong, counts, demand, queues that vanish, brokers that stop and die."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pika")

import pika

from dray.core.clock import SystemClock
from dray.core.contracts import Consumer
from dray.core.errors import ConfigError, InvalidName, SendError, TransportError, Unavailable, Uncertain
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.plugins import _rabbitmq_fast as fast
from dray.plugins._rabbitmq_delays import DUE_HEADER
from dray.plugins._rabbitmq_publisher import Parcel
from dray.plugins.transports.rabbitmq import RabbitMQTransport
from dray.testing import FakeClock, plugin_context
from tests.servers import HOST, Certificates, RabbitMQServer, SharedRabbitMQ, free_ports

PATIENCE_S = 20.0
Make = Callable[..., RabbitMQTransport]


@pytest.fixture
def make(rabbitmq_url: str) -> Iterator[Make]:
    """Builds transports on this test's virtual host; closes them."""
    made: list[RabbitMQTransport] = []

    def build(url: str | tuple[str, ...] = rabbitmq_url, clock: Any = None, **options: Any) -> RabbitMQTransport:
        context = plugin_context("rabbitmq", clock or SystemClock())
        transport = RabbitMQTransport(RabbitMQTransport.Options(url=url, **options), context)
        made.append(transport)
        return transport

    yield build
    for transport in made:
        transport.close()


@pytest.fixture
def transport(make: Make) -> RabbitMQTransport:
    transport = make()
    transport.open()
    return transport


def message(id_: str, queue: str = "q", **fields: Any) -> Outgoing:
    return Outgoing(queue, id_, b"body", {"task": "t"}, **fields)


def messages(count: int, queue: str = "q") -> list[Outgoing]:
    return [message(f"m{number}", queue) for number in range(count)]


def take(consumer: Consumer, count: int, patience_s: float = PATIENCE_S) -> list[Delivery]:
    """``count`` deliveries, or what came in time."""
    found: list[Delivery] = []
    deadline = time.monotonic() + patience_s
    while len(found) < count and (left_s := deadline - time.monotonic()) > 0:
        found += consumer.receive(count - len(found), left_s)
    return found


def settle(transport: RabbitMQTransport, deliveries: Sequence[Delivery], action: Action = Action.ACK) -> None:
    assert transport.settle([Settlement(delivery, action) for delivery in deliveries]) == []


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.02)


class Wire:
    """Speaks AMQP to a broker directly, as somebody else would."""

    def __init__(self, url: str) -> None:
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ready(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)


# --- settings --------------------------------------------------------------------------------------------------


def test_a_wrong_password_is_named_and_not_shown(make: Make, rabbitmq_url: str) -> None:
    transport = make(rabbitmq_url.replace("//guest:guest@", "//guest:not-the-password@"))
    with pytest.raises(Unavailable, match=r"refused user 'guest'.*password in url") as raised:
        transport.open()
    assert "not-the-password" not in str(raised.value)


def test_a_wrong_virtual_host_is_named(make: Make, rabbitmq: SharedRabbitMQ) -> None:
    with pytest.raises(Unavailable, match=r"virtual host 'nowhere'.*the end of url"):
        make(rabbitmq.url("nowhere")).open()


def test_a_wrong_port_is_named(make: Make) -> None:
    (port,) = free_ports(1)
    with pytest.raises(Unavailable, match=f"{port}.*nothing listens there: check host and port in url"):
        make(f"amqp://guest:guest@{HOST}:{port}/").open()


def test_something_else_that_listens_is_told(make: Make) -> None:
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Unavailable, match="check host and port in url"):
            make(f"amqp://guest:guest@{HOST}:{server.getsockname()[1]}/", connect_timeout=5).open()


def test_who_never_answers_is_given_up(make: Make) -> None:
    with socket.create_server((HOST, 0)) as server:
        transport = make(f"amqp://guest:guest@{HOST}:{server.getsockname()[1]}/", connect_timeout=0.5)
        started = time.monotonic()
        with pytest.raises(Unavailable):
            transport.open()
        assert time.monotonic() - started < 8


def test_tls_to_a_plain_port_is_told(make: Make, rabbitmq_url: str) -> None:
    with pytest.raises(Unavailable, match=r"no TLS there.*amqp://"):
        make(rabbitmq_url.replace("amqp://", "amqps://")).open()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://localhost", "amqp://user:password@host:5672/vhost"),
        ("amqp://localhost:notaport/", "amqp://user:password@host:5672/vhost"),
        ("amqp://localhost/?heartbeat=5", "options of their own"),
        ((), "empty list"),
    ],
)
def test_a_url_that_makes_no_sense_is_explained(make: Make, url: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(url)


@pytest.mark.parametrize("options", [{"priorities": 11}, {"priorities": 0}, {"prefix": "amq.x"}, {"heartbeat": 0.2}])
def test_options_out_of_range_are_refused(make: Make, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)


def test_a_queue_that_was_declared_otherwise_is_explained_and_harms_nothing_else(make: Make) -> None:
    quorum, classic = make(), make(queue_type="classic")
    for one in (quorum, classic):
        one.open()
    quorum.send([message("m")])
    for call in (lambda: classic.send([message("n")]), lambda: classic.consumer(["q"], 1)):
        with pytest.raises(ConfigError, match=r"'dray\.queue\.q'.*queue_type"):
            call()
    classic.send([message("n", "other")])
    assert [delivery.id for delivery in take(quorum.consumer(["q"], 1), 1)] == ["m"]


def test_names_that_amqp_cannot_carry_are_refused(transport: RabbitMQTransport) -> None:
    with pytest.raises(InvalidName, match="255"):
        transport.send([message("m", "q" * 250)])
    with pytest.raises(InvalidName, match="255"):
        transport.send([message("ü" * 128)])


# --- messages that others made -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["text/plain", fast.CONTENT_TYPE, None])
def test_what_was_put_there_by_hand_is_handed_out_without_headers(
    transport: RabbitMQTransport, rabbitmq_url: str, content_type: str | None
) -> None:
    """The worker then puts it aside, with a reason (promise G8)."""
    consumer = transport.consumer(["q"], 10)
    with Wire(rabbitmq_url) as wire:
        for headers in (None, {"float": "x", "dray-count": "many", "dray-due": -1, "x-delivery-count": []}):
            properties = pika.BasicProperties(content_type, headers=headers, priority=255)
            wire.channel.basic_publish("", "dray.queue.q", b"D\x01 no frame", properties)
    found = take(consumer, 2)
    assert [(delivery.body, dict(delivery.headers)) for delivery in found] == [(b"D\x01 no frame", {})] * 2
    assert len({delivery.id for delivery in found}) == 1
    settle(transport, found[:1], Action.RELEASE)
    (again,) = take(consumer, 1)
    settle(transport, [again, found[1]], Action.DEAD)
    assert {letter.body for letter in transport.dead_list("q", 10)} == {b"D\x01 no frame"}


def test_a_dead_letter_that_was_put_there_by_hand_is_listed(transport: RabbitMQTransport, rabbitmq_url: str) -> None:
    transport.send([message("m")])
    settle(transport, take(transport.consumer(["q"], 1), 1), Action.DEAD)
    with Wire(rabbitmq_url) as wire:
        wire.channel.basic_publish("", "dray.dead", b"?", pika.BasicProperties(headers={"dray-died": "x"}))
    until(lambda: len(transport.dead_list(None, 10)) == 2)
    assert {letter.reason for letter in transport.dead_list(None, 10)} == {"", "put here by hand"}


# --- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_each_lost_worker_counts_and_giving_back_does_not(make: Make, queue_type: str) -> None:
    counts = []
    sender = make(queue_type=queue_type)
    sender.open()
    sender.send([message("m")])
    for _ in range(3):
        worker = make(queue_type=queue_type)
        worker.open()
        consumer = worker.consumer(["q"], 1)
        (delivery,) = take(consumer, 1)
        settle(worker, [delivery], Action.RELEASE)
        (again,) = take(consumer, 1)
        assert again.delivery_count == delivery.delivery_count
        counts.append(again.delivery_count)
        worker.close()  # without a settlement: as if it had died
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_what_was_buffered_and_never_handed_out_is_not_charged(make: Make, queue_type: str) -> None:
    transport = make(queue_type=queue_type)
    transport.open()
    transport.send(messages(20))
    for _ in range(3):
        consumer = transport.consumer(["q"], 20)
        held = take(consumer, 1)
        consumer.close()
        settle(transport, held, Action.RELEASE)
    found = take(transport.consumer(["q"], 100), 20)
    assert sorted(delivery.id for delivery in found) == sorted(f"m{number}" for number in range(20))
    assert {delivery.delivery_count for delivery in found} == {1}


def test_what_a_closed_consumer_handed_out_is_still_ours(transport: RabbitMQTransport, rabbitmq_url: str) -> None:
    transport.send(messages(3))
    consumer = transport.consumer(["q"], 10)
    held = take(consumer, 3)
    consumer.close()
    settle(transport, held)
    with Wire(rabbitmq_url) as wire:
        transport.close()
        assert wire.ready("dray.queue.q") == 0


# --- demand -------------------------------------------------------------------------------------------------------


def test_one_slow_task_does_not_hold_the_window(make: Make) -> None:
    """What is finished behind it is acknowledged singly, and new messages come in its place."""
    transport = make()
    transport.open()
    transport.send(messages(40))
    consumer = transport.consumer(["q"], 4)
    (slow,) = take(consumer, 1)
    seen = []
    for _ in range(39):
        (delivery,) = take(consumer, 1)
        seen.append(delivery.id)
        settle(transport, [delivery])
    assert len(set(seen) | {slow.id}) == 40
    settle(transport, [slow])


def test_demand_that_grows_is_met_in_order(transport: RabbitMQTransport) -> None:
    transport.send(messages(3000))
    consumer = transport.consumer(["q"], 1)
    found: list[Delivery] = []
    for limit in itertools.chain((1, 3, 10, 50, 200), itertools.repeat(1000)):
        if len(found) == 3000:
            break
        got = consumer.receive(limit, PATIENCE_S)
        assert 0 < len(got) <= limit
        found += got
        settle(transport, got)
    assert [delivery.id for delivery in found] == [f"m{number}" for number in range(3000)]
    assert {delivery.delivery_count for delivery in found} == {1}


def test_demand_that_falls_leaves_the_rest_to_others(make: Make) -> None:
    greedy, other = make(), make()
    for one in (greedy, other):
        one.open()
    greedy.send(messages(500))
    consumer = greedy.consumer(["q"], 400)
    held = take(consumer, 1)
    found: list[Delivery] = []
    others, deadline = other.consumer(["q"], 500), time.monotonic() + PATIENCE_S
    while len(found) < 490 and time.monotonic() < deadline:
        assert consumer.receive(0, 0) == []  # who has no room says so, now and then
        found += others.receive(500, 0.1)
    assert len(found) >= 490
    assert {delivery.delivery_count for delivery in found} == {1}
    settle(greedy, held)


def test_earlier_queues_are_preferred_from_the_first_call_on(transport: RabbitMQTransport) -> None:
    transport.send([message(f"late {number}", "second") for number in range(5)] + [message("soon", "first")])
    consumer = transport.consumer(["first", "second"], 10)
    assert consumer.receive(1, PATIENCE_S)[0].id == "soon"


def test_wake_may_come_from_a_signal_handler(transport: RabbitMQTransport) -> None:
    consumer = transport.consumer(["q"], 1)
    before = signal.signal(signal.SIGUSR1, lambda *_: consumer.wake())
    try:
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGUSR1])
        timer.start()
        assert consumer.receive(1, 1.0) == []
        timer.join()
        assert consumer.receive(1, 0) == []
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- delays -------------------------------------------------------------------------------------------------------


def test_a_delay_that_is_longer_than_the_ladder_waits_on(make: Make, rabbitmq_url: str) -> None:
    clock = FakeClock()
    transport = make(clock=clock)
    transport.open()
    consumer = transport.consumer(["q"], 10)
    due = clock.time() + 400 * 86400
    transport.send([message("m", not_before=due)])
    with Wire(rabbitmq_url) as wire:
        (got, properties, body) = wire.channel.basic_get("dray.delay.48d", auto_ack=True)
        assert got is not None
        assert properties.headers[DUE_HEADER] == pytest.approx(due * 1000, abs=1)
        wire.channel.basic_publish("", "dray.queue.q", body, properties)  # as if 49 days had passed
        assert consumer.receive(1, 0.3) == []
        until(lambda: wire.ready("dray.delay.48d") == 1)
        clock.advance(401 * 86400)
        wire.channel.basic_publish("", "dray.queue.q", body, properties)
    (delivery,) = take(consumer, 1)
    assert (delivery.id, delivery.delivery_count) == ("m", 1)


# --- long tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
@pytest.mark.parametrize("action", list(Action))
def test_a_task_that_is_held_is_settled_as_any_other(make: Make, queue_type: str, action: Action) -> None:
    transport = make(consumer_timeout=2, queue_type=queue_type)
    transport.open()
    transport.send([message("m")])
    consumer = transport.consumer(["q"], 5)
    (delivery,) = take(consumer, 1)
    until(lambda: not delivery.receipt.feed.owns(delivery.receipt.tag))
    assert transport.settle([Settlement(delivery, action, (message("next"),))]) == []
    assert transport.settle([Settlement(delivery, action)]) == [delivery]
    found = take(consumer, 3, patience_s=2)
    assert {each.id for each in found} == ({"next", "m"} if action is Action.RELEASE else {"next"})
    assert {each.delivery_count for each in found} == {1}
    assert [letter.id for letter in transport.dead_list("q", 9)] == (["m"] if action is Action.DEAD else [])


def test_a_task_that_is_held_comes_back_when_its_worker_dies(make: Make) -> None:
    dying, other = make(consumer_timeout=2), make(consumer_timeout=2)
    for one in (dying, other):
        one.open()
    dying.send([message("m")])
    (delivery,) = take(dying.consumer(["q"], 1), 1)
    until(lambda: not delivery.receipt.feed.owns(delivery.receipt.tag))
    dying.close()
    (again,) = take(other.consumer(["q"], 1), 1)
    assert (again.id, again.body, again.delivery_count) == ("m", b"body", 2)


# --- what happens to queues and brokers ---------------------------------------------------------------------------


def test_a_queue_that_was_deleted_underneath_is_made_again(transport: RabbitMQTransport, rabbitmq_url: str) -> None:
    consumer = transport.consumer(["q"], 1)
    with Wire(rabbitmq_url) as wire:
        wire.channel.queue_delete("dray.queue.q")
    with pytest.raises(Unavailable, match=r"dray\.queue\.q.*deleted"):
        consumer.receive(1, PATIENCE_S)
    consumer.close()
    transport.send([message("m")])
    assert [delivery.id for delivery in take(transport.consumer(["q"], 1), 1)] == ["m"]


def test_a_refused_message_is_told_and_the_others_are_stored(
    transport: RabbitMQTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.send(messages(1))
    name = transport._topology.name
    monkeypatch.setattr(transport._topology, "name", lambda queue, level=0: name(queue, level) + "?" * (queue == "bad"))
    monkeypatch.setattr(transport._topology, "declare", lambda *_: None)
    with pytest.raises(SendError, match=r"1 of 3 .*NO_ROUTE") as raised:
        transport.send([message("a"), message("lost", "bad"), message("b")])
    assert [each.id for each in raised.value.unsent] == ["lost"]
    assert [delivery.id for delivery in take(transport.consumer(["q"], 9), 3)] == ["m0", "a", "b"]


def test_the_next_of_several_urls_is_tried(make: Make, rabbitmq_url: str) -> None:
    (port,) = free_ports(1)
    transport = make((f"amqp://guest:guest@{HOST}:{port}/", rabbitmq_url))
    transport.open()
    transport.send([message("m")])
    assert take(transport.consumer(["q"], 1), 1)[0].id == "m"
    with pytest.raises(Unavailable, match=rf"{port}.*nothing listens.*; .*nothing listens"):
        make((f"amqp://guest:guest@{HOST}:{port}/", f"amqp://guest:guest@localhost:{port}/")).open()


def test_queues_of_other_processes_are_listed_while_they_exist(make: Make, rabbitmq_url: str) -> None:
    one, other = make(), make()
    for each in (one, other):
        each.open()
    one.declare(["a", "b/c"])
    one.send([message("m", "é")])
    assert other.queues() == ["a", "b/c", "é"]
    with Wire(rabbitmq_url) as wire:
        wire.channel.queue_delete("dray.queue.a")
    assert other.queues() == one.queues() == ["b/c", "é"]


def test_an_idle_connection_lives_while_the_process_computes(make: Make, rabbitmq_url: str) -> None:
    transport = make(heartbeat=1)
    transport.open()
    link = transport._publish_dialer.link()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        sum(range(1000))
    transport.send([message("m")])
    assert transport._publish_dialer.link() is link


def test_follow_ups_of_many_threads_share_the_wire(transport: RabbitMQTransport) -> None:
    threads = [
        threading.Thread(target=lambda at=at: [transport.send([message(f"{at}-{n}")]) for n in range(50)])
        for at in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = take(transport.consumer(["q"], 1000), 800)
    assert len({delivery.id for delivery in found}) == 800


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitMQServer]:
    """One that may be stopped, starved and killed."""
    with RabbitMQServer() as server:
        yield server


@pytest.fixture
def own(make: Make, broker: RabbitMQServer) -> RabbitMQTransport:
    transport = make(broker.url(broker.add_vhost()), heartbeat=2)
    transport.open()
    return transport


def test_a_memory_alarm_is_told_and_acknowledgements_pass(own: RabbitMQTransport, broker: RabbitMQServer) -> None:
    own.send(messages(10))
    consumer = own.consumer(["q"], 10)
    held = take(consumer, 10)
    broker.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).")
    try:
        for _ in range(3):
            with pytest.raises((Unavailable, Uncertain), match="memory"):
                while True:
                    own.send([message("m")])
        with pytest.raises(Unavailable, match=r"stopped all publishers: low on memory.*vm_memory_high_watermark"):
            own.send([message("m")])
        settle(own, held)
        assert own.stats(["q"])["q"].ready >= 0
    finally:
        broker.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()}).")
    until(lambda: _works(lambda: own.send([message("after")])))


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except TransportError:
        return False
    return True


def test_a_killed_broker_loses_nothing_and_is_found_again(own: RabbitMQTransport, broker: RabbitMQServer) -> None:
    own.send(messages(100))
    consumer = own.consumer(["q"], 100)
    done = take(consumer, 10)
    settle(own, done)
    broker.kill()
    with pytest.raises(Unavailable):
        while True:
            consumer.receive(100, PATIENCE_S)
    consumer.close()
    with pytest.raises(TransportError):
        own.send([message("lost")])
    broker.restart()
    own.send([message("after")])  # the first one: no attempt is needed to notice
    found = {delivery.id for delivery in take(own.consumer(["q"], 200), 101, patience_s=5)}
    assert {f"m{number}" for number in range(10, 100)} | {"after"} <= found  # acknowledgements may have been lost


def test_a_certificate_is_verified_unless_it_is_switched_off(make: Make, tmp_path: Path) -> None:
    certificates = Certificates.make(tmp_path)
    with RabbitMQServer(tls=certificates) as server:
        url = server.tls_url().replace("127.0.0.1", "localhost")
        with pytest.raises(Unavailable, match=r"not trusted.*set ca"):
            make(url).open()
        for options in ({"ca": certificates.authority}, {"verify": False}):
            transport = make(url, **options)
            transport.open()
            transport.send([message("m")])
        with pytest.raises(Unavailable, match="plain AMQP"):
            make(url.replace("amqps://", "amqp://")).open()
        with pytest.raises(ConfigError, match="ca="):
            make(url, ca=tmp_path / "missing.pem").open()


# --- the shorter way through pika -----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"x", b"y" * 5000])
@pytest.mark.parametrize("priority", [0, 7])
@pytest.mark.parametrize("headers", [None, {"dray-count": 3, "dray-reason": "é" * 300}])
def test_frames_are_those_that_pika_makes(body: bytes, priority: int, headers: dict[str, Any] | None) -> None:
    from pika import frame, spec

    properties = pika.BasicProperties(
        fast.CONTENT_TYPE, headers=headers, delivery_mode=2, priority=priority or None, message_id="é1"
    )
    frames = [
        frame.Method(7, spec.Basic.Publish(exchange="ex", routing_key="key.é", mandatory=True)).marshal(),
        frame.Header(7, len(body), properties).marshal(),
        *(frame.Body(7, body[at : at + 4088]).marshal() for at in range(0, len(body), 4088)),
    ]
    assert fast.encode(7, [Parcel("ex", "key.é", body, "é1", priority, headers)], 4096) == b"".join(frames)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4089, 70_000, 300_000])
def test_messages_of_any_size_come_either_way(
    make: Make, monkeypatch: pytest.MonkeyPatch, is_fast: bool, size: int
) -> None:
    monkeypatch.setattr(fast, "is_usable", lambda: is_fast)
    transport = make()
    transport.open()
    bodies = [bytes([number]) * size for number in range(5)]
    transport.send([Outgoing("q", f"{number}", body, {"n": "é"}) for number, body in enumerate(bodies)])
    found = take(transport.consumer(["q"], 10), 5)
    assert [(delivery.body, dict(delivery.headers)) for delivery in found] == [(body, {"n": "é"}) for body in bodies]
    settle(transport, found)


def test_the_short_way_is_taken_here() -> None:
    assert fast.is_usable(), f"pika {pika.__version__}: look whether its inside has changed, and add it"
