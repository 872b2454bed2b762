"""One connection to RabbitMQ in a thread of its own, and how other threads use it.

How the parts are used (any thread, unless it says "I/O thread")::

    dialer = Dialer(addresses(url), Tls(), LinkOptions(), context, "publish")     # connects nothing
    dialer.open()                          # from now on ``link()`` may dial
    link = dialer.link()                   # the live Link: this thread dials when there is none; Unavailable
    channel = link.channel(on_close=..., on_cancel=..., on_return=...)            # blocks for the round trip
    frame = channel.call("queue_declare", queue="q", durable=True, arguments={})  # pika's method and arguments, its
    frame.method.message_count                                                    # answer; Refused, Unavailable
    channel.calls([("exchange_declare", {...}), ("queue_bind", {...})])           # many at once
    channel.get("q")                       # basic_get: (method, properties, body) or None
    channel.consume("q", on_message, auto_ack=True, arguments={})                 # -> consumer tag;
    #   ``on_message(method, properties, body)`` runs in the I/O thread: never block there
    channel.post(lambda pika_channel: pika_channel.basic_ack(7))                  # I/O thread soon; no answer
    link.post(work)                        # run ``work()`` in the I/O thread soon
    link.later(0.03, work)                 # I/O thread only: run ``work()`` after that many seconds
    dialer.close()

Publishing with confirms is in ``_rabbitmq_publisher``. A Link that is lost stays lost; ``dialer.link()`` makes another
one, and everything that belonged to the old one (channels, delivery tags) is stale: ``channel.is_open`` is False. A
link whose answers do not come in time is given up.
Errors: ``Refused`` (an ``Unavailable`` with ``code`` and ``text``) when the broker closed the channel because of what
was asked; ``Unavailable`` when the link is lost or does not answer in time: all of AMQP's synchronous methods may be
repeated.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika

from dray.core.contracts import PluginContext
from dray.core.errors import Unavailable
from dray.plugins import _rabbitmq_fast as fast
from dray.plugins._rabbitmq_address import Address, Tls
from dray.plugins._rabbitmq_channel import Answer, Channel
from dray.plugins._rabbitmq_errors import cannot_connect, link_lost

CLOSE_S = 2.0
"""How long closing may take: what was written must reach the broker, and its goodbye come back."""
_CHECKS = 3
"""The broker is silent for that many half heartbeats: the link is dead."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """What all links of a transport share; seconds."""

    heartbeat_s: int = 20
    connect_timeout_s: float = 10.0
    answer_timeout_s: float = 30.0


class Link:
    """One connection and the thread that drives it.

    Responsibilities: connects; keeps heartbeats whatever the rest of the process does; runs what other threads post,
    many for one wake-up; notices a silent broker within two heartbeats; tells every channel when it is lost, and why.
    """

    def __init__(self, address: Address, tls: Tls, options: LinkOptions, logger: logging.Logger, purpose: str) -> None:
        """Connects; raises ``Unavailable``, or ``ConfigError`` for TLS files that cannot be used."""
        self.address = address
        self.options = options
        self.logger = logger
        self.error: Exception | None = None
        """Why it is lost; None while it lives."""
        self.blocked: str | None = None
        """Why the broker has stopped reading what this link publishes; None when it reads."""
        self.server = 0, 0
        """The broker's version, for instance ``(3, 10)``."""
        self._parameters = address.parameters(tls, options.heartbeat_s, options.connect_timeout_s, f"dray {purpose}")
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_awake = False
        self._channels: set[Channel] = set()
        self._connection: Any = None
        self._leaving = False
        self._silent = self._heard = 0
        self._opened = Answer()
        self._ioloop = pika.adapters.select_connection.IOLoop()
        self._thread = threading.Thread(target=self._run, name=f"dray-rabbitmq-{purpose}", daemon=True)
        self._thread.start()
        if not self._opened.wait(options.connect_timeout_s + 5):
            self._opened.fail(Unavailable(f"rabbitmq: {address}: no connection in {options.connect_timeout_s:g} s"))
            self._ioloop.add_callback_threadsafe(self._ioloop.stop)
        self._opened.result(0, "connect")

    # --- any thread ----------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self.error is None and self._opened.given

    def post(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the I/O thread soon, in order. Raises ``Unavailable`` when the link is lost."""
        with self._lock:
            if self.error is not None:
                raise link_lost(self.address, self.error)
            self._jobs.append(job)
            if self._is_awake:
                return
            self._is_awake = True
        self._ioloop.add_callback_threadsafe(self._run_jobs)

    def channel(
        self,
        on_close: Callable[[Exception], None] | None = None,
        on_cancel: Callable[[str], None] | None = None,
        on_return: Callable[[Any, Any, bytes], None] | None = None,
    ) -> Channel:
        """A new channel. The callbacks run in the I/O thread: closed for any reason; a consumer (its tag) cancelled by
        the broker; a message returned as not routable (method, properties, body)."""
        channel = Channel(self, on_close, on_cancel, on_return)
        channel.opened.result(self.options.answer_timeout_s, "channel open")
        return channel

    def drop(self, why: str) -> None:
        """Give it up: something that should have come did not. Waits for nothing."""
        error = Unavailable(why)

        def job() -> None:
            self._lose(error)
            self._say_goodbye()

        with contextlib.suppress(Unavailable):
            self.post(job)

    def leave(self) -> None:
        """Say goodbye after everything that was posted before. Waits for nothing."""
        with contextlib.suppress(Unavailable):
            self.post(self._say_goodbye)

    def close(self) -> None:
        """Say goodbye, and wait a few seconds for it. Idempotent."""
        self.leave()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S + 1)

    # --- I/O thread ----------------------------------------------------------------------------------------

    @property
    def connection(self) -> Any:
        """Pika's connection. I/O thread only."""
        return self._connection

    def later(self, delay_s: float, job: Callable[[], None]) -> None:
        """Run ``job`` after ``delay_s`` seconds, unless the link is lost before. I/O thread only."""
        self._ioloop.call_later(delay_s, job)

    def add(self, channel: Channel) -> None:
        """Tell this channel when the link is lost. I/O thread only."""
        self._channels.add(channel)

    def discard(self, channel: Channel) -> None:
        """It is closed. I/O thread only."""
        self._channels.discard(channel)

    def _run(self) -> None:
        try:
            self._connection = (fast.FastConnection if fast.is_usable() else pika.SelectConnection)(
                self._parameters,
                on_open_callback=self._on_open,
                on_open_error_callback=self._on_open_error,
                on_close_callback=self._on_close,
                custom_ioloop=self._ioloop,
            )
            self._ioloop.start()
        except Exception as error:
            self.logger.exception("rabbitmq: the connection to %s failed", self.address)
            self._lose(error)
        self._lose(Unavailable("the link was closed"))
        # Should the broker not have answered: pika does not let go of its socket, and the garbage collector is late.
        transport = getattr(self._connection, "_transport", None)
        socket = getattr(transport, "_sock", None)
        if socket is not None:
            socket.close()
        self._ioloop.close()

    def _run_jobs(self) -> None:
        jobs, lock = self._jobs, self._lock
        while True:
            with lock:
                if not jobs:
                    self._is_awake = False
                    return
                batch = list(jobs)
                jobs.clear()
            for job in batch:
                try:
                    job()
                except Exception:
                    self.logger.exception("rabbitmq: an order to the connection failed")

    def _on_open(self, connection: Any) -> None:
        version = str(connection.server_properties.get("version", "")).split(".")
        major, minor, *_ = [int(part) if part.isdigit() else 0 for part in [*version, "0"]]
        self.server = major, minor
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        if isinstance(connection, fast.FastConnection):
            connection.read_more()
        if self.options.heartbeat_s:
            self.later(self.options.heartbeat_s / 2, self._listen)
        self._opened.give()

    def _on_open_error(self, _: Any, error: Exception) -> None:
        self._opened.fail(cannot_connect(self.address, error))
        self._lose(error)
        self._ioloop.stop()

    def _on_close(self, _: Any, error: Exception) -> None:
        self._lose(error)
        self._ioloop.stop()

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.blocked = str(frame.method.reason)
        self.logger.warning("rabbitmq: %s accepts no messages: %s", self.address, self.blocked)

    def _on_unblocked(self, _: Any, __: Any) -> None:
        self.blocked = None
        self.logger.warning("rabbitmq: %s accepts messages again", self.address)

    def _listen(self) -> None:
        """Whether the broker still says anything. Checks are counted, not seconds: this process may have been stopped,
        and then what was said meanwhile is read after this."""
        if self.error is not None:
            return
        received = self._connection.bytes_received
        self._silent = self._silent + 1 if received == self._heard else 0
        self._heard = received
        if self._silent < _CHECKS:
            self.later(self.options.heartbeat_s / 2, self._listen)
            return
        self.drop(f"the broker was silent for {self._silent * self.options.heartbeat_s / 2:g} s")

    def _say_goodbye(self) -> None:
        if self._leaving:
            return
        self._leaving = True
        self.later(CLOSE_S, self._ioloop.stop)
        if self._connection.is_open:
            self._connection.close()
        else:
            self._ioloop.stop()

    def _lose(self, error: Exception) -> None:
        """Nothing works any more: tell everybody. What was posted and not begun fails as well. Idempotent."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        self._opened.fail(cannot_connect(self.address, error))
        if not self._leaving and self._connection is not None:
            self.logger.debug("rabbitmq: the connection to %s is lost: %r", self.address, error)
        for channel in list(self._channels):
            channel.lose(error)
        self._run_jobs()


class Dialer:
    """Has a live link when one is asked for.

    Responsibilities: dials when there is none, one thread at a time while the others wait for what it finds; begins
    with the address that worked last and goes round once. It does not try again by itself: whoever calls does, with
    growing pauses.
    """

    def __init__(
        self, addresses: Sequence[Address], tls: Tls, options: LinkOptions, context: PluginContext, purpose: str
    ) -> None:
        self.options = options
        self._addresses = tuple(addresses)
        self._tls = tls
        self._context = context
        self._purpose = purpose
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._first = 0
        self._is_open = False
        self._failed: tuple[float, Unavailable] | None = None
        log = logging.getLogger("pika")
        if log.level == logging.NOTSET:
            log.setLevel(logging.CRITICAL)  # it tells of each lost connection several times, with tracebacks; we do too

    def open(self) -> None:
        """``link`` may dial from now on. Idempotent."""
        self._is_open = True

    def link(self) -> Link:
        """The live link. Raises ``Unavailable``, naming what failed at each address."""
        link = self._link
        if link is not None and link.is_open:
            return link
        asked_at = time.monotonic()
        with self._lock:
            if self._link is not None and self._link.is_open:
                return self._link
            self.require_open()
            if self._failed is not None and self._failed[0] > asked_at:
                raise self._failed[1]  # somebody else tried while this thread waited
            try:
                self._link = self._dial()
            except Unavailable as error:
                self._failed = time.monotonic(), error
                raise
            return self._link

    def require_open(self) -> None:
        """Raises ``Unavailable`` before :meth:`open` and after :meth:`close`."""
        if not self._is_open:
            raise Unavailable("rabbitmq: the transport is not open, or was closed")

    def leave(self) -> None:
        """Begin to :meth:`close`, and wait for nothing."""
        link = self._link
        if link is not None:
            link.leave()

    def close(self) -> None:
        """Close the link; ``link`` raises from now on. Idempotent."""
        with self._lock:
            self._is_open = False
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _dial(self) -> Link:
        failures, count = [], len(self._addresses)
        for at in range(count):
            index = (self._first + at) % count
            context = self._context
            try:
                link = Link(self._addresses[index], self._tls, self.options, context.logger, self._purpose)
            except Unavailable as error:
                failures.append(error)
                continue
            if self._first != index:
                context.logger.warning("rabbitmq: now connected to %s", link.address)
            self._first = index
            return link
        if count == 1:
            raise failures[0]
        raise Unavailable("; ".join(str(error) for error in failures)) from failures[0]
