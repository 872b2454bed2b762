"""A clock that a test moves by hand."""

from __future__ import annotations

import threading
import time

POLL_S = 0.005


class FakeClock:
    """Stands still until ``advance``. Thread-safe; implements :class:`dray.core.clock.Clock`."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._start = start
        self._passed_s = 0.0
        self._lock = threading.Lock()

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, for everybody who was given this clock."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        with self._lock:
            self._passed_s += seconds

    def time(self) -> float:
        """Seconds since the epoch."""
        return self._start + self._passed_s

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._passed_s

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """True as soon as ``event`` is set; False once ``timeout_s`` seconds passed here *or* on the machine's clock.

        The latter bounds a test in which nobody advances the clock.
        """
        fake_deadline, real_deadline = self.monotonic() + timeout_s, time.monotonic() + timeout_s
        while not event.is_set() and self.monotonic() < fake_deadline and time.monotonic() < real_deadline:
            event.wait(min(POLL_S, timeout_s))
        return event.is_set()
