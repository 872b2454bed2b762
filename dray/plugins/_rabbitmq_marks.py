"""Ids that must not run (again), in memory: what a process has read from the logs of ``_rabbitmq_tombstones``."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence


class Marks:
    """Ids with their marks, until they expire. Written by one thread, read by any.

    About 200 bytes an id. The later mark of an id counts, whatever it replaces.
    """

    def __init__(self) -> None:
        self._marks: dict[str, tuple[float, str]] = {}
        """When it expires, and the mark. One tuple for all ids that were buried together."""
        self._expiries: list[tuple[float, int, Sequence[str]]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._marks)

    def bury(self, marks: Mapping[str, Sequence[str]], expires_at: float, now: float) -> None:
        """Remember the ids under each mark."""
        self.sweep(now)
        for mark, ids in marks.items():
            if expires_at > now:
                self._marks.update(dict.fromkeys(ids, (expires_at, mark)))
                heapq.heappush(self._expiries, (expires_at, next(self._numbers), ids))
            else:
                self.exhume(ids)  # the later mark counts, and this one is over

    def exhume(self, ids: Iterable[str]) -> None:
        """Forget these."""
        for id_ in ids:
            self._marks.pop(id_, None)

    def find(self, ids: Iterable[str], now: float) -> dict[str, str]:
        """Those of the ids that are remembered, with their marks."""
        found = {}
        if self._marks:
            for id_ in ids:
                entry = self._marks.get(id_)
                if entry is not None and entry[0] > now:
                    found[id_] = entry[1]
        return found

    def sweep(self, now: float) -> None:
        """Forget what expired."""
        while self._expiries and self._expiries[0][0] <= now:
            for id_ in heapq.heappop(self._expiries)[2]:
                entry = self._marks.get(id_)
                if entry is not None and entry[0] <= now:
                    del self._marks[id_]
