"""Tombstones in RabbitMQ, which keeps no keys: durable logs (streams) that every process reads."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.core.contracts import PluginContext
from dray.core.errors import NotSupported, Unavailable, Uncertain
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_errors import PRECONDITION_FAILED, Refused
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_marks import Marks
from dray.plugins._rabbitmq_publisher import Parcel, Publisher

_DAYS = (8, 400)
"""What the logs keep, in days: replays of signed tasks by the thousand go into the first, revocations into the last."""
_SEGMENT_BYTES = 16 * 2**20
"""The broker lets go of whole segments only."""
_IDS_MAX = 1000
"""Ids in a record."""
_PREFETCH = 500
_NOT_IMPLEMENTED = 540
_QUIET_S = 2.0
"""A log that says nothing for so long has been read to its end, when no marker can be written to prove it."""
_SWEEP_S = 60.0
_FIRST_PAUSES_S = (0.1, 0.5, 2.0)


@dataclass(slots=True)
class _Log:
    """One stream, what it says, and how far it was read."""

    name: str
    days: int
    marks: Marks
    next_offset: int = 0
    """0: from the beginning."""


class Tombstones:
    """Remembers buried ids: see :class:`~dray.core.contracts.Tombstones`. Any thread.

    - writes each fact into a log (confirmed); ``exhume`` is one more fact, after which the earlier ones do not count
    - reads the logs from their beginning when it is first asked, then follows them: ``buried`` answers from memory
    - answers only when it has read to the end: what was buried before the first question (and before the one after a
      lost connection) is known; what others bury later is known as soon as the broker has sent it, some milliseconds
    - what this process buries is known to it when ``bury`` returns
    - an id stays buried as long as one of the logs says so: what is buried for a week and for a year, is for a year
    - ``hasten`` changes nothing: a message in the ladder of delays cannot be taken out; the worker settles it when due

    Every process that asks holds all ids that have not expired, some 200 bytes each. A broker without streams can
    remember nothing: ``bury`` raises ``NotSupported``, and ``buried`` finds nothing.
    """

    def __init__(self, prefix: str, dialer: Dialer, publisher: Publisher, context: PluginContext) -> None:
        self._dialer = dialer
        self._publisher = publisher
        self._context = context
        self._logs = [_Log(f"{prefix}.tombstones.{days}d", days, Marks()) for days in _DAYS]
        self._lock = threading.Lock()
        self._declaring = threading.Lock()
        self._channel: Channel | None = None
        self._is_current = False
        self._read = 0
        """Records so far."""
        self._awaited: dict[str, threading.Event] = {}
        """Records of ours that are to be read back, by their token."""
        self._refused = False

    # --- any thread ----------------------------------------------------------------------------------------

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        """See :class:`~dray.core.contracts.Tombstones`."""
        del hasten
        left_s = expires_at - self._context.clock.time()
        log = next((log for log in self._logs if left_s <= log.days * 86400), self._logs[-1])
        ids = list(marks)
        for at in range(0, len(ids), _IDS_MAX):
            by_mark: dict[str, list[str]] = {}
            for id_ in ids[at : at + _IDS_MAX]:
                by_mark.setdefault(marks[id_], []).append(id_)
            self._write({log.name: {"until": expires_at, "marks": by_mark}})

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        """See :class:`~dray.core.contracts.Tombstones`."""
        if not ids:
            return {}
        if not self._follows and not self._follow():
            return {}
        now, found = self._context.clock.time(), dict[str, str]()
        for log in self._logs:
            found |= log.marks.find(ids, now)
        return found

    def exhume(self, ids: Sequence[str]) -> None:
        """See :class:`~dray.core.contracts.Tombstones`."""
        for at in range(0, len(ids), _IDS_MAX):
            record = {"gone": list(ids[at : at + _IDS_MAX])}
            self._write({log.name: record for log in self._logs})

    def close(self) -> None:
        """Stop following. Idempotent."""
        channel, self._channel, self._is_current = self._channel, None, False
        if channel is not None:
            channel.close()

    # --- writing -------------------------------------------------------------------------------------------

    def _write(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Add a record to each log (by name); returns when they are stored, and read back if we follow."""
        events = self._publish(records)
        if self._channel is not None:
            self._await(events.values())
        for token in events:
            self._awaited.pop(token, None)

    def _publish(self, records: Mapping[str, dict[str, Any]]) -> dict[str, threading.Event]:
        """Add a record to each log; the events, by token, will be set when they are read back."""
        events, parcels = {uuid.uuid4().hex: threading.Event() for _ in records}, []
        for token, (name, record) in zip(events, records.items(), strict=True):
            parcels.append(Parcel("", name, json.dumps(record).encode(), message_id=token))
        self._awaited.update(events)
        try:
            refused = self._publisher.publish(parcels)
            if refused:
                refused = self._publish_first([parcels[at] for at in refused])
            if refused:
                raise Unavailable(f"rabbitmq: a tombstone could not be stored: {next(iter(refused.values()))}")
        except BaseException:
            for token in events:
                self._awaited.pop(token, None)
            raise
        return events

    def _publish_first(self, parcels: Sequence[Parcel]) -> dict[int, str]:
        """There were no logs. RabbitMQ 3.10 drops the connection over a stream that another process just declares."""
        for pause_s in _FIRST_PAUSES_S:
            self._declare()
            try:
                return self._publisher.publish(parcels)
            except (Unavailable, Uncertain) as error:  # a fact that is stored twice is the same fact
                self._context.logger.debug("rabbitmq: trying again to store a tombstone: %s", error)
            threading.Event().wait(pause_s)
        return self._publisher.publish(parcels)

    def _await(self, events: Iterable[threading.Event]) -> bool:
        """Wait until these are read back; False when they will not be: then the next question finds them."""
        channel = self._channel
        for event in events:
            read = -1
            while not event.is_set() and channel is not None and channel.is_open and read < self._read:
                read = self._read  # as long as records come in, ours will come
                event.wait(self._dialer.options.answer_timeout_s)
            if not event.is_set() and channel is not None:
                channel.close()
                break
        return channel is not None and channel.is_open

    def _declare(self) -> None:
        """Make sure that the logs exist. Raises ``NotSupported``."""
        channel = self._dialer.link().channel()
        try:
            with self._declaring:
                channel.calls([("queue_declare", _declaration(log)) for log in self._logs])
        except Refused as error:
            if error.code not in (PRECONDITION_FAILED, _NOT_IMPLEMENTED):
                raise
            raise NotSupported(
                "rabbitmq: no task can be revoked and no replay noticed, because the broker refuses a stream (it needs "
                f"RabbitMQ 3.9 or later; rabbitmqctl enable_feature_flag stream_queue): {error.text}"
            ) from error
        finally:
            channel.close()

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def _follows(self) -> bool:
        channel = self._channel
        return self._is_current and channel is not None and channel.is_open

    def _follow(self) -> bool:
        """Read all logs to their end and go on reading. False: there can be none. Raises ``Unavailable``."""
        with self._lock:
            if self._follows:
                return True
            if self._refused:
                return False
            try:
                self._declare()
            except NotSupported as error:
                self._refused = True
                self._context.logger.warning("%s", error)
                return False
            self._subscribe()
            self._read_to_end()
            self._is_current = True
            return True

    def _subscribe(self) -> None:
        self._is_current = False
        if self._channel is not None:
            self._channel.close()
        link = self._dialer.link()
        channel = self._channel = link.channel(on_close=self._on_close, on_cancel=self._on_cancel)
        channel.call("basic_qos", prefetch_count=_PREFETCH)
        for log in self._logs:
            offset = {"x-stream-offset": log.next_offset or "first"}
            channel.consume(log.name, self._reader(channel, log), arguments=offset)
        link.post(lambda: self._sweep(channel))

    def _read_to_end(self) -> None:
        """A marker of ours comes after all that was there before."""
        try:
            is_read = self._await(self._publish({log.name: {} for log in self._logs}).values())
        except (
            Unavailable,
            Uncertain,
        ):  # a broker short of memory takes no messages, but its queues want to be drained
            is_read = self._await_quiet()
        if not is_read:
            raise Unavailable("rabbitmq: the connection was lost before all tombstones were read; ask again")

    def _await_quiet(self) -> bool:
        channel, read = self._channel, -1
        while channel is not None and channel.is_open and read < self._read:
            read = self._read
            threading.Event().wait(_QUIET_S)
        return channel is not None and channel.is_open

    # --- I/O thread ----------------------------------------------------------------------------------------

    def _reader(self, channel: Channel, log: _Log) -> Callable[[Any, Any, bytes], None]:
        def read(method: Any, properties: Any, body: bytes) -> None:
            offset = properties.headers["x-stream-offset"]
            if offset < log.next_offset:  # it was deleted and begun anew
                self._begin_anew(channel)
                return
            log.next_offset = offset + 1
            self._read += 1
            self._apply(log, body)
            channel.pika.basic_ack(method.delivery_tag)
            event = self._awaited.pop(properties.message_id, None)
            if event is not None:
                event.set()

        return read

    def _apply(self, log: _Log, body: bytes) -> None:
        try:
            record = json.loads(body)
            log.marks.exhume(record.get("gone", ()))
            log.marks.bury(record.get("marks", {}), record.get("until", 0.0), self._context.clock.time())
        except (ValueError, TypeError, AttributeError):
            self._context.logger.warning("rabbitmq: %s holds a record that is not dray's: it is ignored", log.name)

    def _sweep(self, channel: Channel) -> None:
        if channel.is_open:
            for log in self._logs:
                log.marks.sweep(self._context.clock.time())
            channel.link.later(_SWEEP_S, lambda: self._sweep(channel))

    def _on_cancel(self, _: str) -> None:
        """A log was deleted underneath."""
        if self._channel is not None:
            self._begin_anew(self._channel)

    def _begin_anew(self, channel: Channel) -> None:
        """Read everything again when somebody asks; what is known stays known."""
        for log in self._logs:
            log.next_offset = 0
        channel.pika.close()

    def _on_close(self, _: Exception) -> None:
        """Nobody needs to wait for records to be read back."""
        while self._awaited:
            self._awaited.popitem()[1].set()


def _declaration(log: _Log) -> dict[str, Any]:
    arguments = {
        "x-queue-type": "stream",
        "x-max-age": f"{log.days}D",
        "x-stream-max-segment-size-bytes": _SEGMENT_BYTES,
    }
    return {"queue": log.name, "durable": True, "arguments": arguments}
