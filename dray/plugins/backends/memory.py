"""The result back end that keeps results in this process: for tests and for programs of one process."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Sequence

from dray.core.contracts import NoOptions, PluginContext, ResultBackend, ResultFeatures
from dray.core.errors import TooLarge, Unavailable
from dray.core.message import TERMINAL, StoredResult

GROUP_KEPT_S = 30 * 86400.0
"""A group that nobody arrived at for so long is forgotten."""


class MemoryBackend(ResultBackend):
    """Keeps results in this process.

    - wakes those who wait for an id, and nobody else
    - forgets what expired as it goes
    - counts the distinct members of groups
    """

    api = 1
    Options = NoOptions
    features = ResultFeatures(push=True, shared=False, max_body_bytes=2**24)

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        super().__init__(options, context)
        self._lock = threading.Lock()
        self._results: dict[str, StoredResult] = {}
        self._expiries: list[tuple[float, str]] = []
        self._waiters: dict[str, list[threading.Event]] = {}
        self._groups: dict[str, tuple[dict[str, None], float]] = {}
        """Members that arrived, and when the last one did; in the order of the latter."""
        self._closed = False

    def open(self) -> None:
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def store(self, results: Sequence[StoredResult]) -> None:
        self._check(results)
        now = self.context.clock.time()
        with self._lock:
            self._forget_expired(now)
            known = self._results
            for result in results:
                old = known.get(result.id)
                if old is not None and old.state in TERMINAL and not _expired(old, now):
                    continue
                known[result.id] = result
                if result.expires_at is not None:
                    heapq.heappush(self._expiries, (result.expires_at, result.id))
                if self._waiters and result.state in TERMINAL:
                    for event in self._waiters.get(result.id, ()):
                        event.set()

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        self._check()
        now = self.context.clock.time()
        with self._lock:
            known = self._results
            return {key: known[key] for key in ids if key in known and not _expired(known[key], now)}

    def delete(self, ids: Sequence[str]) -> None:
        self._check()
        with self._lock:
            for key in ids:
                self._results.pop(key, None)

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        event = threading.Event()
        with self._lock:
            for key in ids:
                self._waiters.setdefault(key, []).append(event)
        try:
            # Registered first, looked second: a result stored in between sets the event.
            found = self._terminal(ids)
            if not found and event.wait(max(timeout_s, 0.0)):
                found = self._terminal(ids)
            return found
        finally:
            self._unregister(ids, event)

    def arrive(self, group: str, member: str, size: int) -> bool:
        """See :class:`~dray.core.contracts.Barrier`."""
        self._check()
        now = self.context.clock.time()
        with self._lock:
            members, _ = self._groups.pop(group, ({}, now))
            members.setdefault(member)
            self._groups[group] = (members, now)
            oldest = next(iter(self._groups))
            if self._groups[oldest][1] < now - GROUP_KEPT_S:
                del self._groups[oldest]
            return len(members) == size and next(reversed(members)) == member

    def _terminal(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        return {key: result for key, result in self.fetch(ids).items() if result.state in TERMINAL}

    def _unregister(self, ids: Iterable[str], event: threading.Event) -> None:
        with self._lock:
            for key in ids:
                events = self._waiters[key]
                events.remove(event)
                if not events:
                    del self._waiters[key]

    def _forget_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, key = heapq.heappop(self._expiries)
            result = self._results.get(key)
            if result is not None and _expired(result, now):
                del self._results[key]

    def _check(self, results: Iterable[StoredResult] = ()) -> None:
        if self._closed:
            raise Unavailable("the memory result back end is closed: open() it again")
        limit = self.features.max_body_bytes
        for result in results:
            if len(result.body) > limit:
                raise TooLarge(
                    f"the result of task {result.id} has {len(result.body):,} bytes, the memory back end takes"
                    f" {limit:,}. Store large data elsewhere and return a reference to it."
                )


def _expired(result: StoredResult, now: float) -> bool:
    return result.expires_at is not None and result.expires_at <= now
