"""How many messages a worker wants to hold. Pure arithmetic over what it measures."""

from __future__ import annotations

SAMPLE_S = 0.005


class Demand:
    """Slots plus a look-ahead that is bounded by time: what the pool is measured to do in ``window_s``.

    So short tasks come in large batches, while a worker with long tasks holds no more than it can run, and leaves the
    rest to others. Not thread-safe: owned by the thread that receives.
    """

    def __init__(self, capacity: int, window_s: float = 0.05, limit: int = 1000) -> None:
        self.capacity = capacity
        self._window_s = window_s
        self._limit = limit
        self._rate = 0.0
        self._since = 0.0
        self._counted = 0

    def target(self, done_total: int, now: float) -> int:
        """How many deliveries to hold, begun ones included. ``done_total``: finished so far; ``now``: monotonic s."""
        elapsed_s = now - self._since
        if elapsed_s >= SAMPLE_S:
            weight = 1.0 if elapsed_s > 10 * self._window_s else 0.5
            self._rate += weight * ((done_total - self._counted) / elapsed_s - self._rate)
            self._since, self._counted = now, done_total
        return self.capacity + min(int(self._rate * self._window_s), self._limit)

    def wanted(self, held: int, target: int) -> int:
        """How many to ask for now; 0 while half the target is there, so that each request is worth its round trip."""
        return target - held if held < self.capacity or held <= target // 2 else 0
