"""Broadcasts in RabbitMQ: what is said on a channel reaches every process that listens, and is kept for nobody."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from dray.core.contracts import PluginContext
from dray.core.errors import TransportError
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_publisher import Parcel, Publisher

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_LOOK_S = 5.0
"""How often a listener looks whether it still hears, whatever it was told."""
_BACKLOG_MAX = 10_000
"""Payloads that wait for a slow listener; more are dropped, as for one who does not listen."""


class Broadcast:
    """Speaks and listens: see :class:`~dray.core.contracts.Broadcaster`. Any thread.

    - one fan-out exchange per channel; a queue per listener, exclusive, gone with its connection
    - each listener has a thread, which calls it, and which listens again after a lost connection: what is said
      meanwhile is not heard
    """

    def __init__(self, prefix: str, dialer: Dialer, publisher: Publisher, context: PluginContext) -> None:
        self._prefix = prefix
        self._dialer = dialer
        self._publisher = publisher
        self._context = context
        self._lock = threading.Lock()
        self._listeners: set[_Listener] = set()
        self._declared: set[str] = set()

    def broadcast(self, channel: str, payload: bytes) -> None:
        """See :class:`~dray.core.contracts.Broadcaster`."""
        exchange = f"{self._prefix}.broadcast.{channel}"
        if exchange not in self._declared:
            speaker = self._dialer.link().channel()
            try:
                speaker.call("exchange_declare", **_declaration(exchange))
            finally:
                speaker.close()
            self._declared.add(exchange)
        try:
            self._publisher.publish([Parcel(exchange, "", payload)])  # refused when nobody listens, which is all right
        except TransportError:
            self._declared.discard(exchange)  # it may have been deleted underneath
            raise

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        """See :class:`~dray.core.contracts.Broadcaster`."""
        listener = _Listener(f"{self._prefix}.broadcast.{channel}", self._dialer, deliver, self._context)
        listener.subscribe()
        listener.start()
        with self._lock:
            self._listeners.add(listener)

        def stop() -> None:
            with self._lock:
                self._listeners.discard(listener)
            listener.stop()

        return stop

    def close(self) -> None:
        """Stop all listeners. Idempotent."""
        with self._lock:
            listeners, self._listeners = self._listeners, set()
        for listener in listeners:
            listener.stop()


class _Listener(threading.Thread):
    """Hears one channel."""

    def __init__(self, exchange: str, dialer: Dialer, deliver: Callable[[bytes], None], context: PluginContext) -> None:
        super().__init__(name=f"dray-rabbitmq-{exchange}", daemon=True)
        self._exchange = exchange
        self._dialer = dialer
        self._deliver = deliver
        self._context = context
        self._heard: queue.Queue[bytes | None] = queue.Queue(_BACKLOG_MAX)
        self._stopping = threading.Event()
        self._channel: Channel | None = None

    def subscribe(self) -> None:
        """Hear what is said from now on. Raises ``Unavailable``."""
        channel = self._dialer.link().channel(on_close=self._interrupt, on_cancel=self._drop)
        channel.call("exchange_declare", **_declaration(self._exchange))
        name = channel.call("queue_declare", queue="", exclusive=True, auto_delete=True).method.queue
        channel.call("queue_bind", queue=name, exchange=self._exchange)
        channel.consume(name, self._hear, auto_ack=True)
        self._channel = channel

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                payload = self._heard.get(timeout=_LOOK_S)
            except queue.Empty:
                payload = None
            if payload is None:
                self._subscribe_again()
                continue
            try:
                self._deliver(payload)
            except Exception:
                self._context.logger.exception("rabbitmq: a listener on %s failed", self._exchange)

    def stop(self) -> None:
        """Not called again once this returns, unless it is the listener itself who stops."""
        self._stopping.set()
        self._interrupt()
        if threading.current_thread() is not self:
            self.join(self._dialer.options.answer_timeout_s)
        if self._channel is not None:
            self._channel.close()

    def _subscribe_again(self) -> None:
        pause_s = _FIRST_PAUSE_S
        channel = self._channel
        while not self._stopping.is_set() and channel is not None and not channel.is_open:
            try:
                self.subscribe()
            except TransportError as error:
                self._context.logger.debug("rabbitmq: %s is not heard: %s", self._exchange, error)
                self._stopping.wait(pause_s * self._context.random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                channel = self._channel

    # --- I/O thread ----------------------------------------------------------------------------------------

    def _hear(self, _: Any, __: Any, payload: bytes) -> None:
        try:
            self._heard.put_nowait(payload)
        except queue.Full:
            self._context.logger.debug("rabbitmq: a listener on %s is too slow", self._exchange)

    def _drop(self, _: str) -> None:
        """The queue was deleted underneath: closing the channel interrupts."""
        if self._channel is not None:
            self._channel.close()

    def _interrupt(self, _: Any = None) -> None:
        """Any thread: the listener's thread shall look around."""
        try:
            self._heard.put_nowait(None)
        except queue.Full:
            pass


def _declaration(exchange: str) -> dict[str, Any]:
    return {"exchange": exchange, "exchange_type": "fanout", "durable": True}
