"""How much a worker wants to hold: slots, and as much more as is soon done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dray.core.demand import SAMPLE_S, Demand


def run(demand: Demand, rate: float, seconds: float, start: float = 0.0, done: float = 0.0) -> int:
    """The target after tasks ended at this rate for so long."""
    now, step = start, 0.01
    while now < start + seconds:
        now += step
        done += rate * step
        target = demand.target(int(done), now)
    return target


def test_at_first_it_holds_what_it_can_run() -> None:
    demand = Demand(4)
    assert demand.target(0, 100.0) == 4
    assert demand.wanted(0, 4) == 4


def test_slow_tasks_are_not_hoarded() -> None:
    assert run(Demand(4), rate=1.0, seconds=10) <= 6


def test_fast_tasks_come_ahead_by_what_is_done_in_the_window() -> None:
    demand = Demand(4, window_s=0.05)
    assert 4 + 450 <= run(demand, rate=10_000, seconds=1) <= 4 + 550


def test_the_look_ahead_has_a_limit() -> None:
    assert run(Demand(4, limit=1000), rate=1_000_000, seconds=1) == 1004


def test_it_forgets_soon_when_tasks_become_slow() -> None:
    demand = Demand(4)
    run(demand, rate=10_000, seconds=1)
    assert run(demand, rate=0, seconds=0.2, start=1.0, done=10_000) <= 5
    fast = Demand(4)
    run(fast, rate=10_000, seconds=1)
    assert fast.target(10_000, 2.0) == 4, "after a long silence only the newest sample counts"


def test_samples_that_are_too_short_change_nothing() -> None:
    demand = Demand(1)
    demand.target(0, 10.0)
    assert demand.target(1_000_000, 10.0 + SAMPLE_S / 2) == 1


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(0, 1000))
def test_it_asks_for_what_is_missing_and_only_when_half_is_gone(held: int, capacity: int, ahead: int) -> None:
    demand, target = Demand(capacity), capacity + ahead
    wanted = demand.wanted(held, target)
    assert wanted == 0 or held + wanted == target
    assert wanted > 0 if held < capacity else True
    assert wanted == 0 if held >= capacity and held > target // 2 else True


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 10_000)), max_size=30))
def test_the_target_stays_between_slots_and_limit(steps: list[tuple[float, int]]) -> None:
    demand, now, done = Demand(3, limit=100), 0.0, 0
    for seconds, count in steps:
        now, done = now + seconds, done + count
        assert 3 <= demand.target(done, now) <= 103
