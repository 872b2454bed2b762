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
from dray.core.message import Action, Delivery, Outcome, Settlement, State, StoredResult, acknowledged
from dray.core.registry import Registry
from dray.core.request import Request, current_run
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


class _Terms(NamedTuple):
    """On what terms a call is run: what the configuration, the task and the message's headers say together."""

    retries: int
    policy: Policy | None
    soft_s: float | None
    hard_s: float | None
    result_s: float | None
    """How long the result is kept; None: not at all."""
    track: bool


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
        self.clock = clock
        self._random = random
        self._faults = faults
        self._none = codec.encode_result("", None) if codec.signer is None else None
        self._loops = threading.local()
        self._usual: dict[Task[..., Any], _Terms] = {}

    # --- the contract --------------------------------------------------------------------------------------

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        """The outcome of running it."""
        try:
            call = self._understand(delivery, slot)
        except CodecError as error:
            return self._dead(delivery, error)
        except Exception as error:
            log.exception("task %s: could not be prepared", one_line(delivery.id))
            return self._dead(delivery, error)
        if isinstance(call, Outcome):
            return call
        task, terms = call.task, call.terms
        token = current_run.set(call)
        try:
            if self._hooks.task_started is not None:
                self._hooks.task_started(**_about(call), headers=call.request.headers)
            if terms.track:
                slot.report(self.result(delivery.id, State.STARTED, None, terms.result_s or 0.0))
            if self._faults is not None:
                self._faults.hit("running")
            try:
                slot.begin(task.name, terms.soft_s, terms.hard_s)
                value = task.fn(*call.args, **call.kwargs)
                if task.is_async:
                    value = self._run_coroutine(value)
            finally:
                slot.end()
            return self._succeeded(call, value)
        except BaseException as error:
            return self._raised(call, error)
        finally:
            current_run.reset(token)

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
            call = self._understand(delivery, None)
        except Exception as problem:
            return self._dead(delivery, problem)
        return call if isinstance(call, Outcome) else self._raised(call, error)

    def revoked(self, delivery: Delivery) -> Outcome:
        """The outcome of a delivery that was revoked: never run."""
        result = None
        try:
            result_s = self._keeps(delivery.headers, self._registry.get(delivery.headers.get("task", "")))
            if result_s is not None:
                result = self.result(delivery.id, State.REVOKED, None, result_s)
        except CodecError as error:  # bad headers, or no key to sign the result with
            log.warning("task %s was revoked; its result cannot be kept: %s", one_line(delivery.id), error)
        return acknowledged(delivery, result)

    def replayed(self, delivery: Delivery) -> Outcome:
        """The outcome of a copy of a message that has ended before: removed, its result left as it is."""
        return acknowledged(delivery)

    def undeliverable(self, delivery: Delivery, reason: str) -> Outcome:
        """The outcome of a delivery that must not be tried again: a dead letter with this reason."""
        return self._dead(delivery, WorkerLost(reason))

    def forked(self) -> None:
        """In a new child: event loops do not survive a fork, and closing them here would disturb the parent's."""
        self._abandoned, self._loops = self._loops, threading.local()

    # --- before the function -------------------------------------------------------------------------------

    def _understand(self, delivery: Delivery, slot: Slot | None) -> _Call | Outcome:
        """What to run; or the outcome of a message that is not to be run (now). Raises ``CodecError``."""
        headers = delivery.headers
        args, kwargs = self._codec.decode_call(delivery)
        task = self._registry.get(headers.get("task", ""))
        if task is None:
            return self._unknown(delivery)
        plain = len(headers) == 2  # only "task" and "type": nothing overrides what is usual for the task
        if not plain:
            expires = float_header(headers, "expires")
            if expires is not None and expires <= self.clock.time():
                return self._expired(delivery, task, expires)
        try:
            if task.validator is not None:
                args, kwargs = task.validator.load(tuple(args), kwargs)  # type: ignore[assignment]
            else:
                task.bind(args, kwargs)  # type: ignore[arg-type]
        except InvalidArguments as error:
            return self._dead(delivery, error)
        terms = self._usual.get(task) if plain else None
        if terms is None:
            terms = self._terms(task, headers)
            if plain:
                self._usual[task] = terms
        return _Call(self, delivery, slot, task, args, kwargs, terms)

    def _terms(self, task: Task[..., Any], headers: Mapping[str, str]) -> _Terms:
        options, settings = task.task_options, self._settings
        soft = float_header(headers, "soft") or options.soft_time_limit or settings.soft_time_limit
        hard = float_header(headers, "hard") or options.time_limit or settings.time_limit
        if hard is not None and not settings.can_kill:
            soft = hard if soft is None else min(soft, hard)
        retries = int_header(headers, "attempt", 0)
        policy = Policy.loads(headers["retry"]) if "retry" in headers else task.policy
        track = settings.track_started if options.track_started is None else options.track_started
        track = headers["track"] == "1" if "track" in headers else track
        result_s = self._keeps(headers, task)
        return _Terms(retries, policy, soft, hard, result_s, track and result_s is not None)

    def _unknown(self, delivery: Delivery) -> Outcome:
        name, now = delivery.headers.get("task", ""), self.clock.time()
        since = float_header(delivery.headers, "since")
        since = now if since is None or since > now else since  # a time to come would make it wait for ever
        check_name_of(delivery)
        if now - since < self._settings.unknown_task_wait_s:
            log.warning("task %s: %r is not known here, it waits%s", delivery.id, name, self._registry.hint(name))
            again = self._codec.resend(delivery, {"since": repr(since)}, now + UNKNOWN_PAUSE_S)
            return Outcome(Settlement(delivery, Action.ACK, (again,)), None)
        return self._dead(delivery, DecodeError(f"unknown task {name!r}{self._registry.hint(name)}"))

    def _expired(self, delivery: Delivery, task: Task[..., Any], expires: float) -> Outcome:
        error = TaskExpired(f"task {delivery.id} expired {self.clock.time() - expires:.1f} s before it could start")
        result_s = self._keeps(delivery.headers, task)
        if result_s is None:
            return self._dead(delivery, error)
        return acknowledged(delivery, self._error_result(delivery.id, State.FAILURE, error, result_s))

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

    def _succeeded(self, call: _Call, value: Any) -> Outcome:
        if call.task.validator is not None:
            value = call.task.validator.dump_return(value)
        result, keep_s = None, call.terms.result_s
        if keep_s is not None:
            result = self.result(call.delivery.id, State.SUCCESS, value, keep_s)
            if len(result.body) > self._settings.result_max_bytes:
                raise TooLarge(
                    f"the result of {call.task.name} is {len(result.body)} bytes, the result back end takes "
                    f"{self._settings.result_max_bytes}: store it elsewhere and return where it is"
                )
        if self._faults is not None:
            self._faults.hit("encoded")
        if self._hooks.task_succeeded is not None:
            self._hooks.task_succeeded(**_about(call), duration_s=self.clock.monotonic() - call.began)
        return acknowledged(call.delivery, result)

    def _raised(self, call: _Call, error: BaseException) -> Outcome:
        terms = call.terms
        if isinstance(error, SoftTimeLimitExceeded) and not error.args:  # raised into a thread, which gives it no text
            error.args = (f"the soft time limit of {terms.soft_s:g} s of {call.task.name} is over",)
        try:
            hopeless = isinstance(error, (CodecError, TooLarge))  # the same value would come out again
            delay_s = None if hopeless else retry.decide(terms.policy, terms.retries, error, self._random)
            if delay_s is not None:
                return self._again(call, error, delay_s)
        except BaseException as problem:  # the user's wait function, or no key to sign the retry with
            log.exception("task %s: its retry could not be decided", call.delivery.id)
            problem.__context__ = error
            error = problem
        if self._hooks.task_failed is not None:
            duration_s = self.clock.monotonic() - call.began
            self._hooks.task_failed(**_about(call), duration_s=duration_s, error=error)
        return self._dead(call.delivery, error, terms.result_s)

    def _again(self, call: _Call, error: BaseException, delay_s: float) -> Outcome:
        delivery, terms = call.delivery, call.terms
        not_before = self.clock.time() + delay_s if delay_s > 0 else None
        again = self._codec.resend(delivery, {"attempt": str(terms.retries + 1)}, not_before)
        if self._hooks.task_retried is not None:
            duration_s = self.clock.monotonic() - call.began
            self._hooks.task_retried(**_about(call), duration_s=duration_s, delay_s=delay_s, error=error)
        result = None
        if terms.result_s is not None:
            result = self._error_result(delivery.id, State.RETRY, error, terms.result_s + delay_s)
        log.info(
            "task %s (%s): retry %d in %.1f s: %s",
            delivery.id, call.task.name, terms.retries + 1, delay_s, brief(error),
        )  # fmt: skip
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

    def result(self, task_id: str, state: State, value: Any, keep_s: float) -> StoredResult:
        """What is stored of a task. Raises ``CodecError``."""
        body = self._none if value is None else None
        if body is None:
            body = self._codec.encode_result(task_id, value, state)
        return StoredResult(task_id, state, body, self.clock.time() + keep_s)

    def _error_result(self, task_id: str, state: State, error: BaseException, keep_s: float) -> StoredResult:
        record = error_record(error)
        try:
            result = self.result(task_id, state, record, keep_s)
        except CodecError:  # arguments of the exception that are not plain data
            result = self.result(task_id, state, {**record, "args": None}, keep_s)
        if len(result.body) > self._settings.result_max_bytes:
            result = self.result(task_id, state, {**record, "args": None, "message": record["message"][:1000]}, keep_s)
        return result


class _OwnLoop:
    """One thread's event loop; closed when the thread ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def __del__(self) -> None:
        self.loop.close()


class _Call:
    """A call that is understood and may be run; in the task's context while it does."""

    _request: Request | None = None
    _reported_s = 0.0

    def __init__(
        self,
        executor: TaskExecutor,
        delivery: Delivery,
        slot: Slot | None,
        task: Task[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        terms: _Terms,
    ) -> None:
        self._executor = executor
        self.delivery = delivery
        self._slot = slot
        self.task = task
        self.args = args
        self.kwargs = kwargs
        self.terms = terms
        self.began = executor.clock.monotonic()
        """When it was understood, monotonic seconds."""

    @property
    def request(self) -> Request:
        """What the task can know of itself."""
        if self._request is None:
            (queue, key, _, headers, _, count, _), terms = self.delivery, self.terms
            user = {name[2:]: value for name, value in headers.items() if name.startswith("x-")}
            deadline, clock = None, self._executor.clock
            if terms.hard_s is not None:
                deadline = clock.time() + terms.hard_s - (clock.monotonic() - self.began)
            self._request = Request(key, self.task.name, queue, terms.retries, count, deadline, user, self._report)
        return self._request

    def _report(self, note: Mapping[str, Any]) -> None:
        """Progress; ten times a second at most."""
        keep_s, now = self.terms.result_s, self._executor.clock.monotonic()
        if keep_s is None or self._slot is None:
            return
        if now - self._reported_s < 0.1 and note["done"] != note["total"]:
            return
        self._reported_s = now
        self._slot.report(self._executor.result(self.delivery.id, State.STARTED, note, keep_s))


def check_name_of(delivery: Delivery) -> None:
    """Raises ``DecodeError`` for a message whose id or task name nobody could have given through dray."""
    try:
        check_id(delivery.id)
        check_name("task", delivery.headers.get("task", ""))
    except InvalidName as error:
        raise DecodeError(str(error)) from None


def _about(call: _Call) -> dict[str, Any]:
    delivery = call.delivery
    return {"task": call.task.name, "id": delivery.id, "queue": delivery.queue, "attempt": call.terms.retries}


def attempt_of(delivery: Delivery) -> int:
    """Retries so far; 0 where the header makes no sense."""
    try:
        return int_header(delivery.headers, "attempt", 0)
    except DecodeError:
        return 0
