"""Results that are sent to whoever called: between processes, which the conformance kit does not see."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dray.core.clock import SystemClock
from dray.core.errors import Unavailable
from dray.core.message import State, StoredResult
from dray.plugins._rabbitmq_inbox import Inbox
from dray.plugins.backends.rpc import RpcBackend
from dray.testing import FakeClock, plugin_context
from dray.testing.harness import Background


@pytest.fixture
def process(rabbitmq_url: str) -> Iterator[Callable[[], RpcBackend]]:
    with ExitStack() as stack:

        def start() -> RpcBackend:
            backend = RpcBackend(RpcBackend.Options(url=rabbitmq_url), plugin_context("rpc", SystemClock()))
            stack.callback(backend.close)
            backend.open()
            return backend

        yield start


def result(id_: str, state: State = State.SUCCESS, body: bytes = b"value") -> StoredResult:
    return StoredResult(id_, state, body, time.time() + 60)


def test_a_result_goes_to_who_made_the_id_and_to_nobody_else(process: Callable[[], RpcBackend]) -> None:
    caller, other, worker = process(), process(), process()
    ids = [f"{number}.{caller.address()}" for number in range(100)]
    theirs = f"x.{other.address()}"
    worker.store([result(id_) for id_ in [*ids, theirs]])
    found: dict[str, StoredResult] = {}
    while len(found) < 100:
        left = [id_ for id_ in ids if id_ not in found]
        news = caller.wait(left, 10)
        assert news
        found |= news
    assert found[ids[7]].body == b"value"
    assert other.wait([theirs], 10)
    assert other.fetch(ids) == {}
    assert caller.fetch([theirs]) == {}


def test_states_come_in_order_and_the_first_end_counts(process: Callable[[], RpcBackend]) -> None:
    caller, worker = process(), process()
    id_ = f"a.{caller.address()}"
    states = [State.STARTED, State.RETRY, State.STARTED, State.FAILURE, State.SUCCESS, State.STARTED]
    for state in states:
        worker.store([result(id_, state, state.encode())])
    worker.store([result(f"last.{caller.address()}")])
    assert caller.wait([f"last.{caller.address()}"], 10)
    assert caller.fetch([id_])[id_][:3] == (id_, State.FAILURE, b"FAILURE")


def test_an_id_given_by_hand_reaches_everybody_who_calls(process: Callable[[], RpcBackend]) -> None:
    callers, worker = [process(), process()], process()
    for caller in callers:
        caller.address()
    worker.store([result("order-1")])
    for caller in callers:
        assert set(caller.wait(["order-1", "order-2"], 10)) == {"order-1"}


def test_the_result_of_a_caller_that_has_gone_hurts_nobody(process: Callable[[], RpcBackend]) -> None:
    caller, worker = process(), process()
    address = caller.address()
    caller.close()
    worker.store([result(f"a.{address}"), result("b.0123456789abcdef"), result("c.not-an-address")])
    with pytest.raises(Unavailable):
        caller.fetch([f"a.{address}"])


def test_what_comes_while_the_caller_is_away_is_kept_for_it(process: Callable[[], RpcBackend]) -> None:
    caller, worker = process(), process()
    id_ = f"a.{caller.address()}"
    caller._dialer.link().close()  # its network, so to speak
    worker.store([result(id_)])
    assert set(caller.wait([id_], 10)) == {id_}


def test_who_waits_is_served_although_the_connection_breaks(process: Callable[[], RpcBackend]) -> None:
    caller, worker, waiting = process(), process(), threading.Event()
    id_ = f"a.{caller.address()}"
    found: dict[str, StoredResult] = {}

    def wait() -> None:
        waiting.set()
        found.update(caller.wait([id_], 30))

    background = Background()
    background.start(wait)
    assert waiting.wait(5)
    caller._dialer.link().close()
    worker.store([result(id_)])
    background.join(20)
    assert set(found) == {id_}


def test_an_inbox_is_bounded_and_forgets() -> None:
    clock = FakeClock()
    inbox = Inbox(clock.time, results_max=10)
    for number in range(15):
        inbox.put(StoredResult(f"r{number}", State.SUCCESS, b"", clock.time() + 100))
    assert sorted(inbox.get(f"r{number}" for number in range(15))) == sorted(f"r{number}" for number in range(5, 15))
    assert inbox.overflowed == 5
    clock.advance(101)
    assert inbox.get(["r14"]) == {}
    inbox.put(StoredResult("anew", State.SUCCESS, b"", None))
    assert list(inbox._results) == ["anew"]
