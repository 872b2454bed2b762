"""The transient result back end on RabbitMQ: results are sent to whoever called, and kept by nobody else."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures, Seconds
from dray.core.errors import ConfigError, TransportError, Unavailable
from dray.core.message import StoredResult
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_inbox import Inbox
from dray.plugins._rabbitmq_publisher import Publisher
from dray.plugins._rabbitmq_results import MAX_BODY_BYTES, BrokerOptions, check_size, parcel, result_of

_ADDRESS_CHARACTERS = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class RpcBackend(ResultBackend):
    """Sends each result to the process that made its id; there it waits in memory to be asked for.

    - each process that calls has one queue, whose name (:meth:`address`) its ids end with: a worker needs no reply-to
    - results of ids without an address (given by hand) go to every process that has a queue
    - a caller that lost its connection finds what came meanwhile in its queue; only what was on the wire is lost
    - results reach the process that called, and no other: one that has ended gets nothing
    """

    api: ClassVar[int] = 1
    features = ResultFeatures(durability=Durability.D0, push=True, max_body_bytes=MAX_BODY_BYTES, shared=False)

    @dataclass(frozen=True, slots=True)
    class Options(BrokerOptions):
        """``url`` and the rest as of the transport."""

        linger: Seconds = 600.0
        """How long the broker keeps the queue of a process that lost its connection."""
        results_max: int = 1_000_000
        """Results that a process keeps for its callers; beyond it the oldest are dropped."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        if options.linger <= 0 or options.results_max <= 0:
            raise ConfigError("rpc: linger and results_max must be more than 0")
        self._dialer = options.dialer(context, "results")
        self._publisher = Publisher(self._dialer)
        self._inbox = Inbox(context.clock.time, options.results_max)
        self._address = secrets.token_hex(_ADDRESS_CHARACTERS // 2)
        self._everybody = f"{options.prefix}.rpc"
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._is_open = False
        self._has_warned = self._has_declared = False

    def open(self) -> None:
        self._dialer.open()
        self._dialer.link()
        self._is_open = True

    def close(self) -> None:
        channel, self._channel, self._is_open = self._channel, None, False
        if channel is not None and channel.is_open:
            with contextlib.suppress(TransportError):
                channel.call("queue_delete", queue=self._queue(self._address))
        self._dialer.close()
        self._inbox.wake_all()

    def address(self) -> str:
        """What the ids of this process must end with, after a dot; its queue exists from now on."""
        self._listen()
        return self._address

    # --- the worker's side ---------------------------------------------------------------------------------

    def store(self, results: Sequence[StoredResult]) -> None:
        self._check()
        parcels, own = [], []
        for result in results:
            check_size(result, "rpc")
            address = _address_of(result.id)
            if address != self._address:
                exchange, key = ("", self._queue(address)) if address else (self._everybody, "")
                parcels.append(parcel(exchange, key, result, self._address))
            if address in ("", self._address):
                own.append(result)
        if parcels:
            if own:
                self._declare_everybody()
            refused = self._publisher.publish(parcels)
            if refused:
                self.context.logger.debug("rpc: nobody is there any more for %d results", len(refused))
        for result in own:
            self._inbox.put(result)

    # --- the caller's side ---------------------------------------------------------------------------------

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        self._check()
        found = self._inbox.get(ids)
        if len(found) < len(ids):
            self._listen()
        return found

    def delete(self, ids: Sequence[str]) -> None:
        self._check()
        self._inbox.forget(ids)

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        changed = threading.Event()
        self._inbox.expect(ids, changed)
        try:
            while True:
                self._check()
                changed.clear()
                found = self._inbox.ended(ids)
                left_s = deadline - time.monotonic()
                if found or not ids or left_s <= 0:
                    return found
                try:
                    self._listen()
                except Unavailable:
                    if left_s <= pause_s:
                        raise
                    changed.wait(pause_s * self.context.random.uniform(0.5, 1.0))
                    pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                else:
                    changed.wait(left_s)
        finally:
            self._inbox.expect_no_more(ids, changed)

    def _listen(self) -> None:
        """Have a queue, and take what is in it. Raises ``Unavailable``."""
        channel = self._channel
        if channel is not None and channel.is_open:
            return
        with self._lock:
            self._check()
            if self._channel is not None and self._channel.is_open:
                return
            channel = self._dialer.link().channel(on_close=self._on_close, on_cancel=self._on_cancel)
            name = self._queue(self._address)
            expires = {"x-expires": round(self.options.linger * 1000)}
            channel.calls(
                [
                    ("exchange_declare", _everybody(self._everybody)),
                    ("queue_declare", {"queue": name, "durable": True, "arguments": expires}),
                    ("queue_bind", {"queue": name, "exchange": self._everybody}),
                ]
            )
            channel.consume(name, self._take, auto_ack=True)
            self._channel = channel

    def _declare_everybody(self) -> None:
        if not self._has_declared:
            channel = self._dialer.link().channel()
            try:
                channel.call("exchange_declare", **_everybody(self._everybody))
            finally:
                channel.close()
            self._has_declared = True

    def _queue(self, address: str) -> str:
        return f"{self._everybody}.{address}"

    def _check(self) -> None:
        if not self._is_open:
            raise Unavailable("rpc: the result back end is not open, or was closed")

    # --- the connection's thread ---------------------------------------------------------------------------

    def _take(self, _: Any, properties: Any, body: bytes) -> None:
        result = result_of(properties, body)
        if result is None or properties.headers.get("sender") == self._address:
            return  # what this process stored it has already
        self._inbox.put(result)
        if self._inbox.overflowed and not self._has_warned:
            self._has_warned = True
            self.context.logger.warning(
                "rpc: more than %d results wait to be asked for: the oldest are dropped; forget() them, or call with "
                "ignore_result",
                self.options.results_max,
            )

    def _on_close(self, _: Exception) -> None:
        self._inbox.wake_all()

    def _on_cancel(self, _: str) -> None:
        """The queue was deleted underneath."""
        if self._channel is not None:
            self._channel.close()


def _address_of(task_id: str) -> str:
    """What follows the last dot of an id, if it looks like an address; else nothing."""
    _, dot, address = task_id.rpartition(".")
    if dot and len(address) == _ADDRESS_CHARACTERS and not address.strip("0123456789abcdef"):
        return address
    return ""


def _everybody(exchange: str) -> dict[str, Any]:
    return {"exchange": exchange, "exchange_type": "fanout", "durable": True}
