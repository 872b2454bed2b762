"""Results that have reached this process, and who waits for them."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Sequence

from dray.core.message import TERMINAL, StoredResult


class Inbox:
    """Holds results until they expire, are forgotten, or are too many. Any thread.

    - a terminal state is never replaced
    - wakes those who wait for an id, and nobody else
    - beyond ``results_max`` the oldest go; ``overflowed`` says so
    """

    def __init__(self, now: Callable[[], float], results_max: int) -> None:
        self._now = now
        self._results_max = results_max
        self._lock = threading.Lock()
        self._results: dict[str, StoredResult] = {}
        self._expiries: list[tuple[float, str]] = []
        self._waiters: dict[str, list[threading.Event]] = {}
        self.overflowed = 0
        """How many were dropped unread."""

    def put(self, result: StoredResult) -> None:
        """Keep it, unless a terminal one is there."""
        now, results = self._now(), self._results
        with self._lock:
            self._sweep(now)
            old = results.get(result.id)
            if old is not None and old.state in TERMINAL and not _is_expired(old, now):
                return
            results[result.id] = result
            if result.expires_at is not None:
                heapq.heappush(self._expiries, (result.expires_at, result.id))
            if len(results) > self._results_max:
                del results[next(iter(results))]
                self.overflowed += 1
            if result.state in TERMINAL:
                for event in self._waiters.get(result.id, ()):
                    event.set()

    def get(self, ids: Iterable[str]) -> dict[str, StoredResult]:
        """What is known of these."""
        now, results = self._now(), self._results
        with self._lock:
            return {id_: results[id_] for id_ in ids if id_ in results and not _is_expired(results[id_], now)}

    def ended(self, ids: Iterable[str]) -> dict[str, StoredResult]:
        """The terminal ones of these."""
        return {id_: result for id_, result in self.get(ids).items() if result.state in TERMINAL}

    def forget(self, ids: Iterable[str]) -> None:
        with self._lock:
            for id_ in ids:
                self._results.pop(id_, None)

    # --- waiting -------------------------------------------------------------------------------------------

    def expect(self, ids: Sequence[str], event: threading.Event) -> None:
        """Set ``event`` when one of these ends."""
        with self._lock:
            for id_ in ids:
                self._waiters.setdefault(id_, []).append(event)

    def expect_no_more(self, ids: Sequence[str], event: threading.Event) -> None:
        """The inverse."""
        with self._lock:
            for id_ in ids:
                events = self._waiters[id_]
                events.remove(event)
                if not events:
                    del self._waiters[id_]

    def wake_all(self) -> None:
        """Whoever waits shall look around: something else happened."""
        with self._lock:
            for events in self._waiters.values():
                for event in events:
                    event.set()

    def _sweep(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, id_ = heapq.heappop(self._expiries)
            result = self._results.get(id_)
            if result is not None and _is_expired(result, now):
                del self._results[id_]


def _is_expired(result: StoredResult, now: float) -> bool:
    return result.expires_at is not None and result.expires_at <= now
