"""Networked plugins that are wrong in one way each, and the kits over them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import Consumer, PluginContext
from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.core.message import Delivery, Outgoing, StoredResult
from dray.testing import FakeClock, ResultBackendConformance, TransportConformance, plugin_context
from tests.toy_network import Link, ToyBackend, ToyConsumer, ToyServer, ToyTransport, plain

SILENCE_S = 0.8


class ToyHarness:
    """What the kits of the toy share: its server."""

    clock: FakeClock
    silence_s = SILENCE_S

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)  # type: ignore[misc]
        self.server = ToyServer(self.clock)

    def end(self) -> None:
        super().end()  # type: ignore[misc]
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.server.server_address[1])


class ToyKit(ToyHarness, TransportConformance):
    """The kit over a variant of the toy's transport."""

    transport: type[ToyTransport] = ToyTransport

    def make(self, clock: Clock) -> ToyTransport:
        return self.transport(self.address[1], plugin_context("toy", clock))

    def through(self, port: int) -> ToyTransport:
        return self.transport(port, plugin_context("toy", SystemClock()), timeout_s=SILENCE_S)


class ToyBackendKit(ToyHarness, ResultBackendConformance):
    """The kit over a variant of the toy's back end."""

    backend: type[ToyBackend] = ToyBackend

    def make(self, clock: Clock) -> ToyBackend:
        return self.backend(self.address[1], plugin_context("toy", clock))

    def through(self, port: int) -> ToyBackend:
        return self.backend(port, plugin_context("toy", SystemClock()), timeout_s=SILENCE_S)


# --- transports ------------------------------------------------------------------------------------------------


class ReturnsBeforeTheConfirm(ToyTransport):
    """The answer to a send is read before the next call."""

    owed = 0

    def send(self, messages: Sequence[Outgoing]) -> None:
        with self._lock:
            link = self.connected()
            try:
                link.write(json.dumps(("send", [plain(message) for message in messages])).encode() + b"\n")
                self.owed += 1
            except OSError as error:
                self.disconnect()
                raise Uncertain(str(error)) from error

    def exchange(self, link: Link, line: bytes) -> Any:
        owed, self.owed = self.owed, 0
        try:
            for _ in range(owed):
                link.read_line()
        except OSError:
            self.disconnect()
            link = self.connected()
        return super().exchange(link, line)


class SaysUnavailable(ToyTransport):
    """ "Certainly not done" when nobody knows."""

    def unanswered(self, why: object) -> TransportError:
        return Unavailable(f"no answer from 127.0.0.1:{self._port}: {why}")


class RetriesInSilence(ToyTransport):
    """As a client library does that sends a command again, ten times, whatever the command."""

    def call(self, *words: object) -> Any:
        for _ in range(10):
            with contextlib.suppress(TransportError):
                return super().call(*words)
        return super().call(*words)


class ReadsTheAnswerBefore(ToyTransport):
    """Goes on with a connection on which an answer is outstanding."""

    def broken(self, why: Exception) -> None:
        if not isinstance(why, TimeoutError):
            self.disconnect()


class LeaksDriverErrors(ToyTransport):
    def unanswered(self, why: object) -> TransportError:
        raise EOFError(f"the driver says: {why}")


class NeverConnectsAgain(ToyTransport):
    def connected(self) -> Link:
        if self._link is None and self.__dict__.setdefault("was_linked", False):
            raise Unavailable("not connected")
        self.__dict__["was_linked"] = True
        return super().connected()


class DeafConsumer(ToyTransport):
    """It has lost its link, and says that there is nothing to do: a worker that stops consuming after a reconnect."""

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        class Deaf(ToyConsumer):
            def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
                try:
                    return super().receive(limit, timeout_s)
                except Unavailable:
                    self._woken.wait(timeout_s)
                    return []

        return Deaf(self, queues)


class WaitsForEver(ToyTransport):
    def __init__(self, port: int, context: PluginContext, timeout_s: float = 5.0) -> None:
        super().__init__(port, context, 3600)


NETWORK_MUTANTS: dict[str, type[ToyTransport]] = {
    "returns before the confirm": ReturnsBeforeTheConfirm,
    "says unavailable": SaysUnavailable,
    "retries in silence": RetriesInSilence,
    "reads the answer before": ReadsTheAnswerBefore,
    "leaks driver errors": LeaksDriverErrors,
    "never connects again": NeverConnectsAgain,
    "deaf consumer": DeafConsumer,
    "waits for ever": WaitsForEver,
}


# --- result back ends ------------------------------------------------------------------------------------------


class KnowsNothing(ToyBackend):
    """An answer that did not come is taken for "unknown"."""

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        with contextlib.suppress(TransportError):
            return super().fetch(ids)
        return {}


class StoresInSilence(ToyBackend):
    """What cannot be stored is dropped."""

    def store(self, results: Sequence[StoredResult]) -> None:
        with contextlib.suppress(TransportError):
            super().store(results)


class BackendSaysUnavailable(ToyBackend):
    unanswered = SaysUnavailable.unanswered


class WaitsAtADeadLink(ToyBackend):
    """A waiter that does not see that its link is gone, and waits its time-out out."""

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        link = self._link
        never = threading.Event()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._link is link:
            with contextlib.suppress(TransportError):
                found = super().wait(ids, 0)
                if found:
                    return found
            never.wait(0.01)
        never.wait(max(deadline - time.monotonic(), 0))
        return {}


BACKEND_NETWORK_MUTANTS: dict[str, type[ToyBackend]] = {
    "knows nothing": KnowsNothing,
    "stores in silence": StoresInSilence,
    "says unavailable": BackendSaysUnavailable,
    "waits at a dead link": WaitsAtADeadLink,
}
