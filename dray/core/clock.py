"""Time, ids and randomness. They are passed in, so that a test or a simulator owns them."""

from __future__ import annotations

import os
import random
import threading
import time as _time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from. Thread-safe."""

    def time(self) -> float:
        """Seconds since the epoch (UTC)."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back; comparable between processes of one machine."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until ``event`` is set or ``timeout_s`` seconds have passed; True if it is set."""
        ...


class SystemClock:
    """The machine's clock."""

    time = staticmethod(_time.time)
    monotonic = staticmethod(_time.monotonic)

    @staticmethod
    def wait(event: threading.Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)


class Ids(Protocol):
    """Where task ids come from. Thread-safe."""

    def new(self) -> str:
        """A fresh id: at most 255 printable ASCII characters, unique for ever."""
        ...


class TimeOrderedIds:
    """32 hex digits: 48 bits of milliseconds, 80 random bits (UUIDv7's layout, RFC 9562, without its version bits).

    They sort by time, so that a store's index on them grows at one end, and they cannot be guessed. Randomness is drawn
    for many at once: each draw lets go of the interpreter lock, and a busy thread takes milliseconds to give it back.
    """

    def __init__(self) -> None:
        self._drawn: list[str] = []
        os.register_at_fork(after_in_child=self._drawn.clear)  # or parent and child would give the same ids

    def new(self) -> str:
        try:
            drawn = self._drawn.pop()
        except IndexError:
            bits = os.urandom(10 * DRAWN).hex()
            self._drawn.extend([bits[at : at + 20] for at in range(20, len(bits), 20)])
            drawn = bits[:20]
        return f"{int(_time.time() * 1000):012x}{drawn}"


class AddressedIds:
    """Ids that end with the address of the process that makes them: a result back end finds the way back by it."""

    def __init__(self, ids: Ids, address: str) -> None:
        self._new = ids.new
        self._suffix = f".{address}"

    def new(self) -> str:
        return self._new() + self._suffix


DRAWN = 256
"""Ids whose randomness is drawn at once."""

Random = random.Random
"""Randomness for jitter: an instance is passed in; a test passes a seeded one."""
