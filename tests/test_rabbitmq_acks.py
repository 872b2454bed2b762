"""Acknowledgements in multiples: never one too many, none forgotten, however tasks end."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dray.plugins._rabbitmq_acks import Acks

PATIENCE_S = 0.03


class _Channel:
    """The broker's side, as RabbitMQ does it: a tag that is not outstanding closes the channel."""

    def __init__(self) -> None:
        self.outstanding: list[int] = []
        self.acked: set[int] = set()
        self.frames = 0

    def deliver(self, tag: int) -> None:
        self.outstanding.append(tag)

    def ack(self, tag: int, multiple: bool) -> None:
        assert tag in self.outstanding, f"unknown delivery tag {tag}"
        gone = [t for t in self.outstanding if t == tag or (multiple and t < tag)]
        self.outstanding = [t for t in self.outstanding if t not in gone]
        self.acked.update(gone)
        self.frames += 1

    def reject(self, tag: int) -> None:
        assert tag in self.outstanding, f"unknown delivery tag {tag}"
        self.outstanding.remove(tag)

    def take(self, acks: Acks, now: float) -> None:
        top, singly = acks.due(now)
        if top:
            self.ack(top, multiple=True)
        for tag in singly:
            self.ack(tag, multiple=False)


class AcksAgainstAModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.acks, self.channel = Acks(PATIENCE_S), _Channel()
        self.now, self.last = 0.0, 0
        self.open: set[int] = set()
        self.finished: dict[int, float] = {}

    def settle(self, tags: list[int]) -> tuple[list[int], list[int]]:
        fresh, stale = list[int](), list[int]()
        for tag in tags:
            (fresh if tag in self.open else stale).append(tag)
            self.open.discard(tag)
        return fresh, stale

    @rule(count=st.integers(1, 40))
    def deliver(self, count: int) -> None:
        for tag in range(self.last + 1, self.last + count + 1):
            self.channel.deliver(tag)
            self.open.add(tag)
        self.last += count
        self.acks.delivered(self.last)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        tags = data.draw(st.lists(st.integers(0, self.last + 2), max_size=30))
        fresh, stale = self.settle(tags)
        assert self.acks.finish(tags, self.now) == stale
        self.finished.update(dict.fromkeys(fresh, self.now))

    @rule(data=st.data())
    def finish_the_oldest(self, data: st.DataObject) -> None:
        tags = sorted(self.open)[: data.draw(st.integers(0, 50))]
        self.settle(tags)
        assert self.acks.finish(tags, self.now) == []
        self.finished.update(dict.fromkeys(tags, self.now))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        tags = data.draw(st.lists(st.integers(0, self.last + 2), max_size=5))
        fresh, stale = self.settle(tags)
        assert self.acks.drop(tags) == stale
        for tag in fresh:
            self.channel.reject(tag)

    @rule(pause_s=st.floats(0, PATIENCE_S))
    def send(self, pause_s: float) -> None:
        self.now += pause_s
        self.channel.take(self.acks, self.now)
        assert self.channel.acked.isdisjoint(self.open), "acknowledged before it was finished"
        oldest_open = min(self.open, default=self.last + 1)
        for tag, since in self.finished.items():
            if tag < oldest_open or since + PATIENCE_S <= self.now:
                assert tag in self.channel.acked, f"{tag} is held back"
        assert self.channel.acked <= self.finished.keys()

    @rule()
    def wait_as_told(self) -> None:
        due_at = self.acks.due_at()
        if due_at is None:
            self.send(0.0)
            assert self.channel.acked == self.finished.keys()
        else:
            self.now = max(self.now, due_at)
            self.send(0.0)

    @invariant()
    def counts_what_the_broker_counts(self) -> None:
        assert len(self.acks) == len(self.channel.outstanding)
        assert [tag for tag in range(self.last + 2) if tag in self.acks] == sorted(self.open)


AcksAgainstAModel.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestAcks = AcksAgainstAModel.TestCase


def test_one_frame_for_all_that_ended_in_order() -> None:
    acks, channel = Acks(PATIENCE_S), _Channel()
    for batch in range(10):
        for tag in range(batch * 100 + 1, batch * 100 + 101):
            channel.deliver(tag)
        acks.delivered(batch * 100 + 100)
        assert acks.finish(range(batch * 100 + 1, batch * 100 + 101), 0.0) == []
        channel.take(acks, 0.0)
        assert channel.outstanding == []
    assert channel.frames == 10


def test_a_slow_task_does_not_hold_the_others_and_costs_nothing_when_it_ends() -> None:
    """An hour at full speed behind one task: neither memory nor the time to go on grows with what went by."""
    acks, window, now = Acks(PATIENCE_S), 1000, 0.0
    acks.delivered(window)
    last = window
    for _ in range(500):
        tags = range(last - window + 2, last + 1)
        assert acks.finish(tags, now) == []
        now += PATIENCE_S
        assert len(acks.due(now)[1]) == len(tags)
        assert len(acks) == 1
        last += window - 1
        acks.delivered(last)
    assert acks.finish([1], now) == []
    started = time.process_time()
    assert acks.due(now) == (1, [])
    assert time.process_time() - started < 0.02
    assert len(acks) == window - 1


@pytest.mark.parametrize("tag", [0, 4, 10**9])
def test_a_tag_that_was_never_delivered_is_stale(tag: int) -> None:
    acks = Acks(PATIENCE_S)
    acks.delivered(3)
    assert acks.finish([1, tag, 2], 0.0) == [tag]
    assert acks.due(0.0) == (2, [])
