"""Result back ends and pools that are wrong in one way each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dray.core.clock import Clock
from dray.core.contracts import NoOptions, Pool
from dray.core.message import TERMINAL, Delivery, Outcome, StoredResult
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.pools.threads import ThreadsOptions, ThreadsPool
from dray.testing import PoolConformance, ResultBackendConformance, plugin_context
from dray.testing.pool_kit import pool_context

# --- result back ends --------------------------------------------------------------------------------------


class BackendKit(ResultBackendConformance):
    backend: type[MemoryBackend] = MemoryBackend

    def make(self, clock: Clock) -> MemoryBackend:
        return self.backend(NoOptions(), plugin_context("memory", clock))


class TerminalReplaced(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        self.delete([result.id for result in results if result.state in TERMINAL])
        super().store(results)


class ExpiredReturned(MemoryBackend):
    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        self._check()
        return {key: self._results[key] for key in ids if key in self._results}


class HalfWritten(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            super().store([result])


class LostBatchEnd(MemoryBackend):
    def store(self, results: Sequence[StoredResult]) -> None:
        super().store(results[:500])


class CountingBarrier(MemoryBackend):
    """A counter, where it takes a set."""

    def arrive(self, group: str, member: str, size: int) -> bool:
        count = self.__dict__.setdefault("counts", {})
        count[group] = count.get(group, 0) + 1
        return bool(count[group] >= size)


class FalsePush(MemoryBackend):
    wait = MemoryBackend.__mro__[1].wait  # type: ignore[attr-defined]


BACKEND_MUTANTS: dict[str, type[MemoryBackend]] = {
    "terminal replaced": TerminalReplaced,
    "expired returned": ExpiredReturned,
    "batch half-written": HalfWritten,
    "end of a batch lost": LostBatchEnd,
    "barrier counts": CountingBarrier,
    "push that polls": FalsePush,
}


# --- pools -------------------------------------------------------------------------------------------------


class PoolKit(PoolConformance):
    pool: type[ThreadsPool] = ThreadsPool

    def make(self, capacity: int) -> Pool:
        return self.pool(ThreadsOptions(size=capacity), pool_context("threads"))


class LostOutcome(ThreadsPool):
    def start(self, executor: Any, done: Callable[[Sequence[Outcome]], None], report: Any) -> None:
        super().start(executor, lambda batch: done(batch[:-1] if len(batch) > 3 else batch), report)


class DoubleOutcome(ThreadsPool):
    def start(self, executor: Any, done: Callable[[Sequence[Outcome]], None], report: Any) -> None:
        super().start(executor, lambda batch: done([*batch, batch[0]]), report)


class RecallReturnsBegun(ThreadsPool):
    def recall(self) -> list[Delivery]:
        begun = [runner.delivery for runner in self._runners if runner.delivery is not None]
        return [*begun, *super().recall()]


class FalseGreen(ThreadsPool):
    features = replace(ThreadsPool.features, green=True)


POOL_MUTANTS: dict[str, type[ThreadsPool]] = {
    "lost outcome": LostOutcome,
    "double outcome": DoubleOutcome,
    "recall returns begun": RecallReturnsBegun,
    "green by name alone": FalseGreen,
}
