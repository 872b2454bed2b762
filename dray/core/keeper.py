"""What has to be looked after while tasks run: leases, revocations, and work that others could do."""

from __future__ import annotations

import logging
import threading

from dray.core.contracts import Tombstones
from dray.core.intake import Intake
from dray.core.parts import WorkerParts

log = logging.getLogger(__name__)
LOOK_S = 1.0
"""How often revocations and surplus are looked at, in seconds; leases at a third of their length."""


class Keeper:
    """Renews leases (promise G5), ends what was revoked (G7), gives back what the pool has too much of.

    ``step`` makes one round and never sleeps, runs no user code and waits for none; whoever calls it owns time. One
    thread; ``recall`` may be called from any.
    """

    def __init__(self, parts: WorkerParts, intake: Intake) -> None:
        self._parts = parts
        self._intake = intake
        self._renewed = parts.clock.monotonic()
        self._crowded = 0
        self._recalling = threading.Lock()

    @property
    def pause_s(self) -> float:
        """Seconds from one :meth:`step` to the next."""
        return min(LOOK_S, self._renew_s)

    @property
    def _renew_s(self) -> float:
        lease_s = self._parts.transport.features.lease_s
        return float("inf") if lease_s is None else lease_s / 3

    def step(self) -> None:
        """One round. Raises ``TransportError``."""
        now = self._parts.clock.monotonic()
        if now - self._renewed >= 0.999 * self._renew_s:  # floats: 1.0 + 1.0 + ... may fall short of a whole number
            self._renew()
            self._renewed = now  # when it failed: again at the next step, not a third of a lease later
        self._revoke()
        self._crowded = self._crowded + 1 if self._intake.surplus() > 0 else 0
        if self._crowded >= 2:
            self._crowded = 0
            self.recall()

    def _renew(self) -> None:
        for delivery in self._parts.settler.renew():
            log.warning("the lease of task %s was lost: another worker may run it", delivery.id)
            if self._parts.pool.cancel(delivery):
                self._intake.returned(1)

    def _revoke(self) -> None:
        parts = self._parts
        if not isinstance(parts.transport, Tombstones):
            return
        held = parts.settler.in_flight()
        marks = parts.transport.buried([delivery.id for delivery in held]) if held else {}
        for delivery in held:
            mark = marks.get(delivery.id)
            if mark in ("revoked", "terminate"):
                if parts.pool.cancel(delivery):
                    self._intake.returned(1)
                    parts.settler.collect([parts.executor.revoked(delivery)])
                elif mark == "terminate":
                    parts.pool.cancel(delivery, kill=True)

    def recall(self) -> None:
        """Give back all that has not begun."""
        with self._recalling:
            recalled = self._parts.pool.recall()
        if recalled:
            log.debug("%d tasks that have not begun are given back", len(recalled))
            self._intake.returned(len(recalled))
            self._parts.settler.give_back(recalled)
