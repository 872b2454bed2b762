"""The conformance suite of concurrency pools: ``class TestMine(PoolConformance): def make(self, capacity): ...``.

Its tasks are run by :class:`KitExecutor`, which does what a delivery's body says. Tests wait for events that tasks and
pools cause, through pipes, which work the same between threads and between processes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import PluginContext, Pool, Slot
from dray.core.message import Action, Delivery, Outcome, RunningTask, Settlement, State, StoredResult

PATIENCE_S = 20.0
"""How long the suite waits for what must happen; a pool that works never makes it wait so long."""


def pool_context(name: str) -> PluginContext:
    """A context for a pool under test."""
    return PluginContext(
        name=name, logger=logging.getLogger("dray.pool"), clock=SystemClock(), random=random.Random(1), base=Path.cwd()
    )


def make_delivery(key: str, body: bytes = b"ok", **headers: str) -> Delivery:
    """A delivery whose receipt, an open lock, cannot be copied or sent anywhere."""
    return Delivery("queue", key, body, {"task": "kit", **headers}, threading.Lock())


def make_deliveries(count: int, body: bytes = b"ok", prefix: str = "d") -> list[Delivery]:
    return [make_delivery(f"{prefix}{number}", body) for number in range(count)]


class Pipe:
    """Bytes between tasks and tests."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._rest = b""

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)

    def lines(self, count: int) -> list[str]:
        """The next ``count`` lines."""
        deadline = time.monotonic() + PATIENCE_S
        while self._rest.count(b"\n") < count:
            ready, _, _ = select.select([self.reader], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"only {self._rest.count(10)} of {count} tasks started in {PATIENCE_S:g} s")
            self._rest += os.read(self.reader, 65536)
        *found, self._rest = self._rest.split(b"\n", count)
        return [line.decode() for line in found]

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class KitExecutor:
    """Does what the body says: ``command argument``. Headers ``soft`` and ``hard`` are the limits in seconds.

    ``ok``; ``echo X``; ``gate`` (tell ``started``, wait for a byte of ``gate``); ``spin`` (until something stops it);
    ``work S`` (compute for S seconds); ``fail``; ``exit`` and ``interrupt`` (``SystemExit``, ``KeyboardInterrupt``);
    ``report N`` (N interim states, then ``ok``).
    """

    def __init__(self) -> None:
        self.gate = Pipe()
        self.started = Pipe()
        self.lost_errors: list[Exception] = []

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        headers = delivery.headers
        soft, hard = headers.get("soft"), headers.get("hard")
        try:
            slot.begin(headers.get("task", ""), soft and float(soft), hard and float(hard))  # type: ignore[arg-type]
            try:
                value = self.perform(delivery, slot)
            finally:
                slot.end()
        except Exception as error:
            return outcome(delivery, State.FAILURE, f"{type(error).__name__}: {error}")
        return outcome(delivery, State.SUCCESS, value)

    def perform(self, delivery: Delivery, slot: Slot) -> str:
        """The user's function."""
        command, _, argument = delivery.body.decode().partition(" ")
        if command == "echo":
            return argument
        if command == "gate":
            self.started.write(delivery.id.encode() + b"\n")
            os.read(self.gate.reader, 1)
        elif command in {"spin", "work"}:
            end = time.monotonic() + float(argument or PATIENCE_S)
            while time.monotonic() < end:
                pass
        elif command == "fail":
            raise ValueError(argument)
        elif command == "exit":
            raise SystemExit(3)
        elif command == "interrupt":
            raise KeyboardInterrupt
        elif command == "report":
            for number in range(int(argument)):
                slot.report(StoredResult(delivery.id, State.STARTED, str(number).encode(), None))
        return "ok"

    def lost(self, delivery: Delivery, error: Exception) -> Outcome:
        return outcome(delivery, State.FAILURE, f"lost: {type(error).__name__}: {error}")

    def forked(self) -> None:
        """Nothing to drop."""

    def open_gate(self, count: int) -> None:
        """Let ``count`` gated tasks pass."""
        self.gate.write(b"." * count)

    def close(self) -> None:
        self.gate.close()
        self.started.close()


def outcome(delivery: Delivery, state: State, value: str) -> Outcome:
    return Outcome(Settlement(delivery, Action.ACK), StoredResult(delivery.id, state, value.encode(), None))


class PoolHarness:
    """A started pool, its main thread's ``run``, and what it reported."""

    def __init__(self, pool: Pool, executor: KitExecutor) -> None:
        self.pool = pool
        self.executor = executor
        self.outcomes: list[Outcome] = []
        self.reports: list[StoredResult] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        pool.start(executor, self._done, self._report)
        self._runner = threading.Thread(target=pool.run, args=(self._stopping,))
        self._runner.start()

    def _done(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self.outcomes += outcomes
            self._changed.notify_all()

    def _report(self, results: Sequence[StoredResult]) -> None:
        with self._changed:
            self.reports += results
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(until, PATIENCE_S), f"{what}: {len(self.outcomes)} outcomes so far"

    def wait_for(self, count: int) -> list[Outcome]:
        """The outcomes, once there are ``count``."""
        self.wait(lambda: len(self.outcomes) >= count, f"waited for {count} outcomes")
        assert len(self.outcomes) == count
        return self.outcomes

    def run(self, *deliveries: Delivery) -> list[str]:
        """Submit these and return their values, in the same order."""
        before = len(self.outcomes)
        self.pool.submit(deliveries)
        found = self.wait_for(before + len(deliveries))[before:]
        values = {id(each.settlement.delivery): value_of(each) for each in found}
        return [values[id(delivery)] for delivery in deliveries]

    def close(self) -> None:
        self.executor.open_gate(1000)  # threads that wait there cannot be ended otherwise
        self._stopping.set()
        self.pool.stop(PATIENCE_S)
        self._runner.join()


def value_of(each: Outcome) -> str:
    return each.result.body.decode() if each.result is not None else ""


class PoolConformance(ABC):
    """What every pool must do. A subclass says how to make one."""

    @abstractmethod
    def make(self, capacity: int) -> Pool:
        """A pool with ``capacity`` slots, or as many as it can have; not started."""

    @pytest.fixture
    def start(self) -> Iterator[Callable[[int], PoolHarness]]:
        """Starts pools, and stops them when the test is over."""
        with contextlib.ExitStack() as stack:

            def start(capacity: int = 2) -> PoolHarness:
                executor = KitExecutor()
                stack.callback(executor.close)
                harness = PoolHarness(self.make(capacity), executor)
                stack.callback(harness.close)
                return harness

            yield start

    @pytest.fixture
    def harness(self, start: Callable[[int], PoolHarness]) -> PoolHarness:
        return start(2)

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

    def test_a_soft_limit_raises_inside_the_task(self, harness: PoolHarness) -> None:
        self.require(harness, "interrupt")
        (value,) = harness.run(make_delivery("a", b"spin", soft="0.05"))
        assert value.startswith("SoftTimeLimitExceeded:")
        assert harness.run(make_delivery("b")) == ["ok"]

    def test_a_soft_limit_never_strikes_outside_its_task(self, harness: PoolHarness) -> None:
        self.require(harness, "interrupt")
        close = [
            make_delivery(f"d{n}", f"work {0.0018 + n % 9 * 0.00005:.6f}".encode(), soft="0.002") for n in range(300)
        ]
        harness.pool.submit(
            [each for pair in zip(close, make_deliveries(300, prefix="x"), strict=True) for each in pair]
        )
        found = {each.settlement.delivery.id: value_of(each) for each in harness.wait_for(600)}
        assert {found[f"x{number}"] for number in range(300)} == {"ok"}
        assert all(value == "ok" or value.startswith("SoftTimeLimitExceeded:") for value in found.values())

    def test_a_hard_limit_ends_the_task(self, harness: PoolHarness) -> None:
        self.require(harness, "kill")
        values = harness.run(make_delivery("a", b"spin", hard="0.1"), make_delivery("b"))
        assert values[0].startswith("lost: TimeLimitExceeded: ")
        assert values[1] == "ok"

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

    def require(self, harness: PoolHarness, feature: str) -> None:
        if not getattr(harness.pool.features, feature):
            pytest.skip(f"the pool does not have the feature {feature}")


def footprint() -> dict[str, Any]:
    """Open descriptors, threads and child processes of this process."""
    fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    children: list[str] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += task.read_text().split()
    return {"fds": fds, "threads": threading.active_count(), "children": sorted(children)}
