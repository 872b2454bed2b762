"""The pools of this distribution pass the conformance suite; what only one of them does."""

from __future__ import annotations

from dray.core.contracts import NoOptions, Pool
from dray.plugins.pools.prefork import PreforkOptions, PreforkPool
from dray.plugins.pools.solo import SoloPool
from dray.plugins.pools.threads import ThreadsOptions, ThreadsPool
from dray.testing.pools import PoolConformance, pool_context


class TestPreforkPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return PreforkPool(PreforkOptions(size=capacity), pool_context("prefork"))


class TestThreadsPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return ThreadsPool(ThreadsOptions(size=capacity), pool_context("threads"))


class TestSoloPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return SoloPool(NoOptions(), pool_context("solo"))
