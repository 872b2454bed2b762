"""Publishing with confirms: what many threads publish shares the wire and its round trips.

::

    publisher = Publisher(dialer, logger)
    refused = publisher.publish([Parcel("", "queue", b"body", message_id="1")])    # any thread; waits for the confirms
    if refused:                                                                   # {index: why it was not stored}
        ...
    publisher.close()

``Unavailable``: certainly none was stored. ``Uncertain``: any may be. ``Partly``: those in ``unsent`` (indices) were
certainly not stored, all others were.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import pika
from pika import spec

from dray.core.errors import Unavailable, Uncertain
from dray.plugins._rabbitmq_channel import Answer, Channel
from dray.plugins._rabbitmq_fast import CONTENT_TYPE, FastConnection, encode
from dray.plugins._rabbitmq_link import Dialer, Link

_CHUNK = 500
"""Messages that are written at once."""
_WINDOW = 4
"""Chunks of one call that wait for their confirms at a time: what the broker has not taken stays here."""
_LOOK_S = 5.0
"""How often somebody who waits for a confirm looks whether the broker has stopped reading."""


class Parcel(NamedTuple):
    """One message on its way to an exchange. Persistent, and returned if no queue takes it."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str = ""
    priority: int = 0
    headers: dict[str, Any] | None = None


class Partly(Unavailable):
    """Some were certainly not stored, because the link was lost before they were written; the others were."""

    def __init__(self, error: Exception, unsent: Sequence[int], refused: dict[int, str]) -> None:
        super().__init__(str(error))
        self.unsent = tuple(unsent)
        self.refused = refused
        self.__cause__ = error


class Flight:
    """A chunk that was written and is not confirmed yet. I/O thread, but for ``answer``."""

    __slots__ = ("answer", "first", "open", "parcels", "refused")

    def __init__(self, parcels: Sequence[Parcel]) -> None:
        self.parcels = parcels
        self.answer = Answer()
        self.first = 0
        self.open: set[int] = set()
        self.refused: dict[int, str] = {}

    def begin(self, first: int) -> None:
        self.first = first
        self.open = set(range(first, first + len(self.parcels)))

    def confirm(self, tags: Sequence[int], stored: bool) -> None:
        """The broker has answered for these tags, as far as they are of this flight."""
        if not stored:
            refused = {tag - self.first: "the broker could not store it (basic.nack)" for tag in self.open & set(tags)}
            self.refused = refused | self.refused
        self.open.difference_update(tags)
        if not self.open:
            self.answer.give(self.refused)


class Lane:
    """One channel in confirm mode, with what is in flight on it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._flights: deque[Flight] = deque()
        self._next_tag = 1
        self._error: Exception | None = None
        self._is_worn = False
        self.channel: Channel = link.channel(on_close=self._on_close, on_return=self._on_return)
        self._confirm_mode()

    @property
    def is_open(self) -> bool:
        return self._error is None and self.channel.is_open and not self._is_worn

    def retire(self) -> None:
        """Another takes its place: close it, unless something is still in flight."""
        if not self._flights:
            self.channel.close()

    def post(self, flight: Flight) -> None:
        """Write these soon. Raises ``Unavailable``; what is lost later comes through the flight's answer."""
        self.link.post(lambda: self._write(flight))

    def _confirm_mode(self) -> None:
        answer = Answer()
        self.channel.post(lambda channel: channel.confirm_delivery(self._on_confirm, answer.give))
        answer.result(self.link.options.answer_timeout_s, "confirm.select")

    # --- I/O thread ----------------------------------------------------------------------------------------

    def _write(self, flight: Flight) -> None:
        if self._error is not None:
            flight.answer.fail(Unavailable(str(self._error)))
            return
        flight.begin(self._next_tag)
        self._next_tag += len(flight.parcels)
        self._flights.append(flight)
        connection = self.link.connection
        if isinstance(connection, FastConnection):
            channel = self.channel.pika.channel_number
            connection.emit(encode(channel, flight.parcels, connection.params.frame_max))
            return
        publish = self.channel.pika.basic_publish
        for exchange, routing_key, body, message_id, priority, headers in flight.parcels:
            properties = pika.BasicProperties(CONTENT_TYPE, None, headers, 2, priority or None, message_id=message_id)
            publish(exchange, routing_key, body, properties, mandatory=True)

    def _on_confirm(self, frame: Any) -> None:
        method, flights = frame.method, self._flights
        tag, stored = method.delivery_tag, isinstance(method, spec.Basic.Ack)
        # After a quorum queue lost its leader, RabbitMQ refuses everything on a channel that published to the old one.
        self._is_worn = self._is_worn or not stored
        for flight in flights:
            if flight.first > tag:
                break
            if method.multiple:
                last = flight.first + len(flight.parcels) - 1
                flight.confirm(range(flight.first, min(tag, last) + 1), stored)
            elif tag in flight.open:
                flight.confirm((tag,), stored)
                break
        while flights and not flights[0].open:
            flights.popleft()

    def _on_return(self, method: Any, properties: Any, body: bytes) -> None:
        """It comes before the confirm of its message."""
        sought = (method.exchange, method.routing_key, body, properties.message_id or "")
        for flight in self._flights:
            for index, parcel in enumerate(flight.parcels):
                if parcel[:4] == sought and flight.first + index in flight.open and index not in flight.refused:
                    flight.refused[index] = f"no queue takes it: {method.reply_text} ({method.reply_code})"
                    return

    def _on_close(self, error: Exception) -> None:
        self._error = error
        flights, self._flights = self._flights, deque()
        for flight in flights:
            failure = Uncertain(f"{error}, before {len(flight.open)} messages were confirmed")
            failure.__cause__ = error
            flight.answer.fail(failure)


class Publisher:
    """Publishes for all threads over one channel; makes another when that one is lost."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._lock = threading.Lock()
        self._lane: Lane | None = None

    @property
    def link(self) -> Link:
        """The link it publishes on. Raises ``Unavailable``."""
        return self.lane().link

    def lane(self) -> Lane:
        """The open lane. Raises ``Unavailable``."""
        lane = self._lane
        if lane is not None and lane.is_open:
            return lane
        with self._lock:
            lane = self._lane
            if lane is None or not lane.is_open:
                if lane is not None:
                    lane.retire()
                lane = self._lane = Lane(self._dialer.link())
            return lane

    @property
    def is_blocked(self) -> bool:
        """The broker is known to take no messages now."""
        lane = self._lane
        return lane is not None and lane.link.blocked is not None

    def publish(self, parcels: Sequence[Parcel]) -> dict[int, str]:
        """Returns those that were not stored, and why, by their index; the others were."""
        if not parcels:
            return {}
        lane = self.lane()
        if lane.link.blocked is not None:
            raise Unavailable(_blocked(lane.link))
        flights: list[Flight] = []
        error: Exception | None = None
        for start in range(0, len(parcels), _CHUNK):
            flight = Flight(parcels[start : start + _CHUNK])
            try:
                lane.post(flight)
                flights.append(flight)
                if len(flights) >= _WINDOW:
                    self._wait(flights[-_WINDOW], lane.link)
            except (Unavailable, Uncertain) as failure:
                error = failure
                break
        return self._collect(flights, lane.link, len(parcels), error)

    def _collect(self, flights: Sequence[Flight], link: Link, count: int, error: Exception | None) -> dict[int, str]:
        refused: dict[int, str] = {}
        unsent = list(range(len(flights) * _CHUNK, count))
        uncertain: Uncertain | None = None
        for number, flight in enumerate(flights):
            start = number * _CHUNK
            try:
                found = self._wait(flight, link)
            except Uncertain as failure:
                uncertain = failure
                break
            except Unavailable as failure:
                error = error or failure
                unsent += range(start, start + len(flight.parcels))
            else:
                refused |= {start + index: reason for index, reason in found.items()}
        if uncertain is not None:
            raise uncertain
        if error is not None and len(unsent) == count:
            raise Unavailable(str(error)) from error
        if error is not None:
            raise Partly(error, sorted(unsent), refused)
        return refused

    def _wait(self, flight: Flight, link: Link) -> dict[int, str]:
        timeout_s = link.options.answer_timeout_s
        deadline = time.monotonic() + timeout_s
        while not flight.answer.wait(min(_LOOK_S, max(deadline - time.monotonic(), 0))):
            if link.blocked is not None:
                raise Uncertain(_blocked(link))
            if time.monotonic() >= deadline:
                why = f"no confirmation for {timeout_s:g} s"
                link.drop(why)
                raise Uncertain(f"rabbitmq: {link.address}: {why}")
        found: dict[int, str] = flight.answer.result(0, "publish")
        return found

    def close(self) -> None:
        """Idempotent; the dialer is closed by who owns it."""
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.channel.close()


def _blocked(link: Link) -> str:
    return (
        f"rabbitmq: {link.address}: the broker has stopped all publishers: {link.blocked}; free memory or disk space "
        "there, or raise vm_memory_high_watermark or disk_free_limit"
    )
