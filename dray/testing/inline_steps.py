"""One worker's steps without its threads, over a memory transport on which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

from dray.core.app import Dray
from dray.core.assembly import assemble_parts
from dray.core.intake import Intake
from dray.core.keeper import Keeper
from dray.core.message import Delivery, Outcome
from dray.core.settler import NOTHING_TO_DO
from dray.plugins.transports.memory import MemoryConsumer, MemoryTransport
from dray.testing.inline_pool import InlinePool


class InlineSteps:
    """The parts of a worker for all queues of ``app``, stepped by whoever owns it."""

    def __init__(self, app: Dray) -> None:
        self._transport = app.transport
        self._queues: list[str] = []
        self.pool = InlinePool(app.plugin_context("pools", "inline"))
        self.parts = parts = assemble_parts(app, "inline", self._queues, self.pool)
        self._intake = Intake(parts)
        self.keeper = Keeper(parts, self._intake)
        self.pool.start(parts.executor, self._done, parts.settler.report)

    def receive(self, queues: Sequence[str]) -> bool:
        """Take what there is room for; True when something could not be run and was settled instead."""
        if list(queues) != self._queues:
            self._queues[:] = queues
            self._intake.disconnect()
        self._intake.step()
        return self.settle()

    def settle(self) -> bool:
        """Write all outcomes; True when there were any."""
        settler = self.parts.settler
        before = settler.settled
        while settler.step() != NOTHING_TO_DO:
            pass
        return settler.settled > before

    def end(self) -> None:
        """Give back what was not run."""
        self.parts.settler.give_back(self.pool.recall())
        self.settle()

    def _done(self, outcomes: Sequence[Outcome]) -> None:
        self.parts.settler.collect(outcomes)
        self._intake.done(len(outcomes))


class PolledTransport(MemoryTransport):
    """A memory transport whose consumers never wait."""

    def consumer(self, queues: Sequence[str], buffer: int) -> MemoryConsumer:
        return _PolledConsumer(self, self.opened(), queues)


class _PolledConsumer(MemoryConsumer):
    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        return super().receive(limit, 0.0)
