"""RabbitMQ passes the transport kit: on quorum and on classic queues, with and without priorities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

pytest.importorskip("pika")

import pika

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import Transport
from dray.plugins import _rabbitmq_fast
from dray.plugins._rabbitmq_delays import DUE_HEADER, Declaration, Delays, Route
from dray.plugins.transports.rabbitmq import RabbitMQTransport
from dray.testing import FakeClock, TransportConformance, plugin_context

pytestmark = pytest.mark.timeout(600)  # "nothing more comes" takes a second each time, and the state machine asks often


class ParkedDelays(Delays):
    """The ladder with its clock stopped: messages wait in its queues until the kit lets time pass."""

    def __init__(self, prefix: str, quorum: bool) -> None:
        super().__init__(f"{prefix}.parked", quorum)
        self.queues: set[str] = set()

    def route(self, queue: str, delay_s: float) -> Route:
        return super().route(queue, delay_s)._replace(rest_s=1e-9)  # then the message says when it is due

    def waiting(self, at: int, position: int) -> Iterator[Declaration]:
        for declaration in super().waiting(at, position):
            arguments = declaration.arguments.get("arguments", {})
            if arguments.pop("x-message-ttl", None):
                self.queues.add(declaration.arguments["queue"])
            yield declaration

    def release(self, url: str, now: float) -> None:
        """Those that are due go where the last hop would bring them."""
        due = []
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for queue in self.queues:
                while (found := channel.basic_get(queue))[0] is not None:
                    if found[1].headers[DUE_HEADER] <= now * 1000:
                        due.append(found)
            for method, properties, body in sorted(due, key=lambda found: found[1].headers[DUE_HEADER]):
                channel.basic_publish(self.arrivals, method.routing_key, body, properties)
                channel.basic_ack(method.delivery_tag)


class RabbitMQConformance(TransportConformance):
    """On a fake clock with a ladder that obeys it; on the machine's clock with the real one."""

    patience_s = 1.0
    machine_examples = 3  # each waits for the broker, again and again
    options: ClassVar[dict[str, Any]] = {}
    url = ""

    @pytest.fixture(autouse=True)
    def _on_a_virtual_host(self, rabbitmq_url: str) -> None:
        self.url = rabbitmq_url
        self._parked = list[ParkedDelays]()

    def make(self, clock: Clock) -> Transport:
        options = RabbitMQTransport.Options(url=self.url, **self.options)
        transport = RabbitMQTransport(options, plugin_context("rabbitmq", clock, self.tmp_path))
        if isinstance(clock, FakeClock):
            parked = ParkedDelays(options.prefix, options.queue_type == "quorum")
            transport._topology.delays = parked
            self._parked.append(parked)
        return transport

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for parked in self._parked:
            parked.release(self.url, self.clock.time())


class TestRabbitMQ(RabbitMQConformance):
    """The one whose network makes trouble: what is on the link is the same for all."""

    silence_s = 3.0

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 5672

    def through(self, port: int) -> Transport:
        url = self.url.replace(f":{self.address[1]}/", f":{port}/")
        options = RabbitMQTransport.Options(url=url, heartbeat=1, connect_timeout=2, timeout=2, **self.options)
        return RabbitMQTransport(options, plugin_context("rabbitmq", SystemClock(), self.tmp_path))


class TestRabbitMQClassic(RabbitMQConformance):
    options: ClassVar[dict[str, Any]] = {"queue_type": "classic"}


class TestRabbitMQPriorities(RabbitMQConformance):
    options: ClassVar[dict[str, Any]] = {"priorities": 10}


class TestRabbitMQClassicPriorities(RabbitMQConformance):
    options: ClassVar[dict[str, Any]] = {"queue_type": "classic", "priorities": 10}


class TestRabbitMQByPikaAlone(RabbitMQConformance):
    """As with a version of pika whose inside is not known."""

    machine_examples = 1

    @pytest.fixture(autouse=True)
    def _without_the_shorter_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_rabbitmq_fast, "is_usable", lambda: False)
