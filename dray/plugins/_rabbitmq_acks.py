"""Which acknowledgements to send on a channel: as few as possible, and none too late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Acks:
    """The delivery tags of one channel, from delivery to acknowledgement. No I/O, no clock; guarded by its caller.

    - knows which tags are still ours: each is finished or dropped once, anything else is stale
    - acknowledges in one ``multiple`` all that is finished up to the first delivery that is not
    - acknowledges singly what has waited ``patience_s`` behind an unfinished one, so that a slow task holds no window
    - remembers what is unfinished or unacknowledged, and nothing else, however long a task takes

    Each tag that it says to acknowledge is one that the broker still waits for: it closes the channel over any other.
    """

    __slots__ = ("_finished", "_first", "_last", "_open", "_patience_s", "_waiting")

    def __init__(self, patience_s: float = 0.03) -> None:
        self._patience_s = patience_s
        self._last = 0
        self._open: set[int] = set()
        """Delivered, not finished."""
        self._finished: set[int] = set()
        """Finished, not acknowledged."""
        self._first = 1
        """No tag below it is open or unacknowledged."""
        self._waiting: deque[tuple[float, Sequence[int]]] = deque()
        """When each lot was finished, oldest first."""

    def __len__(self) -> int:
        """How many the broker counts against the channel's prefetch."""
        return len(self._open) + len(self._finished)

    def __contains__(self, tag: int) -> bool:
        """It was delivered, and neither finished nor dropped."""
        return tag in self._open

    def delivered(self, tag: int) -> None:
        """All up to this tag have been delivered: a channel's tags are 1, 2, 3, and so on."""
        self._open.update(range(self._last + 1, tag + 1))
        self._last = tag

    def finish(self, tags: Sequence[int], now: float) -> list[int]:
        """These are to be acknowledged; returns those that are not ours any more."""
        unfinished, before = self._open, len(self._open)
        if unfinished.issuperset(tags):
            unfinished.difference_update(tags)
            if before - len(unfinished) == len(tags):
                self._finished.update(tags)
                self._waiting.append((now, tags))
                return []
            unfinished.update(tags)  # one is there twice
        fresh, stale = self._sort_out(tags)
        self._finished.update(fresh)
        self._waiting.append((now, fresh))
        return stale

    def drop(self, tags: Sequence[int]) -> list[int]:
        """These were rejected or given back: nothing is owed for them; returns those that are not ours any more."""
        return self._sort_out(tags)[1]

    def due(self, now: float) -> tuple[int, list[int]]:
        """What to acknowledge now: with ``multiple`` up to the first (0: nothing), and the others singly.

        It counts as sent.
        """
        waiting, finished = self._waiting, self._finished
        top = self._advance() if finished and self._first not in self._open else 0
        if not finished:
            waiting.clear()
        singly: list[int] = []
        while waiting and waiting[0][0] + self._patience_s <= now:
            late = finished.intersection(waiting.popleft()[1])
            finished -= late
            singly.extend(late)
        return top, singly

    def due_at(self) -> float | None:
        """When to ask again although nothing was finished; None: no need."""
        return self._waiting[0][0] + self._patience_s if self._finished and self._waiting else None

    def _sort_out(self, tags: Sequence[int]) -> tuple[list[int], list[int]]:
        """Close these; those that were open, and those that were not."""
        fresh, stale, unfinished = list[int](), list[int](), self._open
        for tag in tags:
            if tag in unfinished:
                unfinished.remove(tag)
                fresh.append(tag)
            else:
                stale.append(tag)
        return fresh, stale

    def _advance(self) -> int:
        """Move to the first open tag; the highest finished one on the way, 0 for none. All of these leave."""
        unfinished, finished = self._open, self._finished
        if not unfinished:
            top = max(finished)
            finished.clear()
            self._first = self._last + 1
            return top
        # Step by step, which each tag pays for once. A task that took an hour has millions of acknowledged tags behind
        # it, though: after as many steps as there are tags to look at, look at these instead.
        top = 0
        steps = len(unfinished) + len(finished)
        for tag in range(self._first, self._first + steps):
            if tag in unfinished:
                self._first = tag
                return top
            if tag in finished:
                finished.remove(tag)
                top = tag
        self._first = min(unfinished)
        passed = {tag for tag in finished if tag < self._first}
        finished -= passed
        return max(passed, default=top)
