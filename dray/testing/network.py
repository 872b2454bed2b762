"""What the kits share for plugins that speak to a server: a proxy that makes trouble, and calls that must not hang."""

from __future__ import annotations

import enum
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from dray.core.errors import DrayError, SendError, TransportError, Uncertain
from dray.testing.chaos import ChaosProxy
from dray.testing.kit import EXAMPLES_VARIABLE

MARGIN_S = 3.0
"""What a busy machine may add to the time in which a silent peer has to be noticed."""
RECOVERY_S = 15.0
"""How soon after the last trouble all works again, back-off included."""
RESETS, APART_S = 5, 0.3
PAUSE_S = 0.01

_Result = TypeVar("_Result")


class Answer(enum.Enum):
    """What a caller learns from a call."""

    YES = "it was done"
    MAYBE = "it may have been done"
    NO = "it was certainly not done"


class Caller:
    """One thread that makes calls, as contracts want it; a call that hangs does not take the test with it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dray-caller", daemon=True)
        self._thread.start()

    def within(self, call: Callable[[], _Result], limit_s: float) -> _Result:
        """What the call returns or raises, in time."""
        if threading.current_thread() is self._thread:  # within a call that is bounded itself
            return call()
        future: Future[_Result] = Future()
        self._calls.put((call, future))
        if not wait([future], limit_s).done:
            raise AssertionError(f"a call hangs: no answer after {limit_s:g} s")
        return future.result()

    def close(self) -> None:
        """End the thread once it has nothing to do."""
        self._calls.put(None)

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            call, future = job
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class Network:
    """The part of a kit's harness that stands between a plugin and its server.

    A plugin is networked when its kit class gives ``address`` and overrides ``through``.
    """

    silence_s = 5.0
    """A peer that is silent for this long has been noticed, with the time-outs that ``through`` sets: short ones."""
    cuts = 24
    """At how many places at most a request and its answer are cut; ``DRAY_CONFORMANCE_EXAMPLES`` raises it."""
    _proxies: list[ChaosProxy]
    _caller: Caller | None

    @property
    def address(self) -> tuple[str, int]:
        """Where the server of this test's store listens."""
        raise NotImplementedError

    def begin_network(self) -> None:
        self._proxies = []
        self._caller = None

    def heal_network(self) -> None:
        """No more trouble: what is open then can be closed in order."""
        for proxy in self._proxies:
            proxy.heal()

    def end_network(self) -> None:
        """Break all links: what still waits at one goes on."""
        for proxy in self._proxies:
            proxy.stop()
        if self._caller is not None:
            self._caller.close()

    def proxy(self, seed: int = 0) -> ChaosProxy:
        """A new proxy before the server."""
        proxy = ChaosProxy(self.address, seed=seed)
        self._proxies.append(proxy)
        return proxy.start()

    def within(self, call: Callable[[], _Result], limit_s: float | None = None) -> _Result:
        """What ``call`` returns or raises, which it does while a silent peer is noticed and no later."""
        self._caller = self._caller or Caller()
        return self._caller.within(call, self.silence_s + MARGIN_S if limit_s is None else limit_s)

    def ask(self, call: Callable[[], object]) -> Answer:
        """Make a call that changes one thing; only dray's own errors may come out of it, and soon."""
        try:
            self.within(call)
        except Uncertain:
            return Answer.MAYBE
        except SendError as error:
            return Answer.NO if error.unsent else Answer.YES
        except TransportError as error:
            assert str(error)
            return Answer.NO
        return Answer.YES

    def until_it_works(self, call: Callable[[], _Result], what: str) -> _Result:
        """Repeat ``call`` while the link recovers; only dray's own errors may come out of it."""
        deadline = time.monotonic() + RECOVERY_S
        while True:
            try:
                return self.within(call, RECOVERY_S + self.silence_s)
            except DrayError as error:
                assert time.monotonic() < deadline, f"{what}: {RECOVERY_S:g} s after the last trouble: {error}"
                time.sleep(PAUSE_S)

    def cut_points(self, size: int) -> list[int]:
        """After how many of ``size`` bytes to cut: after each where these are few, else spread evenly."""
        most = max(self.cuts, int(os.environ.get(EXAMPLES_VARIABLE, "0")))
        if size + 1 <= most:
            return list(range(size + 1))
        return sorted({round(number * size / (most - 1)) for number in range(most)})

    def size(self, proxy: ChaosProxy, way: str, call: Callable[[], object]) -> int:
        """How many bytes go ``up`` or ``down`` in a call."""
        before = getattr(proxy, f"bytes_{way}")
        self.within(call)
        return int(getattr(proxy, f"bytes_{way}") - before)

    def resets(self, proxy: ChaosProxy) -> Iterator[int]:
        """Reset all connections several times within a few seconds; the caller acts between them."""
        for number in range(RESETS):
            deadline = time.monotonic() + APART_S
            while time.monotonic() < deadline:
                yield number
            proxy.reset_all()


def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
