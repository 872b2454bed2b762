"""The caller's side: a call becomes a message, the transport confirms it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from dray.core.clock import Clock, Ids
from dray.core.codec import Codec
from dray.core.contracts import DeadLetters, ResultBackend, Tombstones, Transport
from dray.core.errors import CodecError, ConfigError, NotSupported, PublishUncertain, SendError, Unavailable, Uncertain
from dray.core.fallback import Fallback
from dray.core.faults import Faults
from dray.core.hooks import Hooks
from dray.core.message import Delivery, Outgoing
from dray.core.result import AsyncResult, GroupResult, Results
from dray.core.retry import Policy
from dray.core.task import NO_OPTIONS, CallOptions, Signature, Task, check_user_headers

log = logging.getLogger(__name__)
SLICE = 500
"""Messages per ``Transport.send`` of a long batch: bounds memory, and what an error leaves unknown. More: no faster."""


class Client:
    """Encodes, routes and sends calls; revokes them. Any thread; one per process (never used across a fork)."""

    def __init__(
        self,
        *,
        transport: Transport,
        backend: ResultBackend,
        codec: Codec,
        results: Results,
        fallback: Fallback,
        route: Callable[[str], str],
        hooks: Hooks,
        clock: Clock,
        ids: Ids,
        faults: Faults | None,
        result_expires_s: float,
    ) -> None:
        self._transport = transport
        self._backend = backend
        self._codec = codec
        self._results = results
        self._fallback = fallback
        self._route = route
        self._hooks = hooks
        self._clock = clock
        self._new_id = ids.new
        self._faults = faults
        self._result_expires_s = result_expires_s
        self._plain: dict[Task[..., Any], tuple[str, Mapping[str, str], int]] = {}

    def use_ids(self, ids: Ids) -> None:
        """Take new ids from there from now on."""
        self._new_id = ids.new

    def send(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]:
        """Send one call; see ``Task.delay``."""
        message = self._message(task, args, kwargs, options)
        if self._faults is not None:
            self._faults.hit("before_publish")
        try:
            self._transport.send((message,))
            if self._faults is not None:
                self._faults.hit("confirmed")
        except Uncertain as error:
            raise _uncertain(message.id, error) from error
        return AsyncResult(message.id, self._results, self, _ignored(task, options))

    async def asend(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]:
        """:meth:`send` from a coroutine."""
        return await asyncio.to_thread(self.send, task, args, kwargs, options)

    def send_many(self, calls: Iterable[Signature]) -> GroupResult[Any]:
        """Send calls in slices, each confirmed as a whole; memory stays bounded however many there are.

        When a slice fails, ``SendError.unsent`` holds its unsent messages; slices after it were not begun, those before
        it were sent. ``PublishUncertain.task_id`` is the first id of an unconfirmed slice.
        """
        ids: list[str] = []
        calls = iter(calls)
        ignored = False
        while True:
            try:
                batch = list(itertools.islice(calls, SLICE))
                messages = [self._message(*_signature(call)) for call in batch]
            except Exception as error:
                if ids:
                    error.add_note(f"{len(ids)} calls before this one were sent")
                raise
            if not messages:
                return GroupResult(ids, self._results, self, ignored)
            ignored = ignored or any(_ignored(call.task, call.options) for call in batch)
            try:
                if self._faults is not None:
                    self._faults.hit("before_publish")
                self._transport.send(messages)
                if self._faults is not None:
                    self._faults.hit("confirmed")
            except Uncertain as error:
                raise _uncertain(messages[0].id, error) from error
            except Unavailable as error:
                unsent = error.unsent if isinstance(error, SendError) else messages
                raise SendError(f"{len(ids)} calls were sent before: {error}", unsent) from error
            ids.extend([message.id for message in messages])

    def revoke(self, ids: Iterable[str], *, terminate: bool = False) -> None:
        """Cancel tasks: what has not started never starts, also after every worker restarted (promise G7).

        The fact is stored in the transport for a year. A worker that meets the task settles it, with the state REVOKED;
        one that is delayed becomes due for that. ``terminate``: what runs is ended, on pools that can.
        Raises ``NotSupported`` when the transport cannot remember.
        """
        transport, ids = self._transport, list(ids)
        if not isinstance(transport, Tombstones):
            raise NotSupported(f"the transport {transport.context.name!r} cannot remember revoked tasks")
        mark = "terminate" if terminate else "revoked"
        transport.bury(dict.fromkeys(ids, mark), self._clock.time() + 366 * 86400, hasten=True)

    def requeue_dead(self, ids: Iterable[str]) -> list[str]:
        """Send dead letters again, as new: all retries and deliveries before them, no expiry, results forgotten.

        Returns the ids that were sent; a letter that is not genuine (signatures are on, and it has none of ours) stays
        where it is. Sent first, purged second: when it fails in between, a letter may be sent twice. Raises
        ``NotSupported`` when the transport keeps none.
        """
        transport = self._transport
        if not isinstance(transport, DeadLetters):
            raise NotSupported(f"the transport {transport.context.name!r} keeps no dead letters of its own")
        messages: dict[str, Outgoing] = {}
        for letter in transport.dead_get(list(ids)):
            delivery = Delivery(letter.queue, letter.id, letter.body, letter.headers, None)
            try:
                messages[letter.id] = self._codec.renew(delivery)
            except CodecError as error:
                log.warning("dead letter %r stays: %s", letter.id[:255], error)
        found = list(messages)
        if found and self._backend.features.keeps:
            self._backend.delete(found)  # a terminal result would win over the new run's
        if found and isinstance(transport, Tombstones):
            transport.exhume(found)
        transport.send([self._fallback.outgoing(message) for message in messages.values()])
        transport.dead_purge(found)
        return found

    # --- a call becomes a message --------------------------------------------------------------------------

    def _message(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> Outgoing:
        task.bind(args, kwargs)
        if task.validator is not None:
            args, kwargs = task.validator.dump(args, kwargs)
        plain = self._plain.get(task)
        if plain is None:
            plain = self._plain[task] = self._defaults(task)
        queue, headers, priority = plain
        task_id = options.task_id or self._new_id()
        if options is NO_OPTIONS and task.task_options.expires is None and self._hooks.enqueue is None:
            sealed, body = self._codec.encode_call(
                headers, queue, task_id, (args, kwargs), task.task_options.compression
            )
            message = Outgoing(queue, task_id, body, sealed, priority)
            return message if self._fallback.native else self._fallback.outgoing(message)
        return self._with_options(task, (args, kwargs), options, task_id)

    def _with_options(
        self, task: Task[..., Any], arguments: tuple[Any, Any], options: CallOptions, task_id: str
    ) -> Outgoing:
        queue, defaults, priority = self._plain[task]
        queue = options.queue or queue
        headers, now = dict(defaults), self._clock.time()
        not_before = expires_at = None
        if options.eta is not None:
            not_before = _moment(options.eta, "eta")
        elif options.countdown is not None:
            not_before = now + _seconds(options.countdown, "countdown")
        expires = options.expires if options.expires is not None else task.task_options.expires
        if expires is not None:
            expires_at = (
                _moment(expires, "expires") if isinstance(expires, datetime) else now + _seconds(expires, "expires")
            )
        if options.priority is not None:
            priority = options.priority
            headers.pop("prio", None)
        _put(headers, "eta", not_before)
        _put(headers, "expires", expires_at)
        _put(headers, "prio", priority or None)
        _put(headers, "soft", options.soft_time_limit)
        _put(headers, "hard", options.time_limit)
        _put(headers, "ignore", None if options.ignore_result is None else int(options.ignore_result))
        _put(headers, "track", None if options.track_started is None else int(options.track_started))
        if options.result_expires is not None:
            headers["rexp"] = repr(_seconds(options.result_expires, "result_expires"))
        if options.retry is not None:
            headers["retry"] = Policy.of(options.retry, task.policy).dumps()
        if options.serializer is not None:
            headers["type"] = options.serializer
        if options.headers:
            headers.update(check_user_headers(options.headers))
        if self._hooks.enqueue is not None:
            self._hooks.enqueue(task=task.name, id=task_id, queue=queue, headers=headers, not_before=not_before)
        compression = options.compression or task.task_options.compression
        sealed, body = self._codec.encode_call(headers, queue, task_id, arguments, compression)
        message = Outgoing(queue, task_id, body, sealed, priority, not_before, expires_at)
        return self._fallback.outgoing(message)

    def _defaults(self, task: Task[..., Any]) -> tuple[str, Mapping[str, str], int]:
        options = task.task_options
        headers = {"task": task.name, "type": options.serializer or self._codec.type, **task.user_headers}
        if options.priority:
            headers["prio"] = str(options.priority)
        return options.queue or self._route(task.name), headers, options.priority


def _signature(call: object) -> Signature:
    if not isinstance(call, Signature):
        raise ConfigError(f"send_many takes calls that are bound: task.s(arguments), not {call!r}"[:200])
    return call


def _ignored(task: Task[..., Any], options: CallOptions) -> bool:
    return bool(task.task_options.ignore_result if options.ignore_result is None else options.ignore_result)


def _uncertain(task_id: str, error: Uncertain) -> PublishUncertain:
    return PublishUncertain(
        f"task {task_id} may or may not be queued ({error}); call again with task_id={task_id!r}: it is safe", task_id
    )


def _put(headers: dict[str, str], key: str, value: float | None) -> None:
    if value is not None:
        headers[key] = repr(value)


def _seconds(value: float | timedelta, name: str) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not abs(seconds) < 1e11:
        raise ConfigError(f"{name}={value!r}: a number of seconds, or a timedelta")
    return float(seconds)


def _moment(value: datetime | float, name: str) -> float:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ConfigError(f"{name}={value!r}: a datetime without a time zone; use datetime.now(timezone.utc) + ...")
        return value.timestamp()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 253402300800:
        raise ConfigError(f"{name}={value!r}: an aware datetime, or seconds since the epoch up to the year 9999")
    return float(value)
