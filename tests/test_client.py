"""A call becomes a message, and the caller knows what became of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from dray import CallOptions, Dray, Retry
from dray.core.client import SLICE
from dray.core.errors import (
    ConfigError,
    EncodeError,
    InvalidArguments,
    InvalidName,
    NoResults,
    NotSupported,
    PublishUncertain,
    SendError,
    Unavailable,
    Uncertain,
)
from dray.core.hooks import hookimpl
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.testing.clock import FakeClock
from tests.parts import memory_transport


class Numbered:
    def __init__(self) -> None:
        self.count = 0

    def new(self) -> str:
        self.count += 1
        return f"id{self.count}"


class Shop:
    """An app over memory, its tasks, and what was sent."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.app = Dray(
            config={"transport": "memory", "backend": "memory", **settings}, clock=self.clock, ids=Numbered()
        )
        self.add = self.app.task(name="shop.add")(lambda x, y=0: x + y)

    def sent(self, queue: str = "default") -> list[Outgoing]:
        found: list[Outgoing] = self.app.transport.peek(queue, 10_000)  # type: ignore[attr-defined]
        return found

    def last(self, queue: str = "default") -> Outgoing:
        return self.sent(queue)[-1]

    def fail_to_send(self, *errors: Exception | None) -> list[int]:
        """The next sends end so; returns the list of batch sizes that were tried."""
        tried, left, send = [], list(errors), self.app.transport.send

        def sending(messages: Sequence[Outgoing]) -> None:
            tried.append(len(messages))
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            send(messages)

        self.app.transport.send = sending  # type: ignore[method-assign]
        return tried


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.app.close()


def test_a_call_is_confirmed_under_its_id(shop: Shop) -> None:
    result = shop.add.delay(2, y=3)
    assert result.id == "id1"
    assert shop.sent() == [Outgoing("default", "id1", b'[[2],{"y":3}]', {"task": "shop.add", "type": "json"})]
    assert result.state is State.PENDING
    assert asyncio.run(shop.add.adelay(1)).id == "id2"


def test_arguments_that_do_not_fit_or_cannot_travel_are_refused_and_nothing_is_sent(shop: Shop) -> None:
    with pytest.raises(InvalidArguments):
        shop.add.delay()
    with pytest.raises(EncodeError):
        shop.add.delay(object())
    assert shop.sent() == []


def test_options_become_headers_and_fields(shop: Shop) -> None:
    now = shop.clock.time()
    shop.add.options(
        queue="slow",
        priority=9,
        countdown=60,
        expires=timedelta(hours=1),
        task_id="mine",
        retry=Retry(on=OSError, max=2),
        soft_time_limit=1.5,
        time_limit=2,
        ignore_result=False,
        track_started=True,
        result_expires=90,
        compression="none",
        headers={"trace": "ü"},
    ).delay(1)
    message = shop.last("slow")
    assert message[:2] == ("slow", "mine")
    assert message[4:] == (9, now + 60, now + 3600)
    assert message.headers == {
        "task": "shop.add",
        "type": "json",
        "prio": "9",
        "eta": repr(now + 60),
        "expires": repr(now + 3600),
        "soft": "1.5",
        "hard": "2",
        "ignore": "0",
        "track": "1",
        "rexp": "90.0",
        "retry": '[["builtins.OSError"], 2, 1.0, 2.0, 3600.0, 0.5]',
        "x-trace": "ü",
    }


def test_a_task_s_own_options_hold_for_every_call_and_a_call_s_win(shop: Shop) -> None:
    task = shop.app.task(name="shop.mail", queue="mail", priority=5, expires=60, headers={"a": "1"})(lambda: None)
    now = shop.clock.time()
    task.delay()
    message = shop.last("mail")
    assert (message.priority, message.expires_at, message.headers["x-a"]) == (5, now + 60, "1")
    assert message.headers["prio"] == "5"
    task.options(priority=0, queue="q", expires=5, headers={"a": "2"}).delay()
    message = shop.last("q")
    assert (message.priority, message.expires_at, message.headers["x-a"]) == (0, now + 5, "2")
    assert "prio" not in message.headers, "or the retry would have the task's priority again"


ETA = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("options", "not_before"),
    [
        ({"eta": ETA}, ETA.timestamp()),
        ({"eta": ETA.astimezone(timezone(timedelta(hours=14)))}, ETA.timestamp()),
        ({"eta": 1_900_000_000}, 1_900_000_000),
        ({"countdown": timedelta(days=2)}, 1_800_000_000 + 172_800),
        ({"countdown": 0}, 1_800_000_000),
    ],
    ids=str,
)
def test_a_time_to_start_is_seconds_or_aware(shop: Shop, options: dict[str, Any], not_before: float) -> None:
    shop.add.options(**options).delay(1)
    assert shop.last().not_before == not_before
    assert float(shop.last().headers["eta"]) == not_before


@pytest.mark.parametrize(
    "options",
    [
        {"eta": datetime(2030, 1, 1)},
        {"eta": -1},
        {"eta": 253_402_300_800},
        {"eta": float("nan")},
        {"eta": float("inf")},
        {"eta": True},
        {"eta": "tomorrow"},
        {"countdown": float("nan")},
        {"countdown": 1e12},
        {"countdown": timedelta.max},
        {"expires": datetime(2030, 1, 1)},
        {"expires": float("inf")},
    ],
    ids=str,
)
def test_times_that_are_none_are_refused_by_name(shop: Shop, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        shop.add.options(**options).delay(1)
    assert shop.sent() == []


def test_a_retry_function_cannot_travel_with_a_call(shop: Shop) -> None:
    with pytest.raises(EncodeError, match=r"@app\.task"):
        shop.add.options(retry=Retry(wait=lambda _n, _e: 1)).delay(1)


def test_an_ignored_result_cannot_be_waited_for(shop: Shop) -> None:
    result = shop.add.options(ignore_result=True).delay(1)
    for ask in (lambda: result.get(timeout=0), lambda: result.state, lambda: asyncio.run(result.aget(timeout=0))):
        with pytest.raises(NoResults, match="ignore_result"):
            ask()


def test_tasks_are_routed_by_the_first_pattern_that_fits() -> None:
    shop = Shop(routes={"shop.a*": "letters", "shop.*": "rest"}, default_queue="home")
    shop.add.delay(1)
    assert len(shop.sent("letters")) == 1
    shop.app.task(name="shop.zap")(lambda: None).delay()
    assert len(shop.sent("rest")) == 1
    shop.app.task(name="other")(lambda: None).delay()
    assert len(shop.sent("home")) == 1
    shop.app.close()


def test_priorities_are_dropped_on_the_short_way_too() -> None:
    shop = Shop()
    shop.app.__dict__.pop("_codec", None)
    reduced = memory_transport(shop.clock, priorities=1)
    connections = shop.app.compose(reduced, shop.app.backend)
    task = shop.app.task(name="urgent", priority=9)(lambda: None)
    connections.client.send(task, (), {}, CallOptions())
    from dray.core.task import NO_OPTIONS

    connections.client.send(task, (), {}, NO_OPTIONS)
    assert [message.priority for message in reduced.peek("default", 9)] == [0, 0]
    shop.app.close()


def test_a_task_known_by_name_only_does_not_decide_for_the_real_one(shop: Shop) -> None:
    shop.app.send_task("shop.later", (1,), queue="elsewhere")
    shop.app.send_task("shop.later", (1,))
    later = shop.app.task(name="shop.later", queue="mail")(lambda x: x)
    later.delay(1)
    shop.app.send_task("shop.later", (2,))
    assert [len(shop.sent(queue)) for queue in ("elsewhere", "default", "mail")] == [1, 1, 2]
    with pytest.raises(InvalidArguments):
        shop.app.send_task("shop.later")
    with pytest.raises(InvalidName):
        shop.app.send_task("a\0b")


# --- when sending fails ------------------------------------------------------------------------------------


def test_an_unconfirmed_call_names_its_id_and_may_be_repeated_under_it(shop: Shop) -> None:
    shop.fail_to_send(Uncertain("no answer"))
    with pytest.raises(PublishUncertain, match="task_id='id1'") as caught:
        shop.add.delay(1)
    assert caught.value.task_id == "id1"
    assert shop.add.options(task_id=caught.value.task_id).delay(1).id == "id1"


def test_a_call_that_was_certainly_not_sent_says_so(shop: Shop) -> None:
    shop.fail_to_send(Unavailable("down"))
    with pytest.raises(Unavailable, match="down"):
        shop.add.delay(1)
    assert shop.sent() == []


def test_many_calls_go_in_slices_and_the_generator_is_not_run_ahead(shop: Shop) -> None:
    tried = shop.fail_to_send()
    drawn = []

    def calls() -> Iterator[Any]:
        for number in range(SLICE * 2 + 5):
            drawn.append((number, len(tried)))
            yield shop.add.s(number)

    result = shop.app.send_many(calls())
    assert tried == [SLICE, SLICE, 5]
    assert len(result) == SLICE * 2 + 5
    assert result.ids[:2] == ["id1", "id2"]
    assert drawn[SLICE] == (SLICE, 1), "the first slice was sent before the second was drawn"
    assert shop.app.send_many([]).ids == []


@pytest.mark.parametrize("error", [SendError("full", ()), Unavailable("down")])
def test_a_slice_that_fails_tells_what_was_sent_and_what_was_not(shop: Shop, error: Exception) -> None:
    unsent = (Outgoing("default", "x", b"", {}),)
    if isinstance(error, SendError):
        error.unsent = unsent
    shop.fail_to_send(None, error)
    with pytest.raises(SendError, match=f"{SLICE} calls were sent before") as caught:
        shop.app.send_many(shop.add.s(number) for number in range(SLICE + 3))
    if isinstance(error, SendError):
        assert caught.value.unsent == unsent
    else:
        assert [message.id for message in caught.value.unsent] == [f"id{SLICE + n}" for n in (1, 2, 3)]


def test_a_slice_without_confirmation_names_its_first_id(shop: Shop) -> None:
    shop.fail_to_send(None, Uncertain("no answer"))
    with pytest.raises(PublishUncertain) as caught:
        shop.app.send_many(shop.add.s(number) for number in range(SLICE + 3))
    assert caught.value.task_id == f"id{SLICE + 1}"


# --- hooks -------------------------------------------------------------------------------------------------


def test_an_enqueue_hook_sees_the_call_and_may_add_headers(shop: Shop) -> None:
    heard = []

    class Tracing:
        @hookimpl
        def enqueue(self, task: str, id: str, queue: str, headers: dict[str, str], not_before: float | None) -> None:
            heard.append((task, id, queue, not_before))
            headers["x-trace"] = "7"

    app = Dray(config={"transport": "memory", "backend": "memory"}, clock=shop.clock, ids=Numbered())
    app.hook(Tracing())
    task = app.task(name="t")(lambda: None)
    task.delay()
    task.options(countdown=5).delay()
    assert heard == [("t", "id1", "default", None), ("t", "id2", "default", shop.clock.time() + 5)]
    (first, second) = app.transport.peek("default", 9)  # type: ignore[attr-defined]
    assert first.headers["x-trace"] == second.headers["x-trace"] == "7"
    with pytest.raises(ConfigError, match="frozen"):
        app.hook(Tracing())
    app.close()


# --- revoke and requeue ------------------------------------------------------------------------------------


def test_what_was_revoked_is_due_at_once_so_that_a_worker_settles_it(shop: Shop) -> None:
    """The client removes nothing and stores nothing: if it failed in between, the task would be gone without an end."""
    result = shop.add.options(countdown=3600).delay(1)
    assert shop.app.transport.consumer(["default"], 1).receive(1, 0) == []
    result.revoke()
    assert result.state is State.PENDING
    assert [delivery.id for delivery in shop.app.transport.consumer(["default"], 1).receive(1, 0)] == [result.id]


def test_what_was_handed_out_is_marked_for_the_workers(shop: Shop) -> None:
    shop.add.delay(1)
    shop.app.transport.consumer(["default"], 1).receive(1, 0)
    shop.app.revoke("id1", "never-seen", terminate=True)
    marks = shop.app.transport.buried(["id1", "never-seen"])  # type: ignore[attr-defined]
    assert marks == {"id1": "terminate", "never-seen": "terminate"}
    assert shop.app.result("id1").state is State.PENDING
    shop.clock.advance(300 * 86_400)
    assert shop.app.transport.buried(["id1"])  # type: ignore[attr-defined]


def test_dead_letters_are_sent_again_as_new_and_nothing_else_is_touched(shop: Shop) -> None:
    transport, backend = shop.app.transport, shop.app.backend
    shop.add.delay(1)
    (delivery,) = transport.consumer(["default"], 1).receive(1, 0)
    transport.settle([Settlement(delivery, Action.DEAD, (), "why")])
    transport.bury({"id1": "dead", "revoked": "revoked"}, shop.clock.time() + 1e6)  # type: ignore[attr-defined]
    kept = StoredResult("fine", State.SUCCESS, shop.app.codec.encode_result("fine", 3), None)
    backend.store([StoredResult("id1", State.FAILURE, b"", None), kept])
    assert shop.app.requeue_dead(["id1", "fine", "revoked", "nobody"]) == ["id1"]
    assert [message.id for message in shop.sent()] == ["id1"]
    assert shop.app.result("id1").state is State.PENDING
    assert shop.app.result("fine").get(timeout=0) == 3
    assert transport.buried(["id1", "revoked"]) == {"revoked": "revoked"}  # type: ignore[attr-defined]


def test_a_transport_that_cannot_remember_or_keep_says_so(shop: Shop) -> None:
    class Forgetful:
        context = shop.app.transport.context

    client = shop.app.connect().client
    client._transport = Forgetful()  # type: ignore[assignment]
    with pytest.raises(NotSupported, match="cannot remember revoked"):
        client.revoke(["id1"])
    with pytest.raises(NotSupported, match="keeps no dead letters"):
        client.requeue_dead(["id1"])


# --- the cost of a call ------------------------------------------------------------------------------------


def test_from_delay_to_the_transport_there_are_three_frames_at_most(shop: Shop) -> None:
    seen = []

    def send(_messages: Sequence[Outgoing]) -> None:
        frame, depth = sys._getframe(1), 0
        while frame.f_code is not test_from_delay_to_the_transport_there_are_three_frames_at_most.__code__:
            frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
        seen.append(depth)

    shop.app.transport.send = send  # type: ignore[method-assign]
    shop.add.delay(1)
    assert seen == [3]


def test_a_call_costs_forty_python_calls_at_most(shop: Shop) -> None:
    shop.add.delay(1)
    count = 0

    def profile(frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event == "call" and "/dray/" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        shop.add.delay(2)
    finally:
        sys.setprofile(None)
    assert 5 < count <= 40


def test_a_dataclass_travels_where_the_task_says_so() -> None:
    from tests.checked import Order, priced

    app = Dray(transport="memory", backend="memory")
    task = app.task(validate=True, name="priced")(priced)
    task.delay(Order("pear", 3))
    (message,) = app.transport.peek("default", 1)  # type: ignore[attr-defined]
    assert app.codec.decode_call(Delivery("default", message.id, message.body, message.headers, None)) == (
        [{"name": "pear", "count": 3}],
        {},
    )
    with pytest.raises(InvalidArguments):
        task.delay("pear")  # type: ignore[arg-type]
