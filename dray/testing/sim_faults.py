"""What goes wrong in a simulated world, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.core.faults import POINTS, Faults
from dray.testing.sim_kernel import Kernel, Process

T = TypeVar("T")
Item = TypeVar("Item")


class Odds(NamedTuple):
    """How likely each fault is, per step."""

    refused: float = 0.0
    """The request certainly did not take effect."""
    lost: float = 0.0
    """It took effect, wholly or in part; the answer was lost."""
    slow: float = 0.0
    """It takes seconds."""
    kill: float = 0.0
    """The process is killed before, within or after it."""
    point: float = 0.0
    """The process is killed at a failpoint."""


QUIET = Odds()
KEEPS_RENEWAL_WAITING = ("transport.extend", "transport.settle", "transport.buried")


class Chaos:
    """Stands between every process and the services it calls, and at its failpoints.

    Responsibilities: pass time at each step, so that others have their turns there; inject faults by the current odds
    and outages; count what was injected.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.odds = QUIET
        self.counts: Counter[str] = Counter()
        self.outages: dict[str, float] = {}
        """Service -> until when it refuses everything."""

    def fault(self, what: str) -> None:
        """Count a fault and write it into the trace."""
        self.counts[what.split(maxsplit=1)[0]] += 1
        self.kernel.note(f"! {what}")

    def call(
        self,
        process: Process,
        what: str,
        items: Sequence[Item],
        apply: Callable[[Sequence[Item]], T],
        *,
        lost: type[TransportError] = Uncertain,
        cut: Callable[[Sequence[Item]], object] | None = None,
    ) -> T:
        """One request of ``process``: ``apply(items)`` takes effect at one moment between two pauses.

        ``what`` is the service and the operation. ``cut`` instead of ``apply`` is what an interrupted request does.
        """
        kernel, odds, draw = self.kernel, self.odds, self.kernel.random.random
        process.check()
        kernel.sleep(self._latency_s(process, what))
        chance = draw()
        if chance < odds.kill:
            self.kill(process, f"before {what}")
        chance -= odds.kill
        service = what.partition(".")[0]
        if chance < odds.refused or self.outages.get(service, 0.0) > kernel.now:
            self.fault(f"refused {process.name} {what}")
            self._trouble(process, what)
            raise Unavailable(f"simulated: {what} was refused")
        chance -= odds.refused
        if 0 <= chance < odds.lost + odds.kill:
            part = items if cut is None or draw() < 0.5 else items[: int(draw() * (len(items) + 1))]
            (apply if cut is None or part is items else cut)(part)
            if chance >= odds.lost:
                self.kill(process, f"after {what}")
            self.fault(f"lost {process.name} {what} {len(part)}/{len(items)}")
            self._trouble(process, what)
            kernel.sleep(self._latency_s(process, what))
            raise lost(f"simulated: the answer to {what} was lost")
        result = apply(items)
        if draw() < 0.4:
            kernel.sleep(self._latency_s(process, what))
        return result

    def _trouble(self, process: Process, what: str) -> None:
        """Two renewals in a row that failed may cost leases; a single one must not."""
        if what in ("transport.extend", "transport.buried"):
            process.blind_at = self.kernel.now
        if what == "transport.extend":
            if self.kernel.now - process.failed_at < 4.0:
                process.troubled_at = self.kernel.now
            process.failed_at = self.kernel.now

    def _latency_s(self, process: Process, what: str) -> float:
        draw = self.kernel.random
        if self.odds.slow and draw.random() < self.odds.slow:
            seconds = draw.uniform(0.5, 6.0)
            self.fault(f"slow {process.name} {what} {seconds:.1f}")
            if what == "transport.receive":  # costs as much of the leases as a renewal that failed
                process.failed_at = max(process.failed_at, self.kernel.now + seconds)
            if what in KEEPS_RENEWAL_WAITING:
                process.troubled_at = max(process.troubled_at, self.kernel.now + seconds)
            return seconds
        return draw.random() * 0.02

    def kill(self, process: Process, where: str) -> None:
        """SIGKILL; returns only to fibers of other processes."""
        if not process.dead:
            self.fault(f"kill {process.name} {where}")
            process.on_death()
            self.kernel.kill(process)

    def failpoints(self, process: Process) -> Faults:
        """Failpoints of one process: a turn for others, and now and then its end."""

        def passer(name: str) -> Callable[[], None]:
            return lambda: self._pass(process, name)

        faults = Faults({})
        faults.callbacks.update({name: passer(name) for name in POINTS})
        return faults

    def _pass(self, process: Process, name: str) -> None:
        process.check()
        draw = self.kernel.random.random()
        if draw < self.odds.point:
            self.kill(process, f"at {name}")
        if draw < self.odds.point + 0.2:
            self.kernel.sleep(self.kernel.random.random() * 0.05)
        elif name in ("stored", "acknowledged") and draw > 1.0 - self.odds.refused:
            self.fault(f"raised {process.name} at {name}")
            raise Unavailable(f"simulated: failpoint {name}")
