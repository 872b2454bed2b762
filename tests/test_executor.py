"""Each way in which a delivery can end."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.errors import (
    InvalidArguments,
    SoftTimeLimitExceeded,
    TaskExpired,
    TaskRevoked,
    TimeLimitExceeded,
    WorkerLost,
)
from dray.core.hooks import NAMES, Hooks, hookimpl
from dray.core.message import Action, Delivery, Outcome, State
from dray.core.request import current
from dray.core.retry import Retry
from tests.parts import Bench, make_task


def add(x: int, y: int = 0) -> int:
    return x + y


def fail(text: str = "boom") -> None:
    raise ValueError(text)


def dead(outcome: Outcome, says: str) -> None:
    """It is a dead letter with this reason, and a failure where results are kept."""
    settlement, result = outcome
    assert settlement.action is Action.DEAD
    assert settlement.then == ()
    assert settlement.reason is not None
    assert says in settlement.reason
    assert "\n" not in settlement.reason
    assert result is None or result.state is State.FAILURE


# --- success and failure -----------------------------------------------------------------------------------


def test_a_success_is_acknowledged_with_its_value() -> None:
    bench = Bench(add)
    outcome = bench.run("add", 2, y=3)
    assert outcome.settlement[1:] == (Action.ACK, (), None)
    assert bench.decoded(outcome) == (State.SUCCESS, 5)
    assert outcome.result is not None
    assert outcome.result.expires_at == bench.clock.time() + 3600
    assert (bench.slot.began, bench.slot.ended) == ([("add", None, None)], 1)


def test_a_failure_is_a_dead_letter_with_a_reason_and_a_result() -> None:
    bench = Bench(fail)
    outcome = bench.run("fail")
    dead(outcome, "ValueError: boom")
    state, record = bench.decoded(outcome)
    assert (state, record["type"], record["args"]) == (State.FAILURE, "builtins.ValueError", ["boom"])
    assert "in fail" in record["traceback"]
    assert bench.slot.ended == 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_what_would_end_the_process_ends_the_task_only(error: BaseException) -> None:
    def leave() -> None:
        raise error

    bench = Bench(leave)
    dead(bench.run("leave"), type(error).__name__)
    assert bench.slot.ended == 1


def test_an_exception_that_cannot_be_shown_is_still_an_end() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise SystemExit

        __repr__ = __str__

        @property
        def args(self) -> Any:  # type: ignore[override]
            raise RuntimeError

    def hostile() -> None:
        raise Hostile

    bench = Bench(hostile)
    outcome = bench.run("hostile")
    dead(outcome, "Hostile")
    assert bench.decoded(outcome).value["type"].endswith("Hostile")


@pytest.mark.parametrize(
    "argument", [float("nan"), "\ud800", 10**5000, "x" * 200_000], ids=["nan", "surrogate", "huge", "long"]
)
def test_an_exception_whose_arguments_cannot_be_kept_loses_them_only(argument: Any) -> None:
    def fail_with() -> None:
        raise ValueError(argument)

    bench = Bench(fail_with)
    outcome = bench.run("fail_with")
    dead(outcome, "ValueError")
    assert bench.decoded(outcome).value["args"] is None


def test_a_result_that_is_no_plain_data_fails_and_is_not_tried_again() -> None:
    def produce() -> object:
        return object()

    bench = Bench()
    bench.add(produce, retry=Retry())
    outcome = bench.run("produce")
    dead(outcome, "EncodeError")
    assert isinstance(bench.results._safe_errors.rebuild(bench.decoded(outcome).value), Exception)


def test_a_self_referencing_result_fails() -> None:
    def loop() -> list[Any]:
        value: list[Any] = []
        value.append(value)
        return value

    dead(Bench(loop).run("loop"), "contains itself")


def test_a_result_over_the_limit_fails_and_says_what_to_do() -> None:
    def produce(size: int) -> str:
        return "x" * size

    bench = Bench()
    bench.add(produce, retry=Retry())
    assert bench.run("produce", 90_000).settlement.action is Action.ACK
    outcome = bench.run("produce", 100_000)
    dead(outcome, "TooLarge: the result of produce is")
    assert "store it elsewhere" in (outcome.settlement.reason or "")


# --- retries -----------------------------------------------------------------------------------------------


def test_a_failure_under_a_policy_is_sent_again_one_attempt_on() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(on=ValueError, max=2, delay=10, backoff=3, jitter=0), priority=4)
    first = bench.run("fail", headers={"prio": "4", "expires": "1900000000.0", "x-trace": "7"})
    (again,) = first.settlement.then
    assert (again.id, again.queue, again.priority, again.expires_at) == ("id1", "q", 4, 1_900_000_000)
    assert again.not_before == bench.clock.time() + 10
    assert (again.headers["attempt"], again.headers["x-trace"]) == ("1", "7")
    state, record = bench.decoded(first)
    assert (state, record["type"]) == (State.RETRY, "builtins.ValueError")
    second = bench.executor.run(bench.again(first), bench.slot)
    assert second.settlement.then[0].not_before == bench.clock.time() + 30
    third = bench.executor.run(bench.again(second), bench.slot)
    dead(third, "ValueError: boom")


def test_an_error_that_the_policy_does_not_name_ends_it() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(on=OSError))
    dead(bench.run("fail"), "ValueError: boom")


def test_a_task_may_ask_for_a_retry_without_a_policy() -> None:
    def busy() -> None:
        raise Retry("the service is busy", delay=30, jitter=0, max=1)

    bench = Bench(busy)
    first = bench.run("busy")
    assert first.settlement.then[0].not_before == bench.clock.time() + 30
    outcome = bench.executor.run(bench.again(first), bench.slot)
    dead(outcome, "the service is busy")


def test_a_retry_without_delay_is_due_at_once() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(delay=0))
    assert bench.run("fail").settlement.then[0].not_before is None


def test_the_policy_of_the_call_wins_over_the_task_s() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(on=OSError))
    policy = Retry(on=ValueError, delay=9, jitter=0).policy().dumps()
    outcome = bench.run("fail", headers={"retry": policy})
    assert outcome.settlement.then[0].not_before == bench.clock.time() + 9


@pytest.mark.parametrize("problem", [KeyError("wait"), SystemExit(1)])
def test_a_wait_function_that_raises_ends_the_task_with_both_errors(problem: BaseException) -> None:
    def wait(_retries: int, _error: BaseException) -> float:
        raise problem

    bench = Bench()
    bench.add(fail, retry=Retry(wait=wait))
    outcome = bench.run("fail")
    dead(outcome, type(problem).__name__)
    assert "ValueError: boom" in bench.decoded(outcome).value["traceback"]


def test_the_retry_state_outlives_the_delay() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(delay=86_400, max_delay=86_400, jitter=0))
    outcome = bench.run("fail")
    assert outcome.result is not None
    assert outcome.result.expires_at == bench.clock.time() + 86_400 + 3600


# --- what cannot be run ------------------------------------------------------------------------------------


def test_an_unknown_task_waits_bounded_and_is_then_dead() -> None:
    bench = Bench(add)
    outcome, passed_s = bench.run("ad", 1), 0
    while outcome.settlement.then:
        assert outcome.result is None
        (again,) = outcome.settlement.then
        assert again.not_before is not None
        assert again.not_before > bench.clock.time()
        bench.clock.advance(5)
        passed_s += 5
        outcome = bench.executor.run(bench.again(outcome), bench.slot)
    assert passed_s == 60
    dead(outcome, "unknown task 'ad'; did you mean 'add'?")


def test_an_unknown_task_that_becomes_known_runs() -> None:
    bench = Bench()
    delivery = bench.again(bench.run("add", 1, 2))
    bench.add(add)
    assert bench.decoded(bench.executor.run(delivery, bench.slot)).value == 3


def test_a_forged_start_of_the_wait_does_not_make_it_wait_for_ever() -> None:
    bench = Bench()
    outcome = bench.run("nobody", headers={"since": "9e15"})
    bench.clock.advance(61)
    dead(bench.executor.run(bench.again(outcome), bench.slot), "unknown task")


def test_where_nothing_can_wait_an_unknown_task_is_dead_at_once() -> None:
    dead(Bench(unknown_task_wait_s=0.0).run("nobody"), "unknown task 'nobody'")


@pytest.mark.parametrize(("name", "id_"), [("", "id1"), ("a\nb", "id1"), ("x" * 300, "id1"), ("t", "é"), ("t", "")])
def test_names_that_nobody_could_have_given_are_dead(name: str, id_: str) -> None:
    bench = Bench()
    delivery = bench.delivery(name)._replace(id=id_)
    dead(bench.executor.run(delivery, bench.slot), "DecodeError")


def test_an_expired_task_does_not_start() -> None:
    bench = Bench(fail)
    headers = {"expires": repr(bench.clock.time() + 10)}
    bench.clock.advance(10)
    outcome = bench.run("fail", headers=headers)
    assert outcome.settlement.action is Action.ACK
    state, record = bench.decoded(outcome)
    assert state is State.FAILURE
    assert isinstance(bench.results._safe_errors.rebuild(record), TaskExpired)
    assert bench.slot.began == []


def test_an_expired_task_is_not_dropped_in_silence_where_no_results_are_kept() -> None:
    bench = Bench(fail, keeps_results=False)
    outcome = bench.run("fail", headers={"expires": "5"})
    dead(outcome, "TaskExpired")
    assert outcome.result is None


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1})])
def test_wrong_arguments_are_dead_and_not_tried_again(args: Any, kwargs: Any) -> None:
    bench = Bench()
    bench.add(add, retry=Retry())
    outcome = bench.run("add", *args, **kwargs)
    dead(outcome, "InvalidArguments: add(x: ")
    assert isinstance(bench.results._safe_errors.rebuild(bench.decoded(outcome).value), InvalidArguments)
    assert bench.slot.began == []


@pytest.mark.parametrize(
    "headers",
    [
        {"attempt": "-1"},
        {"attempt": "1" * 400},
        {"attempt": "²"},
        {"expires": "nan"},
        {"soft": "soon"},
        {"hard": "inf"},
        {"rexp": "x"},
        {"retry": "[]"},
        {"retry": "[" * 50_000},
        {"type": "yaml"},
        {"type": ""},
        {"enc": "lzma"},
        {"v": "3"},
    ],
    ids=repr,
)
def test_bad_headers_are_dead_with_a_reason(headers: dict[str, str]) -> None:
    bench = Bench(add)
    good = bench.delivery("add", 1)
    delivery = good._replace(headers={**good.headers, **headers})
    for outcome in (bench.executor.run(delivery, bench.slot), bench.executor.lost(delivery, TimeLimitExceeded("x"))):
        dead(outcome, "")
        assert (outcome.settlement.reason or "").split(":")[0] in ("DecodeError", "ContentRefused")
    assert bench.slot.began == []
    bench.executor.revoked(delivery)


def test_the_largest_attempt_neither_raises_nor_loops() -> None:
    bench = Bench()
    bench.add(fail, retry=Retry(max=10**11, backoff=2, max_delay=60, jitter=0))
    outcome = bench.run("fail", headers={"attempt": "999999999"})
    assert outcome.settlement.then[0].not_before == bench.clock.time() + 60
    dead(bench.executor.run(bench.again(outcome), bench.slot), "attempt")


@given(
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(
            ["task", "type", "attempt", "expires", "eta", "retry", "rexp", "ignore", "crashes", "since", "v"]
        ),
        st.sampled_from(["add", "json", "1", "-1", "nan", "1e308", "", "\0", "\ud800", "[]"]) | st.text(max_size=5),
    ),
    st.sampled_from(["id1", "", "\ud800", "x" * 400]),
)
def test_whatever_arrives_the_executor_answers(body: bytes, headers: dict[str, str], id_: str) -> None:
    bench = Bench(add)
    for data in (body, b"[[1,2],{}]"):
        delivery = Delivery("q", id_, data, headers, None)
        for outcome in (
            bench.executor.run(delivery, bench.slot),
            bench.executor.lost(delivery, WorkerLost("x")),
            bench.executor.lost(delivery, TaskRevoked("x")),
            bench.executor.revoked(delivery),
            bench.executor.undeliverable(delivery, "why"),
        ):
            assert outcome.settlement.delivery is delivery
            assert outcome.settlement.action is not Action.RELEASE


# --- limits and coroutines ---------------------------------------------------------------------------------


def test_limits_come_from_the_configuration_the_task_or_the_call() -> None:
    bench = Bench(soft_time_limit=5, time_limit=9)
    bench.add(add)
    bench.add(fail, soft_time_limit=1, time_limit=2)
    bench.run("add", 1)
    bench.run("fail")
    bench.run("fail", headers={"soft": "7", "hard": "8"})
    assert [limits for _, *limits in bench.slot.began] == [[5, 9], [1, 2], [7, 8]]


def test_where_nothing_can_be_killed_the_hard_limit_becomes_the_soft_one() -> None:
    bench = Bench(add, can_kill=False, soft_time_limit=5)
    bench.run("add", 1, headers={"hard": "3"})
    bench.run("add", 1, headers={"hard": "30"})
    assert [soft for _, soft, _ in bench.slot.began] == [3, 5]


def test_coroutines_run_and_share_their_thread_s_loop() -> None:
    loops = []

    async def fetch(x: int) -> int:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return x * 2

    bench = Bench(fetch)
    assert [bench.decoded(bench.run("fetch", n)).value for n in (1, 2)] == [2, 4]
    assert loops[0] is loops[1]


def test_a_coroutine_that_fails_fails_the_task() -> None:
    async def fetch() -> None:
        raise OSError("gone")

    bench = Bench(fetch)
    dead(bench.run("fetch"), "OSError: gone")


def interrupt_the_loop() -> None:
    """The loop's next wait ends as one does in which a signal handler raises."""
    selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    select = selector.select

    def interrupted(_timeout: float | None = None) -> None:
        selector.select = select
        raise SoftTimeLimitExceeded("over")

    selector.select = interrupted


def test_a_soft_limit_raised_into_the_loop_cancels_the_coroutine_which_may_clean_up() -> None:
    cleaned = []

    async def fetch() -> None:
        interrupt_the_loop()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    bench = Bench(fetch)
    dead(bench.run("fetch"), "SoftTimeLimitExceeded: over")
    assert cleaned == [True]


def test_a_coroutine_that_handles_its_soft_limit_may_return() -> None:
    async def fetch() -> str:
        interrupt_the_loop()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "half"
        return "all"

    bench = Bench(fetch)
    assert bench.decoded(bench.run("fetch")).value == "half"


def test_after_a_fork_loops_are_made_anew() -> None:
    async def fetch() -> int:
        return id(asyncio.get_running_loop())

    bench = Bench(fetch)
    first = bench.decoded(bench.run("fetch")).value
    bench.executor.forked()
    assert bench.decoded(bench.run("fetch")).value != first


# --- runs that the pool ended ------------------------------------------------------------------------------


def test_crashes_are_counted_and_the_third_makes_a_poison_message() -> None:
    bench = Bench()
    bench.add(add, retry=Retry())
    delivery = bench.delivery("add", 1, headers={"x-a": "b"})
    for crash in (1, 2):
        outcome = bench.executor.lost(delivery, WorkerLost("signal 11"))
        assert outcome.result is None
        delivery = bench.again(outcome)
        assert (delivery.headers["crashes"], delivery.headers["x-a"]) == (str(crash), "b")
        assert "attempt" not in delivery.headers
    outcome = bench.executor.lost(delivery, WorkerLost("signal 11"))
    dead(outcome, "poison: it killed its process 3 times; last: signal 11")
    assert isinstance(bench.results._safe_errors.rebuild(bench.decoded(outcome).value), WorkerLost)


def test_a_run_over_its_time_limit_follows_the_retry_policy() -> None:
    bench = Bench()
    bench.add(add, retry=Retry(on=TimeLimitExceeded, max=1, delay=3, jitter=0))
    bench.add(fail)
    first = bench.executor.lost(bench.delivery("add", 1), TimeLimitExceeded("over 5 s"))
    assert first.settlement.then[0].not_before == bench.clock.time() + 3
    dead(bench.executor.lost(bench.again(first), TimeLimitExceeded("over 5 s")), "TimeLimitExceeded: over 5 s")
    dead(bench.executor.lost(bench.delivery("fail"), TimeLimitExceeded("over 5 s")), "TimeLimitExceeded")


def test_a_run_that_was_revoked_ends_as_revoked() -> None:
    bench = Bench(add)
    for outcome in (
        bench.executor.lost(bench.delivery("add", 1), TaskRevoked("by hand")),
        bench.executor.revoked(bench.delivery("add", 1)),
        bench.executor.revoked(bench.delivery("nobody knows it")),
    ):
        assert outcome.settlement.action is Action.ACK
        assert bench.decoded(outcome) == (State.REVOKED, None)


def test_the_worker_never_signs_what_it_did_not_verify() -> None:
    bench = Bench(add, signed=True)
    genuine = bench.delivery("add", 1)
    forged = genuine._replace(headers={**genuine.headers, "task": "drop_all"})
    assert bench.executor.lost(genuine, WorkerLost("x")).settlement.then
    dead(bench.executor.lost(forged, WorkerLost("x")), "SignatureError")
    dead(bench.executor.run(forged, bench.slot), "SignatureError")


def test_a_worker_without_a_key_to_sign_with_still_ends_every_task() -> None:
    bench = Bench(signed=True)
    bench.add(add)
    bench.add(fail, retry=Retry())
    good, bad = bench.delivery("add", 1), bench.delivery("fail")
    assert bench.signer is not None
    bench.signer.can_sign = False
    for outcome in (
        bench.executor.run(good, bench.slot),
        bench.executor.run(bad, bench.slot),
        bench.executor.lost(good, WorkerLost("x")),
    ):
        dead(outcome, "EncodeError: no key to sign with")
        assert outcome.result is None
    assert bench.executor.revoked(good).settlement.action is Action.ACK


def test_a_message_that_must_not_be_tried_again_is_dead_with_that_reason() -> None:
    bench = Bench(add)
    dead(bench.executor.undeliverable(bench.delivery("add", 1), "handed out 6 times"), "handed out 6 times")


def test_a_replay_is_removed_and_leaves_the_result_alone() -> None:
    outcome = Bench(add).executor.replayed(Bench(add).delivery("add", 1))
    assert (outcome.settlement.action, outcome.result) == (Action.ACK, None)


# --- states and results ------------------------------------------------------------------------------------


def test_started_is_reported_only_when_asked_for() -> None:
    bench = Bench(add)
    bench.run("add", 1)
    assert bench.slot.reports == []
    bench.run("add", 1, headers={"track": "1"})
    bench.add(fail, track_started=True)
    bench.run("fail")
    bench.run("fail", headers={"track": "0"})
    assert [report.state for report in bench.slot.reports] == [State.STARTED, State.STARTED]
    bench.run("add", 1, headers={"track": "1", "ignore": "1"})
    assert len(bench.slot.reports) == 2


def test_progress_is_reported_at_most_ten_times_a_second_but_its_end_always() -> None:
    bench = Bench()

    def work() -> None:
        for done in range(101):
            current().progress(done, 100, step=str(done))
            bench.clock.advance(0.03125)

    bench.add(work)
    bench.clock.advance(1)
    bench.run("work")
    notes = [bench.results.decode(report).value for report in bench.slot.reports]
    assert notes[0] == {"done": 0, "total": 100, "step": "0"}
    assert notes[-1]["done"] == 100
    assert [note["done"] for note in notes[:4]] == [0, 4, 8, 12]


def test_nobody_to_tell_costs_nothing() -> None:
    def work() -> None:
        current().progress(1, 2, note=object())

    bench = Bench(work, keeps_results=False)
    assert bench.run("work").settlement.action is Action.ACK
    assert bench.slot.reports == []


@pytest.mark.parametrize(
    ("of_all", "of_task", "of_call", "kept"),
    [
        (False, None, None, True),
        (True, None, None, False),
        (True, False, None, True),
        (False, True, None, False),
        (False, True, "0", True),
        (True, False, "1", False),
    ],
)
def test_the_nearest_word_on_results_counts(of_all: bool, of_task: bool, of_call: str, kept: bool) -> None:
    bench = Bench(ignore_result=of_all)
    bench.add(add, ignore_result=of_task)
    headers = {"ignore": of_call} if of_call else {}
    assert (bench.run("add", 1, headers=headers).result is not None) == kept


def test_results_are_kept_as_long_as_the_configuration_the_task_or_the_call_says() -> None:
    bench = Bench(add)
    bench.add(fail, result_expires=timedelta(minutes=2))
    outcomes = (bench.run("add", 1), bench.run("fail"), bench.run("fail", headers={"rexp": "5.0"}))
    assert [outcome.result and outcome.result.expires_at for outcome in outcomes] == [
        bench.clock.time() + seconds for seconds in (3600, 120, 5)
    ]


def test_a_running_task_knows_its_call() -> None:
    seen = []

    def look() -> None:
        request = current()
        seen.append((request.id, request.task, request.queue, request.attempt, request.delivery_count))
        seen.append((request.deadline, dict(request.headers)))

    bench = Bench(look)
    delivery = bench.delivery("look", headers={"hard": "30", "attempt": "2", "x-trace": "7"})
    bench.executor.run(delivery._replace(delivery_count=4), bench.slot)
    assert seen == [("id1", "look", "q", 2, 4), (bench.clock.time() + 30, {"trace": "7"})]
    with pytest.raises(Exception, match="no task runs here"):
        current()


def test_what_a_task_knows_of_itself_is_one_thing_for_the_whole_run_and_its_deadline_stands() -> None:
    seen = []

    def look() -> None:
        bench.clock.advance(3)
        first = current()
        bench.clock.advance(3)
        seen.append((first is current(), first.deadline))

    bench = Bench(look)
    began = bench.clock.time()
    bench.run("look", headers={"hard": "30"})
    assert seen == [(True, began + 30)]


def test_what_one_call_asks_for_does_not_become_usual_for_its_task() -> None:
    bench = Bench()
    bench.add(add, soft_time_limit=5)
    for headers in ({}, {"soft": "7", "ignore": "1"}, {}):
        outcome = bench.run("add", 1, headers=headers)
        assert (outcome.result is None) == bool(headers)
    assert [soft for _, soft, _ in bench.slot.began] == [5, 7, 5]


def test_frames_between_the_slot_and_the_function_are_three_at_most() -> None:
    def depth() -> int:
        frame, count = sys._getframe(1), 0
        while frame.f_code is not Bench.run.__code__:
            frame, count = frame.f_back, count + 1  # type: ignore[assignment]
        return count

    bench = Bench(depth)
    assert 1 <= bench.decoded(bench.run("depth")).value <= 3


# --- validation and hooks ----------------------------------------------------------------------------------


def test_arguments_and_values_are_checked_where_the_task_asks_for_it() -> None:
    from tests.checked import total

    bench = Bench()
    bench.add(make_task(total, "total", validate=True))
    assert bench.decoded(bench.run("total", ["2026-01-01", "2026-01-03"])).value == 2
    dead(bench.run("total", ["soon"]), "InvalidArguments: total: argument 'days'")
    dead(bench.run("total", [], wrong=1), "InvalidArguments")
    dead(bench.run("total", []), "EncodeError: total: the return value does not fit")


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    @hookimpl
    def task_started(self, task: str, id: str, queue: str, attempt: int, headers: dict[str, str]) -> None:
        self.heard.append(("started", {"task": task, "id": id, "queue": queue, "attempt": attempt, "headers": headers}))

    @hookimpl
    def task_succeeded(self, task: str, duration_s: float) -> None:
        self.heard.append(("succeeded", {"task": task, "duration_s": duration_s}))

    @hookimpl
    def task_failed(self, error: BaseException) -> None:
        self.heard.append(("failed", {"error": type(error)}))

    @hookimpl
    def task_retried(self, attempt: int, delay_s: float) -> None:
        self.heard.append(("retried", {"attempt": attempt, "delay_s": delay_s}))

    @hookimpl
    def task_dead(self, reason: str) -> None:
        self.heard.append(("dead", {"reason": reason}))


def test_hooks_hear_how_it_went() -> None:
    listener = Listener()
    bench = Bench(hooks=Hooks([listener]))

    def slow() -> None:
        bench.clock.advance(2)

    bench.add(slow)
    bench.add(fail, retry=Retry(max=1, delay=4, jitter=0))
    bench.run("slow", headers={"x-trace": "7"})
    bench.executor.run(bench.again(bench.run("fail")), bench.slot)
    bench.run("slow", 1)
    started = {"task": "slow", "id": "id1", "queue": "q", "attempt": 0, "headers": {"trace": "7"}}
    assert listener.heard[:2] == [("started", started), ("succeeded", {"task": "slow", "duration_s": 2})]
    assert [name for name, _ in listener.heard[2:]] == ["started", "retried", "started", "failed", "dead", "dead"]
    assert listener.heard[3][1] == {"attempt": 0, "delay_s": 4}
    assert "InvalidArguments" in listener.heard[-1][1]["reason"]


def test_a_hook_that_raises_harms_no_task() -> None:
    def broken(self: object) -> None:
        raise RuntimeError("hook")

    listener = type("Broken", (), {name: hookimpl(broken) for name in NAMES})
    bench = Bench(add, hooks=Hooks([listener]))
    assert bench.decoded(bench.run("add", 1)).value == 1
