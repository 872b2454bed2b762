"""Threads that wait for results: however many there are, one connection hears for all."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from dray.core.clock import Random
from dray.core.errors import TransportError
from dray.plugins._redis import Redis
from dray.plugins._redis_results import news_of

LEASE_MS = 60_000
"""How long a result's key remembers who waits."""
_RENEW_S = 20.0
_PATIENCE_S = 15.0
"""How long a waiter puts up with a server that fails, a failover say."""
_SWEEP_ABOVE = 1000

Register = Callable[[Sequence[bytes], str], dict[bytes, bytes]]
"""Leave the channel at these keys, or say which are there already."""


class _Waiter:
    """One call of :meth:`Waiters.wait`."""

    __slots__ = ("_bell", "found")

    def __init__(self) -> None:
        self.found: dict[bytes, bytes] = {}
        self._bell = threading.Lock()
        self._bell.acquire()

    def ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:  # it was rung before
            return

    def wait(self, timeout_s: float) -> None:
        """Until it is rung."""
        self._bell.acquire(timeout=max(0.0, timeout_s))


class Waiters:
    """Who waits for which key, in this process.

    - registers with the server once for each key, however many wait and however often; again before it forgets
    - hands on what is published; looks again after the listener lost its connection
    """

    def __init__(self, redis: Redis, prefix: str, register: Register, random: Random) -> None:
        self._redis = redis
        self._channel = f"{prefix}:c:{secrets.token_hex(8)}"
        self._register = register
        self._random = random
        self._lock = threading.Lock()
        self._listen_lock = threading.Lock()
        self._is_listening = False
        self._by_key: dict[bytes, list[_Waiter]] = {}
        self._registered: dict[bytes, float] = {}
        """Until when the server is sure to know that we wait."""
        self._epoch = 0
        """How often that became unsure for all of them."""

    def wait(self, keys: Iterable[bytes], timeout_s: float) -> dict[bytes, bytes]:
        """The strings of those that have ended, as soon as one has; ``{}`` after ``timeout_s``.

        Lives through a failover. Raises ``Unavailable`` when the server stays away.
        """
        keys = list(dict.fromkeys(keys))
        waiter = _Waiter()
        with self._lock:
            for key in keys:
                self._by_key.setdefault(key, []).append(waiter)
        try:
            return self._wait(waiter, keys, time.monotonic() + timeout_s)
        finally:
            with self._lock:
                for key in keys:
                    others = self._by_key[key]
                    others.remove(waiter)
                    if not others:
                        del self._by_key[key]

    def reset(self) -> None:
        """The listener is a new one, or none."""
        self._is_listening = False
        self._look_again()

    def _wait(self, waiter: _Waiter, keys: Sequence[bytes], deadline: float) -> dict[bytes, bytes]:
        patient_until = time.monotonic() + _PATIENCE_S
        while True:
            pause_s, began = _RENEW_S, time.monotonic()
            try:
                found = self._look(waiter, keys)
                patient_until = time.monotonic() + _PATIENCE_S
            except TransportError:
                would_end = 2 * time.monotonic() - began  # another try that fails takes as long
                if self._redis.is_closed or would_end >= min(deadline, patient_until):
                    raise
                found, pause_s = {}, self._random.uniform(0.05, 0.2)
            left_s = deadline - time.monotonic()
            if found or left_s <= 0:
                return found
            waiter.wait(min(left_s, pause_s))
            with self._lock:
                found, waiter.found = waiter.found, {}
            if found and all(found.values()):
                return found

    def _look(self, waiter: _Waiter, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Register those that the server does not know of, or no longer for sure; those that have ended."""
        self._listen()
        now = time.monotonic()
        with self._lock:
            epoch = self._epoch
            new = [key for key in keys if self._registered.get(key, 0.0) <= now]
        if not new:
            return {}
        found = self._register(new, self._channel)
        with self._lock:
            if not found and epoch == self._epoch:
                # One that was announced meanwhile is no longer registered.
                self._registered.update((key, now + _RENEW_S) for key in new if key not in waiter.found)
            if len(self._registered) > _SWEEP_ABOVE + 2 * len(self._by_key):
                self._registered = {key: until for key, until in self._registered.items() if until > now}
        return found

    def _listen(self) -> None:
        if not self._is_listening:
            with self._listen_lock:
                if not self._is_listening:
                    self._redis.listener.subscribe(self._channel, self._hear, self._look_again)
                    self._is_listening = True

    # --- in the listener's thread --------------------------------------------------------------------------

    def _hear(self, payload: bytes) -> None:
        key, text = news_of(payload)
        with self._lock:
            self._registered.pop(key, None)
            waiters = self._by_key.get(key, ())
            for waiter in waiters:
                waiter.found[key] = text
                waiter.ring()

    def _look_again(self) -> None:
        """What was published meanwhile never came."""
        with self._lock:
            self._epoch += 1
            self._registered.clear()
            for waiters in self._by_key.values():
                for waiter in waiters:
                    waiter.ring()
