"""A worker over the memory transport: everything it takes ends, and nothing that it is sent can end it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from dray import Dray, ResultTimeout, TaskRevoked
from dray.core.contracts import Executor, NoOptions, Pool, PoolFeatures
from dray.core.errors import DrayError, Unavailable
from dray.core.fallback import Fallback
from dray.core.hooks import NO_HOOKS, Hooks, hookimpl
from dray.core.message import Action, Delivery, Outcome, Outgoing, Settlement, State, StoredResult
from dray.core.settler import NOTHING_TO_DO, Settler
from dray.core.worker import EXIT_FAILED, EXIT_WARM, Worker, WorkerParts
from dray.testing.clock import FakeClock
from dray.testing.harness import plugin_context
from tests.parts import Bench, memory_backend, memory_transport

PATIENCE_S = 10.0


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does; fails after ten seconds."""
    deadline = time.monotonic() + PATIENCE_S
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        never.wait(0.002)


def make_app(pool: str = "threads", size: int = 2, clock: FakeClock | None = None, **settings: Any) -> Dray:
    options: dict[str, Any] = {"pool": pool} if pool == "solo" else {"pool": pool, "size": size}
    config = {"transport": "memory", "backend": "memory", "workers": {"w": options}, **settings}
    return Dray(config=config, clock=clock)


@contextmanager
def working(app: Dray) -> Iterator[Worker]:
    """A worker in a thread; stopped warm at the end, and then it must have ended well."""
    ready, codes = threading.Event(), list[int]()
    worker = app.worker(on_ready=ready.set)
    thread = threading.Thread(target=lambda: codes.append(worker.run()), daemon=True)
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield worker
    finally:
        worker.stop()
        thread.join(PATIENCE_S)
    assert codes == [EXIT_WARM]


def stats(app: Dray) -> tuple[int, int, int]:
    """Ready, leased, dead."""
    found = app.transport.stats(["default"])["default"]  # type: ignore[attr-defined]
    return found.ready, found.leased, found.dead


# --- end to end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_tasks_run_and_their_callers_learn_how_it_went(pool: str) -> None:
    app = make_app(pool)

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    @app.task
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return x * 2

    @app.task
    def divide(x: int) -> float:
        return 1 / x

    with working(app):
        group = app.send_many(add.s(number, 1) for number in range(500))
        assert group.get(timeout=PATIENCE_S) == list(range(1, 501))
        assert double.delay(4).get(timeout=PATIENCE_S) == 8
        with pytest.raises(ZeroDivisionError):
            divide.delay(0).get(timeout=PATIENCE_S)
    assert stats(app) == (0, 0, 1)
    app.close()


def test_a_retry_runs_with_its_attempt_and_the_result_is_the_last() -> None:
    from dray import Retry, current

    app = make_app()

    @app.task(retry=Retry(on=OSError, max=3, delay=0))
    def flaky() -> int:
        if current().attempt < 2:
            raise OSError
        return current().attempt

    with working(app):
        assert flaky.delay().get(timeout=PATIENCE_S) == 2
    app.close()


def test_a_task_that_always_fails_ends_as_a_failure_and_a_dead_letter() -> None:
    from dray import Retry

    app, runs = make_app(), list[int]()

    @app.task(name="fail", retry=Retry(max=2, delay=0))
    def fail() -> None:
        runs.append(1)
        raise KeyError("x")

    with working(app):
        result = fail.delay()
        with pytest.raises(KeyError):
            result.get(timeout=PATIENCE_S)
        until(lambda: stats(app) == (0, 0, 1))
    assert len(runs) == 3
    (letter,) = app.transport.dead_list(None, 9)  # type: ignore[attr-defined]
    assert (letter.id, letter.reason) == (result.id, "KeyError: 'x'")
    app.close()


def test_progress_is_seen_while_the_task_runs() -> None:
    from dray import current

    app, go = make_app(), threading.Event()

    @app.task
    def work() -> str:
        current().progress(1, 2, step="half")
        go.wait(PATIENCE_S)
        return "done"

    with working(app):
        result = work.delay()
        until(lambda: result.info == {"done": 1, "total": 2, "step": "half"})
        assert result.state is State.STARTED
        go.set()
        assert result.get(timeout=PATIENCE_S) == "done"
    app.close()


# --- G8: what cannot be understood -------------------------------------------------------------------------

POISON: list[tuple[bytes, dict[str, str]]] = [
    (b"", {}),
    (b"\xff\xfe", {"task": "ok", "type": "json"}),
    (b"[" * 100_000, {"task": "ok", "type": "json"}),
    (b"[[1" + b"0" * 5000 + b"],{}]", {"task": "ok", "type": "json"}),
    (b'[[],{"a":1,"a":2}]', {"task": "ok", "type": "json"}),
    (b"[[NaN],{}]", {"task": "ok", "type": "json"}),
    (b"{}", {"task": "ok", "type": "json"}),
    (b"[[],{}]", {"task": "ok", "type": "pickle"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "v": "9"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "enc": "zlib"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "attempt": "²"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "attempt": "-1"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "expires": "nan"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "rexp": "never"}),
    (b"[[],{}]", {"task": "ok", "type": "json", "retry": "[[[["}),
    (b"[[1,2,3],{}]", {"task": "ok", "type": "json"}),
    (b"[[],{}]", {"task": "a\nb", "type": "json"}),
    (b"[[],{}]", {"task": "nobody", "type": "json", "since": "1.0"}),
]


def test_no_input_kills_the_worker_and_each_is_a_dead_letter_with_a_reason() -> None:
    app, received = make_app(), list[str]()

    class Listener:
        @hookimpl
        def task_received(self, id: str, attempt: int) -> None:
            received.append(id)

    app.hook(Listener())
    ok = app.task(name="ok")(lambda: "fine")
    messages = [Outgoing("default", f"bad{n}", body, headers) for n, (body, headers) in enumerate(POISON)]
    with working(app):
        for message in messages:
            app.transport.send([message])
            assert ok.delay().get(timeout=PATIENCE_S) == "fine"
        until(lambda: stats(app) == (0, 0, len(POISON)))
    letters = app.transport.dead_list(None, 100)  # type: ignore[attr-defined]
    assert {letter.id for letter in letters} == {message.id for message in messages}
    assert all(": " in letter.reason for letter in letters)
    assert {letter.body for letter in letters} == {body for body, _ in POISON}, "it can be looked at, and sent again"
    assert len(received) == 2 * len(POISON)
    app.close()


def test_a_report_that_the_store_refuses_does_not_end_the_worker() -> None:
    from dray import current

    app = make_app()

    @app.task
    def work() -> int:
        current().progress(1, 2, note="x" * 17 * 2**20)
        return 1

    with working(app):
        assert work.delay().get(timeout=PATIENCE_S) == 1
        assert work.delay().get(timeout=PATIENCE_S) == 1
    app.close()


# --- G7: revoked -------------------------------------------------------------------------------------------


def test_what_was_revoked_never_starts_also_after_the_worker_restarted() -> None:
    app, ran = make_app(), list[str]()
    task = app.task(name="t")(ran.append)
    with working(app):
        assert task.delay("before").get(timeout=PATIENCE_S) is None
    result = task.delay("revoked")
    (held,) = app.transport.consumer(["default"], 1).receive(1, 0)  # a worker had it, and was lost
    result.revoke()
    app.transport.settle([Settlement(held, Action.RELEASE)])
    with working(app):
        assert task.delay("after").get(timeout=PATIENCE_S) is None
        with pytest.raises(TaskRevoked):
            result.get(timeout=PATIENCE_S)
    assert ran == ["before", "after"]
    assert stats(app) == (0, 0, 0)
    app.close()


def test_a_revoked_message_with_senseless_headers_is_removed_too() -> None:
    app = make_app()
    ok = app.task(name="ok")(lambda: "fine")
    app.revoke("bad")
    app.transport.send([Outgoing("default", "bad", b"", {"task": "ok", "rexp": "never"})])
    with working(app):
        assert ok.delay().get(timeout=PATIENCE_S) == "fine"
        until(lambda: stats(app) == (0, 0, 0))
    app.close()


# --- stopping ----------------------------------------------------------------------------------------------


def test_a_warm_stop_finishes_what_runs_and_gives_the_rest_back_at_no_charge() -> None:
    app, go, began = make_app(size=1), threading.Event(), threading.Event()

    @app.task
    def block() -> str:
        began.set()
        go.wait(PATIENCE_S)
        return "finished"

    with working(app) as worker:
        worker._intake._demand.capacity = 5
        results = [block.delay() for _ in range(4)]
        assert began.wait(PATIENCE_S)
        worker.stop()
        until(lambda: stats(app) == (3, 1, 0))
        go.set()
    assert results[0].get(timeout=PATIENCE_S) == "finished"
    left = app.transport.consumer(["default"], 9).receive(9, 0)
    assert sorted(delivery.id for delivery in left) == sorted(result.id for result in results[1:])
    assert {delivery.delivery_count for delivery in left} == {1}
    app.close()


def test_what_outlasts_the_warm_stop_is_given_back() -> None:
    app, go, began = make_app(size=1, shutdown_timeout=0.05), threading.Event(), threading.Event()

    @app.task
    def block() -> None:
        began.set()
        go.wait(PATIENCE_S)

    with working(app) as worker:
        result = block.delay()
        assert began.wait(PATIENCE_S)
        worker.stop()
    assert stats(app) == (1, 0, 0)
    with pytest.raises(ResultTimeout):
        result.get(timeout=0)
    go.set()
    app.close()


def test_stop_takes_no_lock_for_it_is_called_by_signal_handlers() -> None:
    app = make_app()
    with working(app) as worker, worker._stopping._cond, worker._intake.room._cond, worker._intake._lock:
        worker.stop()
    app.close()


def test_stop_may_come_before_run() -> None:
    app = make_app()
    worker = app.worker()
    worker.stop()
    assert worker.run() == EXIT_WARM
    app.close()


# --- a transport that fails --------------------------------------------------------------------------------


def test_a_lost_link_is_opened_again_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    task = app.task(name="t")(lambda: "fine")
    consumer, errors = app.transport.consumer, [Unavailable("refused"), Unavailable("refused")]

    def failing(queues: Sequence[str], buffer: int) -> Any:
        if errors:
            raise errors.pop()
        opened = consumer(queues, buffer)
        receive, lost = opened.receive, [Unavailable("link lost")]

        def receive_or_fail(limit: int, timeout_s: float) -> list[Delivery]:
            found = receive(limit, timeout_s)
            if lost and not found:
                raise lost.pop()
            return found

        opened.receive = receive_or_fail  # type: ignore[method-assign]
        return opened

    app.transport.consumer = failing  # type: ignore[method-assign]
    with working(app):
        assert task.delay().get(timeout=PATIENCE_S) == "fine"
    assert sum("receiving failed" in record.getMessage() for record in caplog.records) >= 2
    app.close()


# --- step by step, without threads -------------------------------------------------------------------------


class ShelfPool(Pool):
    """Keeps what it is given until the test runs it."""

    api = 1
    features = PoolFeatures()
    capacity = 3

    def start(self, executor: Executor, done: Any, report: Any) -> None:
        self.executor, self.done = executor, done

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        self.shelf.extend(deliveries)

    def recall(self) -> list[Delivery]:
        taken, self.shelf = self.shelf, []
        return taken

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        if delivery in self.shelf:
            self.shelf.remove(delivery)
            return True
        return False

    def run(self, stopping: threading.Event) -> None:
        raise DrayError("the fork server died")

    def stop(self, timeout_s: float) -> list[Delivery]:
        return self.recall()

    def __init__(self) -> None:
        super().__init__(NoOptions(), plugin_context("shelf"))
        self.shelf: list[Delivery] = []


class Steps:
    """A worker whose threads do not run: the test takes each step."""

    def __init__(self, hooks: Hooks = NO_HOOKS, **features: Any) -> None:
        self.bench = Bench(hooks=hooks)
        self.clock = self.bench.clock
        self.transport = memory_transport(self.clock, lease_s=60.0, **features)
        self.backend = memory_backend(self.clock)
        self.pool = ShelfPool()
        fallback = Fallback(self.transport.features, self.clock, "memory")
        self.settler = Settler(
            self.transport,
            self.backend,
            fallback,
            self.clock,
            random.Random(1),
            None,
            store_timeout_s=30,
            remember_ended_s=None,
            undeliverable=self.bench.executor.undeliverable,
        )
        self.worker = Worker(
            WorkerParts(
                name="w",
                queues=["q", "vip"],
                transport=self.transport,
                backend=self.backend,
                pool=self.pool,
                executor=self.bench.executor,
                settler=self.settler,
                fallback=fallback,
                hooks=hooks,
                clock=self.clock,
                random=random.Random(1),
                faults=None,
                shutdown_timeout_s=5,
                max_deliveries={"vip": 2},
            )
        )
        self.intake = self.worker._intake

    def send(self, *ids: str, queue: str = "q", **headers: str) -> None:
        given = {"task": "t", "type": "json", **headers}
        self.transport.send([Outgoing(queue, id_, b"[[],{}]", given) for id_ in ids])

    def step(self) -> bool:
        """One step of the intake; None of them waits, for there is a message or no room."""
        return self.intake.step()

    def settle(self) -> None:
        while self.settler.step() != NOTHING_TO_DO:
            pass

    def left(self) -> list[tuple[str, int]]:
        found = self.transport.consumer(["q", "vip"], 99).receive(99, 0)
        return [(delivery.id, delivery.delivery_count) for delivery in found]


def test_it_takes_as_many_as_it_has_slots_and_then_waits_for_room() -> None:
    steps = Steps()
    steps.send("a", "b", "c", "d")
    assert steps.step()
    assert [delivery.id for delivery in steps.pool.shelf] == ["a", "b", "c"]
    assert not steps.step(), "there is no room"
    steps.worker._done([Outcome(Settlement(steps.pool.shelf.pop(), Action.ACK), None)])
    assert steps.intake.room.is_set()
    assert steps.step()
    assert steps.intake.held == 3


def test_nobody_is_woken_while_there_is_no_room() -> None:
    steps = Steps()
    steps.send("a", "b", "c", "d")
    assert steps.step()
    steps.intake.look()
    assert not steps.intake.room.is_set()
    steps.intake.returned(1)
    assert steps.intake.room.is_set()


def test_a_message_that_was_handed_out_too_often_is_dead_by_its_queue_s_limit() -> None:
    steps = Steps()
    steps.send("a")
    steps.send("v", queue="vip")
    seen: dict[str, int] = {}
    for _ in range(7):
        while steps.transport.stats(["q"])["q"].ready or steps.transport.stats(["vip"])["vip"].ready:
            steps.step()
        for delivery in steps.pool.recall():
            seen[delivery.id] = delivery.delivery_count
            steps.intake.returned(1)
        steps.settle()
        steps.clock.advance(61)  # each worker is lost with what it holds
        steps.transport.consumer(["none"], 1).receive(1, 0)
    assert seen == {"a": 5, "v": 2}
    reasons = {letter.id: letter.reason for letter in steps.transport.dead_list(None, 9)}
    assert "handed out 6 times, max_deliveries is 5" in reasons["a"]
    assert "handed out 3 times, max_deliveries is 2" in reasons["v"]
    assert steps.backend.fetch(["a"])["a"].state is State.FAILURE


def test_when_the_transport_fails_between_receiving_and_starting_nothing_is_stuck() -> None:
    steps = Steps()
    steps.send("a")
    buried = steps.transport.buried

    def fail(_ids: Sequence[str]) -> dict[str, str]:
        raise Unavailable("away")

    steps.transport.buried = fail  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        steps.step()
    steps.transport.buried = buried  # type: ignore[method-assign]
    steps.settle()
    assert steps.settler.in_flight() == []
    assert steps.left() == [("a", 1)]


def test_surplus_is_given_back_at_no_charge_and_does_not_look_like_speed() -> None:
    steps = Steps()
    steps.send(*(str(number) for number in range(300)))
    steps.intake._demand._rate = 10_000.0  # it was fast, and now has met long tasks
    steps.clock.advance(0.001)
    steps.step()
    assert steps.intake.held == 300
    steps.clock.advance(10)
    steps.step()
    assert steps.intake.surplus() > 0
    running = [steps.pool.shelf.pop(0) for _ in range(3)]
    steps.worker._keeper.recall()
    steps.settle()
    assert steps.intake.held == 3
    assert steps.settler.in_flight() == running
    steps.clock.advance(1)
    assert not steps.step(), "giving back 297 tasks was not work done"
    assert steps.left()[0] == ("3", 1)


def test_a_delay_that_the_transport_cannot_keep_whole_is_sent_on_without_a_slot() -> None:
    steps = Steps(max_delay_s=100.0)
    due = steps.clock.time() + 150
    steps.send("a", eta=repr(due))
    steps.step()
    steps.settle()
    assert steps.pool.shelf == []
    steps.clock.advance(99)
    assert steps.left() == []
    steps.clock.advance(51)
    assert steps.left() == [("a", 1)]


@pytest.mark.parametrize("eta", ["soon", "9e10"])
def test_a_delay_that_cannot_be_is_no_end_of_the_worker(eta: str) -> None:
    steps = Steps(max_delay_s=0.0)
    steps.send("a", eta=eta)
    steps.step()
    for delivery in steps.pool.recall():
        steps.settler.collect([steps.bench.executor.run(delivery, steps.bench.slot)])
    steps.settle()
    assert [letter.id for letter in steps.transport.dead_list(None, 9)] == ["a"]


@pytest.mark.parametrize(("mark", "ends"), [("ended", 0), ("dead", 1)])
def test_a_copy_of_what_has_ended_is_not_run(mark: str, ends: int) -> None:
    steps = Steps()
    steps.transport.bury({"a": mark}, steps.clock.time() + 100)
    steps.send("a")
    steps.step()
    steps.settle()
    assert steps.pool.shelf == []
    assert len(steps.transport.dead_list(None, 9)) == ends
    assert steps.settler.in_flight() == []


def test_what_waits_in_the_pool_is_revoked_there() -> None:
    steps = Steps()
    steps.send("a", "b")
    steps.step()
    steps.transport.bury({"b": "revoked"}, steps.clock.time() + 100)
    steps.worker._keeper.step()
    steps.settle()
    assert [delivery.id for delivery in steps.pool.shelf] == ["a"]
    assert steps.backend.fetch(["b"])["b"].state is State.REVOKED
    assert (steps.intake.held, [delivery.id for delivery in steps.settler.in_flight()]) == (1, ["a"])


def test_a_renewal_that_failed_is_tried_again_at_the_next_look() -> None:
    steps = Steps()
    steps.send("a")
    steps.step()
    extend = steps.transport.extend

    def fail(_deliveries: Sequence[Delivery], _lease_s: float) -> list[Delivery]:
        raise Unavailable("away")

    steps.transport.extend = fail  # type: ignore[method-assign]
    steps.clock.advance(20)
    with pytest.raises(Unavailable):
        steps.worker._keeper.step()
    steps.transport.extend = extend  # type: ignore[method-assign]
    steps.clock.advance(1)
    steps.worker._keeper.step()
    steps.clock.advance(59)
    assert steps.left() == []


def test_a_lost_lease_takes_the_task_back_from_the_pool() -> None:
    steps = Steps()
    steps.send("a", "b")
    steps.step()
    steps.clock.advance(61)
    assert len(steps.left()) == 2
    steps.worker._keeper.step()
    assert (steps.pool.shelf, steps.intake.held, steps.settler.in_flight()) == ([], 0, [])


def test_a_pool_that_dies_ends_the_worker_in_order() -> None:
    steps = Steps()
    steps.send("a", "b")
    assert steps.worker.run() == EXIT_FAILED
    assert sorted(steps.left()) == [("a", 1), ("b", 1)]
    assert steps.settler.in_flight() == []


# --- G5: leases --------------------------------------------------------------------------------------------


def test_a_lease_is_kept_for_as_long_as_the_task_runs() -> None:
    clock = FakeClock()
    app = make_app(clock=clock, transport={"use": "memory", "lease": 60})
    go, began = threading.Event(), threading.Event()

    @app.task
    def long() -> str:
        began.set()
        go.wait(PATIENCE_S)
        return "finished"

    def lease_ends() -> float:
        return min(lease.until for lease in app.transport.store.leases.values())  # type: ignore[attr-defined]

    with working(app):
        result = long.delay()
        assert began.wait(PATIENCE_S)
        for _ in range(10):
            clock.advance(25)
            until(lambda: lease_ends() == clock.time() + 60)
        assert app.transport.consumer(["default"], 1).receive(1, 0) == []
        go.set()
        until(lambda: result.state is State.SUCCESS)
    assert stats(app) == (0, 0, 0)
    app.close()


def test_a_stored_result_is_there_before_the_message_is_gone() -> None:
    app, order = make_app(), list[str]()
    task = app.task(name="t")(lambda: "fine")
    store, settle = app.backend.store, app.transport.settle

    def storing(results: Sequence[StoredResult]) -> None:
        order.append("store")
        store(results)

    def settling(settlements: Sequence[Settlement]) -> list[Delivery]:
        order.append("settle")
        return settle(settlements)

    app.backend.store, app.transport.settle = storing, settling  # type: ignore[method-assign]
    with working(app):
        assert task.delay().get(timeout=PATIENCE_S) == "fine"
    assert order == ["store", "settle"]
    app.close()
