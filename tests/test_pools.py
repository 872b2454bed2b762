"""The pools of this distribution pass the conformance suite; what only one of them does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import NoOptions, Pool
from dray.core.errors import SoftTimeLimitExceeded
from dray.core.message import Delivery, Outcome
from dray.plugins._softlimit import SignalLimit, ThreadAlarms, ThreadLimit, _set_async_exception
from dray.plugins.pools.prefork import PreforkOptions, PreforkPool
from dray.plugins.pools.solo import SoloPool
from dray.plugins.pools.threads import ThreadsOptions, ThreadsPool
from dray.testing.pool_kit import KitExecutor, make_deliveries, make_delivery, pool_context, value_of
from dray.testing.pools import PoolConformance


class TestPreforkPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return PreforkPool(PreforkOptions(size=capacity), pool_context("prefork"))


class TestThreadsPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return ThreadsPool(ThreadsOptions(size=capacity), pool_context("threads"))


class TestSoloPool(PoolConformance):
    def make(self, capacity: int) -> Pool:
        return SoloPool(NoOptions(), pool_context("solo"))


class TestSoloOnTheMainThread:
    """Where it belongs; the suite runs it on a thread of its own."""

    def run(self, *deliveries: Delivery) -> list[str]:
        """Run these here, and return their values."""
        pool, executor, stopping = SoloPool(NoOptions(), pool_context("solo")), KitExecutor(), threading.Event()
        outcomes: list[Outcome] = []

        def done(batch: Sequence[Outcome]) -> None:
            outcomes.extend(batch)
            if len(outcomes) == len(deliveries):
                stopping.set()

        pool.start(executor, done, lambda _: None)
        submitter = threading.Thread(target=pool.submit, args=(deliveries,))
        submitter.start()
        pool.run(stopping)
        submitter.join()
        assert pool.stop(1.0) == []
        executor.close()
        assert [each.settlement.delivery for each in outcomes] == list(deliveries)
        return [value_of(each) for each in outcomes]

    def test_it_runs_there(self) -> None:
        assert self.run(*make_deliveries(1_000)) == ["ok"] * 1_000

    def test_a_soft_limit_interrupts_a_blocking_call(self) -> None:
        previous = signal.getsignal(signal.SIGALRM)
        values = self.run(make_delivery("a", b"gate", soft="0.05"), make_delivery("b"))
        assert values == ["SoftTimeLimitExceeded: the soft time limit of 0.05 s of kit is over", "ok"]
        assert signal.getsignal(signal.SIGALRM) == previous

    def test_a_soft_limit_never_strikes_outside_its_task(self) -> None:
        close = [
            make_delivery(f"d{n}", f"work {0.0018 + n % 9 * 0.00005:.6f}".encode(), soft="0.002") for n in range(300)
        ]
        values = self.run(*close)
        assert all(value == "ok" or value.startswith("SoftTimeLimitExceeded:") for value in values)
        assert len(set(values)) == 2

    def test_a_soft_limit_spares_reports(self) -> None:
        values = self.run(*[make_delivery(f"r{n}", b"report 3000", soft="0.001") for n in range(20)])
        assert set(values) <= {"ok", "SoftTimeLimitExceeded: the soft time limit of 0.001 s of kit is over"}


def test_an_alarm_that_interrupts_the_end_of_a_task_is_not_raised() -> None:
    def end() -> None:
        limit._fire(signal.SIGALRM, sys._getframe())  # as Python calls it when the alarm strikes here
        limit.disarm()

    def task() -> None:
        limit._fire(signal.SIGALRM, sys._getframe())

    limit = SignalLimit(end)
    limit.arm("kit", 1000)
    end()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    task()  # disarmed
    limit.arm("kit", 1000)
    with pytest.raises(SoftTimeLimitExceeded, match="1000 s of kit"):
        task()
    limit.disarm()
    limit.close()


def test_an_exception_that_is_pending_when_its_task_ends_is_not_raised_later() -> None:
    alarms = ThreadAlarms(SystemClock(), "alarms")
    limit = ThreadLimit(alarms)
    raised_in: list[str] = []

    class Lock:
        """The limit's lock, with the timer striking at the moment it is taken."""

        def __init__(self) -> None:
            self.strike = False

        def __enter__(self) -> None:
            if self.strike:
                self.strike = False
                _set_async_exception(threading.get_ident(), SoftTimeLimitExceeded)

        def __exit__(self, *_: object) -> None:
            return

    def thread() -> None:
        try:
            limit.arm("kit", 1000)
            limit._lock = lock = Lock()
            lock.strike = True
            limit.disarm()
            for _ in range(1000):
                pass
        except SoftTimeLimitExceeded:
            raised_in.append("thread")

    runner = threading.Thread(target=thread)
    runner.start()
    runner.join()
    alarms.close()
    assert raised_in == []
    assert not limit.armed
