"""The result back end that keeps each result in a queue of its own on RabbitMQ. Slow, and heavy for the broker."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures, Seconds
from dray.core.errors import ConfigError, Unavailable
from dray.core.message import TERMINAL, StoredResult
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_errors import PRECONDITION_FAILED, Refused
from dray.plugins._rabbitmq_publisher import Publisher
from dray.plugins._rabbitmq_results import MAX_BODY_BYTES, BrokerOptions, check_size, parcel, result_of

_NAME_BYTES_MAX = 200
_TURNS, _TURN_S = 20, 0.25
"""How often and how long to wait for another process to have read. Two that wait for each other both let go."""
_PAUSE_S = 0.005
_CALLS = 200
"""Declarations that are on their way at once."""


class AmqpBackend(ResultBackend):
    """Two queues per task: one takes its first terminal state and no other, one its last interim state.

    - reading puts the message back, so that any number of callers can read it, any number of times; they take turns
      (a single active consumer), because a message that is out makes room for one that came too late
    - the broker deletes a queue that nobody has written to or asked for during ``expires``; each result ends when its
      own time is over, if that is sooner
    - a wait asks again and again; each task costs the broker two queues, some 100 KB of its memory, and each question
      several round trips: choose it to keep what another system reads from such queues, not for speed
    """

    api: ClassVar[int] = 1
    features = ResultFeatures(durability=Durability.D2, max_body_bytes=MAX_BODY_BYTES)

    @dataclass(frozen=True, slots=True)
    class Options(BrokerOptions):
        """``url`` and the rest as of the transport."""

        durable: bool = True
        """False: results are lost when the broker ends, and cost it less."""
        expires: Seconds = 86400.0
        """How long queues are kept; at least as long as ``result_expires``. The same for all processes."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        if not 0 < options.expires < 2**32 / 1000:
            raise ConfigError(f"amqp: expires must be more than 0 and less than 49 days, not {options.expires:g} s")
        if not options.durable:
            self.features = replace(self.features, durability=Durability.D1)
        self._dialer = options.dialer(context, "results")
        self._publisher = Publisher(self._dialer)
        self._lock = threading.Lock()  # one reads, or changes a queue
        self._channel: Channel | None = None

    def open(self) -> None:
        self._dialer.open()
        self._dialer.link()

    def close(self) -> None:
        self._dialer.close()

    # --- the contract --------------------------------------------------------------------------------------

    def store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            check_size(result, "amqp")
        if not results:
            return
        places = [self._place(result.id, result.state in TERMINAL) for result in results]
        with self._lock:
            self._declare(dict.fromkeys(places))
        parcels = [parcel("", name, result) for (name, _), result in zip(places, results, strict=True)]
        left = self._publisher.publish(parcels)
        if left:  # a terminal one is there; it may be over
            there = self._read({places[at]: results[at].id for at in left})
            self._publisher.publish([parcels[at] for at in left if results[at].id not in there])

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        found: dict[str, StoredResult] = {}
        # Terminal states again, because another process may have been about to put one back.
        for is_terminal, pause_s in ((True, 0.0), (False, 0.0), (True, _PAUSE_S), (True, _PAUSE_S)):
            left = [id_ for id_ in dict.fromkeys(ids) if id_ not in found or found[id_].state not in TERMINAL]
            if not left:
                break
            threading.Event().wait(pause_s)
            found |= self._read({self._place(id_, is_terminal): id_ for id_ in left})
        return found

    def delete(self, ids: Sequence[str]) -> None:
        places = [self._place(id_, is_terminal) for id_ in ids for is_terminal in (True, False)]
        with self._lock:
            self._calls([("queue_delete", {"queue": name}) for name, _ in places])

    # --- queues --------------------------------------------------------------------------------------------

    def _place(self, task_id: str, is_terminal: bool) -> tuple[str, bool]:
        if len(task_id.encode()) > _NAME_BYTES_MAX:
            task_id = hashlib.blake2b(task_id.encode()).hexdigest()
        return f"{self.options.prefix}.{'result' if is_terminal else 'state'}.{task_id}", is_terminal

    def _declare(self, places: Iterable[tuple[str, bool]]) -> list[bool]:
        """Make sure that these exist; whether there is a message in them, be it that another process reads it now."""
        calls = []
        for name, is_terminal in places:
            arguments = {
                "x-expires": round(self.options.expires * 1000),
                "x-max-length": 1,
                "x-overflow": "reject-publish" if is_terminal else "drop-head",
                "x-single-active-consumer": True,
            }
            calls.append(("queue_declare", {"queue": name, "durable": self.options.durable, "arguments": arguments}))
        return [bool(frame.method.message_count or frame.method.consumer_count) for frame in self._calls(calls)]

    def _read(self, places: dict[tuple[str, bool], str]) -> dict[str, StoredResult]:
        """What is in these, by id."""
        found: dict[str, StoredResult] = {}
        with self._lock:
            has_message = self._declare(places)
            names = [place[0] for place, has in zip(places, has_message, strict=True) if has]
            for _ in range(_TURNS):
                if not names:
                    break
                seen = self._take_a_look(names)
                found |= {result.id: result for result in seen.values() if result is not None}
                names = [name for name in names if name not in seen]
        return found

    def _take_a_look(self, names: Sequence[str]) -> dict[str, StoredResult | None]:
        """The first message of each queue, None for one that is over or no result; without those that others have.

        Closing the channel puts everything back in its place and lets the next one look.
        """
        seen: dict[str, StoredResult | None] = {}
        complete, closed = threading.Event(), threading.Event()

        def on_close(_: Exception) -> None:
            closed.set()
            complete.set()

        channel = self._dialer.link().channel(on_close=on_close)
        now = self.context.clock.time()

        def taker(name: str) -> Callable[[Any, Any, Any, bytes], None]:
            def take(pika: Any, method: Any, properties: Any, body: bytes) -> None:
                result = result_of(properties, body)
                if result is not None and result.expires_at is not None and result.expires_at <= now:
                    pika.basic_ack(method.delivery_tag)
                    result = None
                seen[name] = result
                if len(seen) == len(names):
                    complete.set()

            return take

        try:
            channel.call("basic_qos", prefetch_count=1)
            channel.calls([("basic_consume", {"queue": name, "on_message_callback": taker(name)}) for name in names])
            complete.wait(_TURN_S)
            if not channel.is_open:
                raise Unavailable(f"amqp: the connection was lost: {channel.error}")
        finally:
            channel.close()
            closed.wait(_TURN_S)
        return dict(seen)

    # --- the broker ----------------------------------------------------------------------------------------

    def _ready(self) -> Channel:
        if self._channel is None or not self._channel.is_open:
            self._channel = self._dialer.link().channel()
        return self._channel

    def _calls(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
        answers = []
        try:
            for at in range(0, len(calls), _CALLS):
                answers += self._ready().calls(calls[at : at + _CALLS])
        except Refused as error:
            if error.code == PRECONDITION_FAILED:
                raise ConfigError(
                    f"amqp: {error.text}. The queue was made with another 'expires' or 'durable': set the same in all "
                    "processes, or another prefix"
                ) from error
            raise
        return answers
