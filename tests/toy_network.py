"""Plugins whose store is behind a socket, as small as it gets: those of memory, one line of JSON per call.

They are right, and the base of mutants that do with a connection what real task queues have done (toy_mutants.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import (
    Consumer,
    Durability,
    NoOptions,
    Plugin,
    PluginContext,
    ResultBackend,
    ResultFeatures,
    Transport,
    TransportFeatures,
)
from dray.core.errors import NotSupported, TooLarge, TransportError, Unavailable, Uncertain
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.plugins._memory import MemoryStore
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing import plugin_context

LEASE_S = 10.0
FEATURES = TransportFeatures(Durability.D1, lease_s=LEASE_S, atomic_then=True, release=True)


# --- the server ------------------------------------------------------------------------------------------------


class ToyServer(socketserver.ThreadingTCPServer):
    """Keeps the messages; each connection has a thread."""

    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, clock: Clock) -> None:
        self.transport = MemoryTransport(MemoryOptions(lease=LEASE_S), plugin_context("memory", clock), MemoryStore())
        self.transport.open()
        self.backend = MemoryBackend(NoOptions(), plugin_context("memory", clock))
        self.backend.open()
        self.turn = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Connection)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, line: bytes) -> object:
        """What a call gives. Raises ``ValueError`` and the like for one that makes no sense."""
        name, *arguments = json.loads(line)
        transport = self.transport
        with self.turn:
            if name == "send":
                return transport.send([_message(each) for each in arguments[0]])
            if name == "receive":
                consumer = transport.consumer([str(queue) for queue in arguments[0]], 1)
                found = consumer.receive(int(arguments[1]), 0)
                consumer.close()
                return [plain(delivery) for delivery in found]
            if name == "settle":
                batch = [
                    Settlement(_delivery(one), Action(action), tuple(map(_message, then)), reason)
                    for one, action, then, reason in arguments[0]
                ]
                return [plain(delivery) for delivery in transport.settle(batch)]
            if name == "extend":
                found = [_delivery(each) for each in arguments[0]]
                return [plain(delivery) for delivery in transport.extend(found, float(arguments[1]))]
            return self.answer_of_backend(name, arguments)

    def answer_of_backend(self, name: str, arguments: list[Any]) -> object:
        if name == "store":
            return self.backend.store([_result(each) for each in arguments[0]])
        if name == "fetch":
            return [plain(result) for result in self.backend.fetch([str(id_) for id_ in arguments[0]]).values()]
        if name == "delete":
            return self.backend.delete([str(id_) for id_ in arguments[0]])
        group, member, size = arguments
        return self.backend.arrive(str(group), str(member), int(size))


class _Connection(socketserver.StreamRequestHandler):
    server: ToyServer

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            while (line := self.rfile.readline()).endswith(b"\n"):
                self.wfile.write(json.dumps(self.server.answer(line)).encode() + b"\n")


def plain(value: Outgoing | Delivery | StoredResult) -> list[Any]:
    return [field.decode("latin-1") if isinstance(field, bytes) else field for field in value]


def _message(fields: Sequence[Any]) -> Outgoing:
    queue, id_, body, *rest = fields
    return Outgoing(str(queue), str(id_), body.encode("latin-1"), *rest)


def _delivery(fields: Sequence[Any]) -> Delivery:
    queue, id_, body, *rest = fields
    return Delivery(str(queue), str(id_), body.encode("latin-1"), *rest)


def _result(fields: Sequence[Any]) -> StoredResult:
    id_, state, body, expires_at = fields
    return StoredResult(str(id_), State(state), body.encode("latin-1"), expires_at)


# --- the client ------------------------------------------------------------------------------------------------


class Link:
    """One connection."""

    def __init__(self, port: int, timeout_s: float) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._read = b""

    def write(self, line: bytes) -> None:
        self._sock.sendall(line)

    def read_line(self) -> bytes:
        while b"\n" not in self._read:
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionResetError("the connection ended")
            self._read += data
        line, self._read = self._read.split(b"\n", 1)
        return line

    def close(self) -> None:
        self._sock.close()


class ToyClient(Plugin):
    """One connection, one call at a time; a link that has failed is closed and opened again by the next call."""

    api = 1

    def __init__(self, port: int, context: PluginContext, timeout_s: float = 5.0) -> None:
        super().__init__(NoOptions(), context)
        self._port = port
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._closed = False

    def open(self) -> None:
        with self._lock:
            self._closed = False
            self.connected()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.disconnect()

    def call(self, *words: object) -> Any:
        """Ask the server, and wait for its answer."""
        with self._lock:
            link = self.connected()
            return self.exchange(link, json.dumps(words).encode() + b"\n")

    def exchange(self, link: Link, line: bytes) -> Any:
        try:
            link.write(line)
            return json.loads(link.read_line())
        except (OSError, ValueError) as error:
            self.broken(error)
            raise self.unanswered(error) from error

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Around reading an answer, which may be garbled."""
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise self.unanswered(f"it makes no sense: {error}") from error

    def broken(self, why: Exception) -> None:
        """What comes now on this connection, if anything does, answers nothing that is asked from now on."""
        self.disconnect()

    def unanswered(self, why: object) -> TransportError:
        return Uncertain(f"no answer from 127.0.0.1:{self._port}: {why}")

    def connected(self) -> Link:
        if self._closed:
            raise Unavailable("the transport is closed")
        if self._link is None:
            try:
                self._link = Link(self._port, self._timeout_s)
            except OSError as error:
                raise Unavailable(f"127.0.0.1:{self._port} cannot be reached: {error}") from error
        return self._link

    def disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()


class ToyTransport(ToyClient, Transport):
    """The transport of the toy."""

    features = FEATURES

    def send(self, messages: Sequence[Outgoing]) -> None:
        self._check(messages)
        if messages:
            self.call("send", [plain(message) for message in messages])

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        return ToyConsumer(self, queues)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        self._check([message for settlement in settlements for message in settlement.then])
        batch = []
        for delivery, action, then, reason in settlements:
            if action is Action.DEAD:
                raise NotSupported("the toy keeps no dead letters")
            batch.append((plain(delivery), action.value, [plain(message) for message in then], reason))
        return self._own([settlement.delivery for settlement in settlements], self.call("settle", batch))

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        return self._own(deliveries, self.call("extend", [plain(each) for each in deliveries], lease_s))

    def _check(self, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            if len(message.body) + sum(len(word) for item in message.headers.items() for word in item) > 2**20:
                raise TooLarge(f"message {message.id} is over the limit of 1 MiB")

    def _own(self, deliveries: Sequence[Delivery], lost: Any) -> list[Delivery]:
        """The deliveries that the server returns, as the objects that were given; each as often as it says."""
        with self.understood():
            left = [_delivery(each).receipt for each in lost]
        found: list[Delivery] = []
        for delivery in reversed(deliveries):  # the later one of two is the one that came too late
            if delivery.receipt in left:
                left.remove(delivery.receipt)
                found.insert(0, delivery)
        return found


class ToyConsumer(Consumer):
    """Polls. Its link is the transport's."""

    def __init__(self, transport: ToyTransport, queues: Sequence[str]) -> None:
        self._transport = transport
        self._queues = list(queues)
        self._woken = threading.Event()
        self._lost: TransportError | None = None

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        if self._lost is not None:
            raise self.lost(self._lost)
        clock = SystemClock()
        deadline = clock.monotonic() + timeout_s
        while True:
            try:
                answer = self._transport.call("receive", self._queues, limit)
                with self._transport.understood():
                    found = [_delivery(each) for each in answer]
            except TransportError as error:
                self._lost = error
                raise self.lost(error) from error
            if found or clock.monotonic() >= deadline or self._woken.wait(0.005):
                self._woken.clear()
                return found

    @staticmethod
    def lost(error: TransportError) -> TransportError:
        return Unavailable(f"the consumer has lost its link: {error}")

    def wake(self) -> None:
        self._woken.set()


class ToyBackend(ToyClient, ResultBackend):
    """The result back end of the toy: it polls."""

    features = ResultFeatures(durability=Durability.D1)

    def store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            if len(result.body) > self.features.max_body_bytes:
                raise TooLarge(f"the result of {result.id} is over the limit")
        self.call("store", [plain(result) for result in results])

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        answer = self.call("fetch", list(ids))
        with self.understood():
            return {each[0]: _result(each) for each in answer}

    def delete(self, ids: Sequence[str]) -> None:
        self.call("delete", list(ids))

    def arrive(self, group: str, member: str, size: int) -> bool:
        return bool(self.call("arrive", group, member, size))
