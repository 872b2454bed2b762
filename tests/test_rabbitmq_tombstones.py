"""Tombstones in streams: what one process buries, all others know, whenever they ask first."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dray.core.errors import NotSupported, Unavailable
from dray.plugins._rabbitmq_address import Tls, addresses
from dray.plugins._rabbitmq_link import Dialer, LinkOptions
from dray.plugins._rabbitmq_marks import Marks
from dray.plugins._rabbitmq_publisher import Parcel, Publisher
from dray.plugins._rabbitmq_tombstones import Tombstones
from dray.testing import FakeClock, plugin_context
from dray.testing.harness import Background
from tests.servers import RabbitMQServer

DAY_S = 86400.0


class Process:
    """What one process has."""

    def __init__(self, url: str, clock: FakeClock, stack: ExitStack) -> None:
        context = plugin_context("rabbitmq", clock)
        options = LinkOptions(answer_timeout_s=5)
        self.dialers = [Dialer(addresses(url), Tls(), options, context, name) for name in ("publish", "consume")]
        for dialer in self.dialers:
            dialer.open()
            stack.callback(dialer.close)
        self.publisher = Publisher(self.dialers[0])
        self.tombstones = Tombstones("t", self.dialers[1], self.publisher, context)
        stack.callback(self.tombstones.close)

    def knows(self, id_: str) -> bool:
        try:
            return id_ in self.tombstones.buried([id_])
        except Unavailable:  # the connection was lost before all was read, or the broker is not ready
            return False

    def lose_link(self) -> None:
        self.dialers[1].link().close()


class Stage:
    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url, self.clock, self._stack = url, FakeClock(), stack

    def process(self) -> Process:
        return Process(self.url, self.clock, self._stack)

    def soon(self, days: float = 1) -> float:
        return self.clock.time() + days * DAY_S


@pytest.fixture
def stage(rabbitmq_url: str) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(rabbitmq_url, stack)


def eventually(check: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# --- in memory -------------------------------------------------------------------------------------------------


def test_marks_expire_and_leave_nothing_behind() -> None:
    marks = Marks()
    marks.bury({"old": ["a", "b"]}, 10.0, 0.0)
    marks.bury({"new": ["b"], "x": ["c"]}, 20.0, 1.0)
    assert marks.find("abc", 9.0) == {"a": "old", "b": "new", "c": "x"}
    assert marks.find("abc", 10.0) == {"b": "new", "c": "x"}
    marks.sweep(10.0)
    assert len(marks) == 2
    marks.exhume("b")
    marks.bury({"over": ["c"]}, 5.0, 11.0)
    assert marks.find("abc", 11.0) == {}
    marks.sweep(30.0)
    assert len(marks) == 0


# --- between processes -----------------------------------------------------------------------------------------


def test_who_buries_knows_at_once_and_who_asks_first_knows_everything(stage: Stage) -> None:
    worker, client = stage.process(), stage.process()
    assert worker.tombstones.buried(["a"]) == {}
    worker.tombstones.bury({"a": "ended"}, stage.soon())
    assert worker.tombstones.buried(["a", "b"]) == {"a": "ended"}
    client.tombstones.bury({"b": "revoked", "c": "terminate"}, stage.soon(366), hasten=True)
    assert client.tombstones.buried(["a", "b", "c", "d"]) == {"a": "ended", "b": "revoked", "c": "terminate"}
    worker.tombstones.exhume(["a", "c"])
    assert worker.tombstones.buried(["a", "c"]) == {}
    assert stage.process().tombstones.buried(["a", "b", "c"]) == {"b": "revoked"}


def test_those_who_follow_hear_of_it_soon(stage: Stage) -> None:
    workers = [stage.process() for _ in range(3)]
    assert [worker.tombstones.buried(["a"]) for worker in workers] == [{}] * 3
    stage.process().tombstones.bury({"a": "revoked"}, stage.soon(366))
    for worker in workers:
        eventually(lambda: worker.tombstones.buried(["a"]) == {"a": "revoked"})  # noqa: B023


def test_what_expired_is_not_known_to_anyone(stage: Stage) -> None:
    first = stage.process()
    first.tombstones.bury({"short": "x"}, stage.soon(1))
    first.tombstones.bury({"long": "y"}, stage.soon(300))
    assert first.tombstones.buried(["short", "long"]) == {"short": "x", "long": "y"}
    stage.clock.advance(2 * DAY_S)
    for process in (first, stage.process()):
        assert process.tombstones.buried(["short", "long"]) == {"long": "y"}


def test_many_at_once(stage: Stage) -> None:
    marks = {f"task-{number}": f"mark {number % 3}" for number in range(2500)}
    stage.process().tombstones.bury(marks, stage.soon(366))
    other = stage.process()
    assert other.tombstones.buried(list(marks)) == marks
    other.tombstones.exhume(list(marks)[:2400])
    assert len(stage.process().tombstones.buried(list(marks))) == 100


def test_a_lost_connection_loses_no_tombstone(stage: Stage) -> None:
    worker, other = stage.process(), stage.process()
    other.tombstones.bury({"before": "x"}, stage.soon())
    assert worker.tombstones.buried(["before"]) == {"before": "x"}
    worker.lose_link()
    other.tombstones.bury({"meanwhile": "y"}, stage.soon())
    other.tombstones.bury({"meanwhile too": "z"}, stage.soon(366))
    ids = ["before", "meanwhile", "meanwhile too"]
    assert worker.tombstones.buried(ids) == dict(zip(ids, "xyz", strict=True))
    worker.tombstones.bury({"after": "w"}, stage.soon())
    assert worker.tombstones.buried(["after"]) == {"after": "w"}


def test_threads_may_bury_and_ask_together(stage: Stage) -> None:
    process, background = stage.process(), Background()

    def work(thread: int) -> None:
        for number in range(20):
            id_ = f"{thread}-{number}"
            process.tombstones.bury({id_: "x"}, stage.soon())
            assert process.tombstones.buried([id_]) == {id_: "x"}

    for thread in range(4):
        background.start(work, thread)
    background.join()


def test_logs_that_were_deleted_are_begun_anew(stage: Stage) -> None:
    worker, other = stage.process(), stage.process()
    other.tombstones.bury({f"old-{number}": "x" for number in range(3)}, stage.soon())
    other.tombstones.bury({"older": "x"}, stage.soon())
    assert worker.tombstones.buried(["older"]) == {"older": "x"}
    channel = worker.dialers[1].link().channel()
    for days in (8, 400):
        channel.call("queue_delete", queue=f"t.tombstones.{days}d")
    other.tombstones.bury({"new": "y"}, stage.soon())

    eventually(lambda: worker.knows("new"))


def test_records_put_there_by_hand_are_ignored(stage: Stage) -> None:
    process = stage.process()
    process.tombstones.bury({"a": "x"}, stage.soon())
    for body in (b"\xff", b"[]", b'{"marks": 7}', json.dumps({"until": "x", "marks": {"m": ["b"]}}).encode()):
        assert not process.publisher.publish([Parcel("", "t.tombstones.8d", body)])
    process.tombstones.bury({"c": "y"}, stage.soon())
    assert process.tombstones.buried(["a", "b", "c"]) == {"a": "x", "c": "y"}


# --- brokers in trouble ----------------------------------------------------------------------------------------


def test_a_broker_that_stops_publishers_can_still_be_asked() -> None:
    """Workers must be able to start during a memory alarm: they are what ends it."""
    with ExitStack() as stack:
        server = stack.enter_context(RabbitMQServer())
        stage = Stage(server.url(), stack)
        stage.process().tombstones.bury({"a": "x"}, stage.soon())
        worker = stage.process()
        server.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})")
        assert worker.tombstones.buried(["a", "b"]) == {"a": "x"}
        with pytest.raises(Unavailable, match="memory"):
            worker.tombstones.bury({"b": "x"}, stage.soon())
        server.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()})")
        server.restart()
        eventually(lambda: worker.knows("a"), 60)


def test_a_broker_that_refuses_streams_remembers_nothing_and_says_so(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    process = stage.process()
    channel = process.dialers[1].link().channel()
    channel.call("queue_declare", queue="t.tombstones.8d", durable=True)  # no stream can be had under this name
    with pytest.raises(NotSupported, match="stream"):
        process.tombstones.bury({"a": "x"}, stage.soon(366))
    assert process.tombstones.buried(["a"]) == {}
    assert process.tombstones.buried(["a"]) == {}
    assert len([record for record in caplog.records if record.name == "dray.rabbitmq"]) == 1
