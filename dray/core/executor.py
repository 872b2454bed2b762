"""One delivery -> one outcome: decode, check, run, encode. Whatever goes wrong becomes the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, NamedTuple

from dray.core import retry
from dray.core.clock import Clock, Random
from dray.core.codec import Codec, float_header, int_header
from dray.core.contracts import Slot
from dray.core.errors import (
    CodecError,
    DecodeError,
    InvalidArguments,
    InvalidName,
    SoftTimeLimitExceeded,
    TaskExpired,
    TaskRevoked,
    TooLarge,
    WorkerLost,
)
from dray.core.failure import brief, error_record, one_line
from dray.core.faults import Faults
from dray.core.hooks import Hooks
from dray.core.message import Action, Delivery, Outcome, Settlement, State, StoredResult
from dray.core.registry import Registry
from dray.core.request import Request, current_request
from dray.core.retry import Policy
from dray.core.task import Task, check_id, check_name

log = logging.getLogger(__name__)
CRASHES_MAX = 3
"""A task that killed its process this often is a poison message."""
UNKNOWN_PAUSE_S = 5.0


class Settings(NamedTuple):
    """What the executor takes from the configuration and the chosen plugins. Times in seconds."""

    keeps_results: bool
    result_max_bytes: int
    result_expires_s: float
    unknown_task_wait_s: float
    can_kill: bool
    """The pool ends tasks for certain; where it cannot, a hard limit is raised inside the task as a soft one is."""
    soft_time_limit: float | None = None
    time_limit: float | None = None
    track_started: bool = False
    ignore_result: bool = False


class _Call(NamedTuple):
    """A call that may be run."""

    task: Task[..., Any]
    args: Any
    kwargs: Mapping[str, Any]
    retries: int
    policy: Policy | None
    soft_s: float | None
    hard_s: float | None
    result_s: float | None
    """How long the result is kept; None: not at all."""
    track: bool
    began: float
    """When it was understood, monotonic seconds."""


class TaskExecutor:
    """Runs deliveries; any thread, any number at once. Survives ``fork`` (see :meth:`forked`).

    Responsibilities: verify and decode; find the task; refuse what cannot be understood (dead letter with a reason);
    run the function within its limits; decide on retries; encode results and errors; call the task hooks.
    """

    def __init__(
        self,
        registry: Registry,
        codec: Codec,
        settings: Settings,
        hooks: Hooks,
        clock: Clock,
        random: Random,
        faults: Faults | None,
    ) -> None:
        self._registry = registry
        self._codec = codec
        self._settings = settings
        self._hooks = hooks
        self._clock = clock
        self._random = random
        self._faults = faults
        self._none = codec.encode_result("", None) if codec.signer is None else None
        self._loops = threading.local()

    # --- the contract --------------------------------------------------------------------------------------

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        """The outcome of running it."""
        try:
            call = self._understand(delivery)
        except CodecError as error:
            return self._dead(delivery, error)
        except Exception as error:
            log.exception("task %s: could not be prepared", one_line(delivery.id))
            return self._dead(delivery, error)
        if isinstance(call, Outcome):
            return call
        token = current_request.set(self._request(delivery, call, slot))
        try:
            if call.track:
                slot.report(self._result(delivery.id, State.STARTED, None, call.result_s or 0.0))
            if self._faults is not None:
                self._faults.hit("running")
            try:
                slot.begin(call.task.name, call.soft_s, call.hard_s)
                value = call.task.fn(*call.args, **call.kwargs)
                if call.task.is_async:
                    value = self._run_coroutine(value)
            finally:
                slot.end()
            return self._succeeded(delivery, call, value)
        except BaseException as error:
            return self._raised(delivery, call, error)
        finally:
            current_request.reset(token)

    def lost(self, delivery: Delivery, error: Exception) -> Outcome:
        """The outcome of a run that the pool had to end, or whose process died."""
        try:
            if isinstance(error, TaskRevoked):
                return self.revoked(delivery)
            if isinstance(error, WorkerLost):
                self._codec.check(delivery)  # it may have died over verifying: then it gets no new signature
                crashes = int_header(delivery.headers, "crashes", 0) + 1
                if crashes < CRASHES_MAX:
                    again = self._codec.resend(delivery, {"crashes": str(crashes)})
                    return Outcome(Settlement(delivery, Action.ACK, (again,)), None)
                return self._dead(delivery, WorkerLost(f"poison: it killed its process {crashes} times; last: {error}"))
            call = self._understand(delivery)
        except Exception as problem:
            return self._dead(delivery, problem)
        return call if isinstance(call, Outcome) else self._raised(delivery, call, error)

    def revoked(self, delivery: Delivery) -> Outcome:
        """The outcome of a delivery that was revoked: never run."""
        result = None
        try:
            result_s = self._keeps(delivery.headers, self._registry.get(delivery.headers.get("task", "")))
            if result_s is not None:
                result = self._result(delivery.id, State.REVOKED, None, result_s)
        except CodecError as error:  # bad headers, or no key to sign the result with
            log.warning("task %s was revoked; its result cannot be kept: %s", one_line(delivery.id), error)
        return Outcome(Settlement(delivery, Action.ACK), result)

    def replayed(self, delivery: Delivery) -> Outcome:
        """The outcome of a copy of a message that has ended before: removed, its result left as it is."""
        return Outcome(Settlement(delivery, Action.ACK), None)

    def undeliverable(self, delivery: Delivery, reason: str) -> Outcome:
        """The outcome of a delivery that must not be tried again: a dead letter with this reason."""
        return self._dead(delivery, WorkerLost(reason))

    def forked(self) -> None:
        """In a new child: event loops do not survive a fork, and closing them here would disturb the parent's."""
        self._abandoned, self._loops = self._loops, threading.local()

    # --- before the function -------------------------------------------------------------------------------

    def _understand(self, delivery: Delivery) -> _Call | Outcome:
        """What to run; or the outcome of a message that is not to be run (now). Raises ``CodecError``."""
        headers = delivery.headers
        args, kwargs = self._codec.decode_call(delivery)
        task = self._registry.get(headers.get("task", ""))
        if task is None:
            return self._unknown(delivery)
        plain = len(headers) == 2  # only "task" and "type": nothing overrides the task's own options
        if not plain:
            expires = float_header(headers, "expires")
            if expires is not None and expires <= self._clock.time():
                return self._expired(delivery, task, expires)
        try:
            if task.validator is not None:
                args, kwargs = task.validator.load(tuple(args), kwargs)  # type: ignore[assignment]
            else:
                task.bind(args, kwargs)  # type: ignore[arg-type]
        except InvalidArguments as error:
            return self._dead(delivery, error)
        options, settings = task.task_options, self._settings
        soft = options.soft_time_limit or settings.soft_time_limit
        hard = options.time_limit or settings.time_limit
        track = settings.track_started if options.track_started is None else options.track_started
        policy, retries = task.policy, 0
        if not plain:
            soft = float_header(headers, "soft") or soft
            hard = float_header(headers, "hard") or hard
            retries = int_header(headers, "attempt", 0)
            track = headers["track"] == "1" if "track" in headers else track
            policy = Policy.loads(headers["retry"]) if "retry" in headers else policy
        if hard is not None and not settings.can_kill:
            soft = hard if soft is None else min(soft, hard)
        result_s = self._keeps(headers, task)
        track = track and result_s is not None
        return _Call(task, args, kwargs, retries, policy, soft, hard, result_s, track, self._clock.monotonic())

    def _unknown(self, delivery: Delivery) -> Outcome:
        name, now = delivery.headers.get("task", ""), self._clock.time()
        since = float_header(delivery.headers, "since")
        since = now if since is None or since > now else since  # a time to come would make it wait for ever
        check_name_of(delivery)
        if now - since < self._settings.unknown_task_wait_s:
            log.warning("task %s: %r is not known here, it waits%s", delivery.id, name, self._registry.hint(name))
            again = self._codec.resend(delivery, {"since": repr(since)}, now + UNKNOWN_PAUSE_S)
            return Outcome(Settlement(delivery, Action.ACK, (again,)), None)
        return self._dead(delivery, DecodeError(f"unknown task {name!r}{self._registry.hint(name)}"))

    def _expired(self, delivery: Delivery, task: Task[..., Any], expires: float) -> Outcome:
        error = TaskExpired(f"task {delivery.id} expired {self._clock.time() - expires:.1f} s before it could start")
        result_s = self._keeps(delivery.headers, task)
        if result_s is None:
            return self._dead(delivery, error)
        return Outcome(
            Settlement(delivery, Action.ACK), self._error_result(delivery.id, State.FAILURE, error, result_s)
        )

    def _keeps(self, headers: Mapping[str, str], task: Task[..., Any] | None) -> float | None:
        settings = self._settings
        if not settings.keeps_results:
            return None
        ignore, expires = settings.ignore_result, settings.result_expires_s
        if task is not None:
            options = task.task_options
            ignore = ignore if options.ignore_result is None else options.ignore_result
            if options.result_expires is not None:
                given = options.result_expires
                expires = given if isinstance(given, (int, float)) else given.total_seconds()
        ignore = headers["ignore"] == "1" if "ignore" in headers else ignore
        return None if ignore else float_header(headers, "rexp") or expires

    def _request(self, delivery: Delivery, call: _Call, slot: Slot) -> Request:
        headers = delivery.headers
        user = {k[2:]: v for k, v in headers.items() if k.startswith("x-")} if len(headers) > 2 else {}
        deadline = None if call.hard_s is None else self._clock.time() + call.hard_s
        report = _Progress(self, delivery.id, slot, call.result_s)
        if self._hooks.task_started is not None:
            self._hooks.task_started(
                task=call.task.name, id=delivery.id, queue=delivery.queue, attempt=call.retries, headers=user
            )
        return Request(
            delivery.id, call.task.name, delivery.queue, call.retries, delivery.delivery_count, deadline, user, report
        )

    # --- the function --------------------------------------------------------------------------------------

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it on this thread's own event loop. An exception from outside (a soft limit) cancels it first."""
        own = getattr(self._loops, "own", None)
        if own is None:
            own = self._loops.own = _OwnLoop()
        loop = own.loop
        running = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(running)
        except BaseException:
            if not running.done():  # raised into the loop, not by the coroutine
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    return loop.run_until_complete(running)
            raise
        finally:
            if left := asyncio.all_tasks(loop):  # what it started and did not wait for must not run into the next task
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    # --- after the function --------------------------------------------------------------------------------

    def _succeeded(self, delivery: Delivery, call: _Call, value: Any) -> Outcome:
        if call.task.validator is not None:
            value = call.task.validator.dump_return(value)
        result = None
        if call.result_s is not None:
            result = self._result(delivery.id, State.SUCCESS, value, call.result_s)
            if len(result.body) > self._settings.result_max_bytes:
                raise TooLarge(
                    f"the result of {call.task.name} is {len(result.body)} bytes, the result back end takes "
                    f"{self._settings.result_max_bytes}: store it elsewhere and return where it is"
                )
        if self._faults is not None:
            self._faults.hit("encoded")
        if self._hooks.task_succeeded is not None:
            self._hooks.task_succeeded(**_about(delivery, call), duration_s=self._clock.monotonic() - call.began)
        return Outcome(Settlement(delivery, Action.ACK), result)

    def _raised(self, delivery: Delivery, call: _Call, error: BaseException) -> Outcome:
        if isinstance(error, SoftTimeLimitExceeded) and not error.args:  # raised into a thread, which gives it no text
            error.args = (f"the soft time limit of {call.soft_s:g} s of {call.task.name} is over",)
        try:
            hopeless = isinstance(error, (CodecError, TooLarge))  # the same value would come out again
            delay_s = None if hopeless else retry.decide(call.policy, call.retries, error, self._random)
            if delay_s is not None:
                return self._again(delivery, call, error, delay_s)
        except BaseException as problem:  # the user's wait function, or no key to sign the retry with
            log.exception("task %s: its retry could not be decided", delivery.id)
            problem.__context__ = error
            error = problem
        if self._hooks.task_failed is not None:
            duration_s = self._clock.monotonic() - call.began
            self._hooks.task_failed(**_about(delivery, call), duration_s=duration_s, error=error)
        return self._dead(delivery, error, call.result_s)

    def _again(self, delivery: Delivery, call: _Call, error: BaseException, delay_s: float) -> Outcome:
        not_before = self._clock.time() + delay_s if delay_s > 0 else None
        again = self._codec.resend(delivery, {"attempt": str(call.retries + 1)}, not_before)
        if self._hooks.task_retried is not None:
            duration_s = self._clock.monotonic() - call.began
            self._hooks.task_retried(**_about(delivery, call), duration_s=duration_s, delay_s=delay_s, error=error)
        result = None
        if call.result_s is not None:
            result = self._error_result(delivery.id, State.RETRY, error, call.result_s + delay_s)
        log.info(
            "task %s (%s): retry %d in %.1f s: %s", delivery.id, call.task.name, call.retries + 1, delay_s, brief(error)
        )
        return Outcome(Settlement(delivery, Action.ACK, (again,)), result)

    def _dead(self, delivery: Delivery, error: BaseException, result_s: float | None = -1.0) -> Outcome:
        """The end of a message that did not succeed: kept as a dead letter, and as a result where results are kept."""
        reason = brief(error)
        name = delivery.headers.get("task", "")
        if result_s == -1.0:
            result_s = self._settings.result_expires_s if self._settings.keeps_results else None
        try:
            result = None if result_s is None else self._error_result(delivery.id, State.FAILURE, error, result_s)
        except CodecError as problem:  # no key to sign it with: the dead letter still tells
            result = None
            log.warning("task %s: its failure cannot be kept as a result: %s", one_line(delivery.id), problem)
        if self._hooks.task_dead is not None:
            self._hooks.task_dead(
                task=name, id=delivery.id, queue=delivery.queue, attempt=attempt_of(delivery), reason=reason
            )
        trace = "" if result is not None or error.__traceback__ is None else f"\n{error_record(error)['traceback']}"
        log.error("task %s (%s) is dead: %s%s", one_line(delivery.id), one_line(name), reason, trace)
        return Outcome(Settlement(delivery, Action.DEAD, (), reason), result)

    def _result(self, task_id: str, state: State, value: Any, keep_s: float) -> StoredResult:
        body = self._none if value is None else None
        if body is None:
            body = self._codec.encode_result(task_id, value, state)
        return StoredResult(task_id, state, body, self._clock.time() + keep_s)

    def _error_result(self, task_id: str, state: State, error: BaseException, keep_s: float) -> StoredResult:
        record = error_record(error)
        try:
            result = self._result(task_id, state, record, keep_s)
        except CodecError:  # arguments of the exception that are not plain data
            result = self._result(task_id, state, {**record, "args": None}, keep_s)
        if len(result.body) > self._settings.result_max_bytes:
            result = self._result(task_id, state, {**record, "args": None, "message": record["message"][:1000]}, keep_s)
        return result


class _OwnLoop:
    """One thread's event loop; closed when the thread ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def __del__(self) -> None:
        self.loop.close()


class _Progress:
    """Reports a running task's progress, at most ten times a second."""

    __slots__ = ("_executor", "_id", "_last_s", "_result_s", "_slot")

    def __init__(self, executor: TaskExecutor, task_id: str, slot: Slot, result_s: float | None) -> None:
        self._executor = executor
        self._id = task_id
        self._slot = slot
        self._result_s = result_s
        self._last_s = 0.0

    def __call__(self, note: Mapping[str, Any]) -> None:
        if self._result_s is None:
            return
        now = self._executor._clock.monotonic()  # noqa: SLF001
        if now - self._last_s < 0.1 and note["done"] != note["total"]:
            return
        self._last_s = now
        self._slot.report(self._executor._result(self._id, State.STARTED, note, self._result_s))  # noqa: SLF001


def check_name_of(delivery: Delivery) -> None:
    """Raises ``DecodeError`` for a message whose id or task name nobody could have given through dray."""
    try:
        check_id(delivery.id)
        check_name("task", delivery.headers.get("task", ""))
    except InvalidName as error:
        raise DecodeError(str(error)) from None


def _about(delivery: Delivery, call: _Call) -> dict[str, Any]:
    return {"task": call.task.name, "id": delivery.id, "queue": delivery.queue, "attempt": call.retries}


def attempt_of(delivery: Delivery) -> int:
    """Retries so far; 0 where the header makes no sense."""
    try:
        return int_header(delivery.headers, "attempt", 0)
    except DecodeError:
        return 0
