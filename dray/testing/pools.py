"""The conformance kit for concurrency pools: what :class:`~dray.core.contracts.Pool` promises, as tests.

A plugin's test module holds a subclass with one method::

    from dray.testing import PoolConformance
    from dray.testing.pool_kit import pool_context

    class TestMine(PoolConformance):
        def make(self, capacity):
            return MyPool(MyPool.Options(size=capacity), pool_context("mine"))

A test for a feature that the pool does not declare is reported as not applicable; a declared one must hold, and none
of the tests can be left out. ``DRAY_CONFORMANCE_REPORT=path`` writes down what was proven.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from dray.core.contracts import Pool
from dray.core.message import Delivery, RunningTask, State, StoredResult
from dray.testing.harness import needs
from dray.testing.kit import Conformance
from dray.testing.pool_kit import (
    PATIENCE_S,
    KitExecutor,
    PoolHarness,
    footprint,
    make_deliveries,
    make_delivery,
    value_of,
)


class PoolConformance(Conformance, ABC):
    """What every pool must do. A subclass says how to make one."""

    kind = "pools"
    proofs: ClassVar[Mapping[str, str]] = {"interrupt": "interrupt", "kill": "kill", "green": "green"}

    @abstractmethod
    def make(self, capacity: int) -> Pool:
        """A pool with ``capacity`` slots, or as many as it can have; not started."""

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)
        self._stack = contextlib.ExitStack()

    def end(self) -> None:
        self._stack.close()

    def sample(self) -> Pool:
        return self.make(1)

    def abilities(self) -> Mapping[str, bool]:
        return dataclasses.asdict(self.sample().features)

    def started(self, capacity: int) -> PoolHarness:
        """A started pool, stopped when the test is over."""
        executor = KitExecutor()
        self._stack.callback(executor.close)
        harness = PoolHarness(self.make(capacity), executor)
        self._stack.callback(harness.close)
        return harness

    @pytest.fixture
    def start(self) -> Callable[[int], PoolHarness]:
        """Starts pools."""
        return self.started

    @pytest.fixture
    def harness(self) -> PoolHarness:
        """A started pool with two slots."""
        return self.started(2)

    # --- every delivery ends once

    @pytest.mark.parametrize("count", [1, 1_000, 10_000])
    def test_every_delivery_ends_in_one_outcome_around_the_same_object(self, harness: PoolHarness, count: int) -> None:
        deliveries = make_deliveries(count)
        for at in range(0, count, 500):
            harness.pool.submit(deliveries[at : at + 500])
        ended = [each.settlement.delivery for each in harness.wait_for(count)]
        assert {id(each) for each in ended} == {id(each) for each in deliveries}

    def test_values_come_back_whole(self, harness: PoolHarness) -> None:
        big = "x" * 200_000
        assert harness.run(make_delivery("a", b"echo 1"), make_delivery("b", f"echo {big}".encode())) == ["1", big]

    def test_an_empty_batch_does_nothing(self, harness: PoolHarness) -> None:
        harness.pool.submit([])
        assert harness.run(make_delivery("a")) == ["ok"]

    def test_one_slot_keeps_the_order(self, start: Callable[[int], PoolHarness]) -> None:
        harness = start(1)
        deliveries = make_deliveries(300)
        harness.pool.submit(deliveries)
        assert [each.settlement.delivery.id for each in harness.wait_for(300)] == [each.id for each in deliveries]

    def test_a_task_that_raises_harms_no_other(self, harness: PoolHarness) -> None:
        assert harness.run(make_delivery("a", b"fail why"), make_delivery("b")) == ["ValueError: why", "ok"]

    @pytest.mark.parametrize("command", [b"exit", b"interrupt"])
    def test_what_ends_programs_does_not_end_the_pool(self, harness: PoolHarness, command: bytes) -> None:
        values = harness.run(*(make_delivery(f"x{number}", command) for number in range(5)))
        assert all(value.startswith("lost: WorkerLost: ") for value in values)
        assert harness.run(make_delivery("after")) == ["ok"]

    # --- slots

    def test_no_more_than_its_capacity_runs(self, harness: PoolHarness) -> None:
        capacity = harness.pool.capacity
        harness.pool.submit(make_deliveries(capacity + 3, b"gate"))
        begun = harness.executor.started.lines(capacity)
        assert len(harness.pool.running()) == capacity
        for _ in range(3):
            harness.executor.open_gate(1)
            begun += harness.executor.started.lines(1)
            assert len(harness.pool.running()) <= capacity
        harness.executor.open_gate(capacity)
        harness.wait_for(capacity + 3)
        assert sorted(begun) == sorted(each.id for each in make_deliveries(capacity + 3))

    def test_running_tells_id_task_and_start(self, start: Callable[[int], PoolHarness]) -> None:
        harness = start(1)
        before = time.monotonic()
        harness.pool.submit([make_delivery("first"), make_delivery("me", b"gate", task="shop.mail")])
        harness.executor.started.lines(1)
        (found,) = harness.pool.running()
        assert isinstance(found, RunningTask)
        assert (found.id, found.task) == ("me", "shop.mail")
        assert before <= found.started_at <= time.monotonic()
        harness.executor.open_gate(1)
        harness.wait_for(2)

    def test_nothing_runs_when_nothing_was_submitted(self, harness: PoolHarness) -> None:
        assert harness.pool.running() == []

    def test_no_outcome_waits_behind_a_long_task(self, harness: PoolHarness) -> None:
        harness.run(*make_deliveries(200))  # by now it knows how short they are
        before, after = make_deliveries(50, prefix="before"), make_deliveries(50, prefix="after")
        harness.pool.submit([*before, make_delivery("long", b"gate"), *after])
        free = 300 if harness.pool.capacity > 1 else 250
        harness.wait_for(free)
        harness.executor.open_gate(1)
        harness.wait_for(301)

    def test_reports_pass_through_in_order(self, harness: PoolHarness) -> None:
        harness.run(make_delivery("a", b"report 3"))
        assert harness.reports == [StoredResult("a", State.STARTED, str(n).encode(), None) for n in range(3)]

    # --- taking back

    def test_recall_returns_exactly_what_has_not_begun(self, harness: PoolHarness) -> None:
        capacity = harness.pool.capacity
        harness.run(*make_deliveries(200))
        blocking, waiting = make_deliveries(capacity, b"gate", "gate"), make_deliveries(500)
        harness.pool.submit(blocking)
        harness.executor.started.lines(capacity)
        harness.pool.submit(waiting)  # does not block, although every slot does
        assert [id(each) for each in harness.pool.recall()] == [id(each) for each in waiting]
        assert harness.pool.recall() == []
        harness.executor.open_gate(capacity)
        harness.wait_for(200 + capacity)
        assert harness.run(make_delivery("later")) == ["ok"]

    def test_recall_in_full_flight_loses_and_doubles_nothing(self, harness: PoolHarness) -> None:
        recalled: list[Delivery] = []
        deliveries = make_deliveries(3_000)
        for at in range(0, 3_000, 100):
            harness.pool.submit(deliveries[at : at + 100])
            recalled += harness.pool.recall()
        harness.wait(lambda: len(harness.outcomes) + len(recalled) >= 3_000, "waited for the rest")
        ended = [each.settlement.delivery for each in harness.outcomes]
        assert sorted(map(id, [*ended, *recalled])) == sorted(map(id, deliveries))

    def test_a_task_that_has_not_begun_can_be_cancelled(self, harness: PoolHarness) -> None:
        capacity = harness.pool.capacity
        harness.run(*make_deliveries(200))
        harness.pool.submit(make_deliveries(capacity, b"gate", "gate"))
        harness.executor.started.lines(capacity)
        waiting = make_deliveries(50)
        harness.pool.submit(waiting)
        for at in (0, 25, 49):
            assert harness.pool.cancel(waiting[at])
            assert not harness.pool.cancel(waiting[at])
        harness.executor.open_gate(capacity)
        ended = {each.settlement.delivery.id for each in harness.wait_for(200 + capacity + 47)[200:]}
        assert ended.isdisjoint({"d0", "d25", "d49"})

    def test_what_is_unknown_or_ended_cannot_be_cancelled(self, harness: PoolHarness) -> None:
        ended = make_delivery("ended")
        harness.run(ended)
        assert not harness.pool.cancel(ended, kill=True)
        assert not harness.pool.cancel(make_delivery("stranger"), kill=True)

    def test_a_running_task_is_cancelled_only_by_killing_it(self, harness: PoolHarness) -> None:
        victim = make_delivery("victim", b"gate")
        harness.pool.submit([victim])
        harness.executor.started.lines(1)
        assert not harness.pool.cancel(victim)
        assert harness.pool.cancel(victim, kill=True) is harness.pool.features.kill
        if not harness.pool.features.kill:
            harness.executor.open_gate(1)
        (ended,) = harness.wait_for(1)
        assert ended.settlement.delivery is victim
        assert value_of(ended).startswith("lost: TaskRevoked: ") is harness.pool.features.kill
        assert harness.run(make_delivery("after")) == ["ok"]

    # --- limits

    @needs("interrupt")
    def test_a_soft_limit_raises_inside_the_task(self, harness: PoolHarness) -> None:
        (value,) = harness.run(make_delivery("a", b"spin", soft="0.05"))
        assert value.startswith("SoftTimeLimitExceeded:")
        assert harness.run(make_delivery("b")) == ["ok"]

    @needs("interrupt")
    def test_a_soft_limit_never_strikes_outside_its_task(self, harness: PoolHarness) -> None:
        close = [
            make_delivery(f"d{n}", f"work {0.0018 + n % 9 * 0.00005:.6f}".encode(), soft="0.002") for n in range(300)
        ]
        harness.pool.submit(
            [each for pair in zip(close, make_deliveries(300, prefix="x"), strict=True) for each in pair]
        )
        found = {each.settlement.delivery.id: value_of(each) for each in harness.wait_for(600)}
        assert {found[f"x{number}"] for number in range(300)} == {"ok"}
        assert all(value == "ok" or value.startswith("SoftTimeLimitExceeded:") for value in found.values())

    @needs("kill")
    def test_a_hard_limit_ends_the_task(self, harness: PoolHarness) -> None:
        values = harness.run(make_delivery("a", b"spin", hard="0.1"), make_delivery("b"))
        assert values[0].startswith("lost: TimeLimitExceeded: ")
        assert values[1] == "ok"

    # --- green threads

    @needs("green")
    def test_green_tasks_that_wait_share_one_thread(self, start: Callable[[int], PoolHarness]) -> None:
        """Needs the pool's ``prepare`` to have been called before anything else, as the worker does."""
        harness = start(50)
        began = time.monotonic()
        values = harness.run(*make_deliveries(50, b"wait 0.2"))
        assert len(set(values)) == 1, "green tasks run on more than one thread"
        assert time.monotonic() - began < 50 * 0.2 / 2, "waiting tasks do not make way for each other"

    # --- the end

    def test_stop_returns_what_did_not_finish(self, harness: PoolHarness) -> None:
        capacity = harness.pool.capacity
        running, waiting = make_deliveries(capacity, b"gate", "gate"), make_deliveries(30)
        harness.pool.submit(running)
        harness.executor.started.lines(capacity)
        harness.pool.submit(waiting)
        assert sorted(map(id, harness.pool.stop(0.05))) == sorted(map(id, [*running, *waiting]))
        harness.executor.open_gate(capacity)
        assert harness.pool.stop(1.0) == []
        harness.close()
        assert harness.outcomes == []

    def test_stop_waits_for_what_runs(self, harness: PoolHarness) -> None:
        capacity = harness.pool.capacity
        running, waiting = make_deliveries(capacity, b"gate", "gate"), make_deliveries(30)
        harness.pool.submit(running)
        harness.executor.started.lines(capacity)
        harness.pool.submit(waiting)
        returned: list[Delivery] = []
        stopper = threading.Thread(target=lambda: returned.extend(harness.pool.stop(PATIENCE_S)))
        stopper.start()
        harness.executor.open_gate(capacity)
        stopper.join(PATIENCE_S)
        assert sorted(map(id, returned)) == sorted(map(id, waiting))
        assert {id(each.settlement.delivery) for each in harness.outcomes} == set(map(id, running))

    def test_stop_is_safe_before_start_and_twice(self, start: Callable[[int], PoolHarness]) -> None:
        assert self.make(1).stop(0) == []
        harness = start(1)
        assert harness.pool.stop(1.0) == []
        assert harness.pool.stop(1.0) == []
        assert harness.pool.recall() == []
        assert harness.pool.running() == []

    def test_nothing_is_left_after_stop(self) -> None:
        for _ in range(2):  # the first time, lazily opened things stay
            before = footprint()
            executor = KitExecutor()
            harness = PoolHarness(self.make(2), executor)
            harness.run(*make_deliveries(100), *(make_delivery(f"s{n}", soft="5") for n in range(10)))
            harness.close()
            executor.close()
            del harness, executor
            gc.collect()
            after = footprint()
        assert after == before
