"""How long tasks take: the measure by which the look-ahead of a child is bounded."""

from __future__ import annotations

from collections.abc import Mapping

BATCH_S = 0.005
"""A batch is about this much work."""
_NAMES_MAX = 4096
_WEIGHT = 0.1
_SAMPLE_MAX_S = 0.1
"""Longer runs count as this: one outlier must not keep a short task from being batched for long."""


class Pace:
    """A moving average of the run time of each task, by the name in its header."""

    def __init__(self) -> None:
        self._mean_s: dict[str | None, float] = {}

    def expect(self, headers: Mapping[str, str]) -> float:
        """Seconds that the next run takes; ``BATCH_S``, that is a batch of its own, when nothing is known."""
        return self._mean_s.get(headers.get("task"), BATCH_S)

    def note(self, headers: Mapping[str, str], took_s: float) -> None:
        """A run took this long."""
        task = headers.get("task")
        took_s = min(took_s, _SAMPLE_MAX_S)
        mean_s = self._mean_s.get(task)
        if mean_s is None:
            if len(self._mean_s) >= _NAMES_MAX:
                self._mean_s.clear()  # names come from messages: the table must not grow without end
            self._mean_s[task] = took_s
        else:
            self._mean_s[task] = mean_s + (took_s - mean_s) * _WEIGHT
