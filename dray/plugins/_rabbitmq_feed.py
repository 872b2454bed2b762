"""What a broker pushes from one queue: buffered, counted, acknowledged."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dray.core.errors import Unavailable
from dray.plugins._rabbitmq_acks import Acks
from dray.plugins._rabbitmq_fast import FastConnection, Take
from dray.plugins._rabbitmq_link import Link

PREFETCH_MAX = 65535


class Raw(NamedTuple):
    """A message as the broker pushed it."""

    tag: int
    redelivered: bool
    properties: Any
    body: bytes


class Source(NamedTuple):
    """A queue in the broker."""

    name: str
    queue: str
    """The work queue that it belongs to."""
    level: int


class Feed:
    """One channel with a consumer on one queue.

    Responsibilities: takes in what is pushed and rings when somebody waits for it; asks the broker for as much as is
    wanted and no more; knows which deliveries are still ours; sends acknowledgements, few and in time. Delivery tags
    belong to one feed: when it is lost they are stale.
    """

    def __init__(self, link: Link, source: Source, levels: int) -> None:
        """``levels``: how many priorities the queue tells apart by itself."""
        self.link = link
        self.source = source
        self.error: Exception | None = None
        """Why nothing comes any more."""
        self.ring: Callable[[], None] = lambda: None
        """Called in the I/O thread when something came, and ``waited_for`` is set; and when the feed is lost."""
        self.waited_for = False
        self.buffers: list[deque[Raw]] = [deque() for _ in range(levels)]
        """Per level, the highest first. Appended by the I/O thread, emptied by the consumer's."""
        self.prefetch = 0
        """How many unacknowledged messages the broker sends at most."""
        self.arrived = 0
        """How many came so far: the newest delivery tag."""
        self._lock = threading.Lock()  # guards the next two
        self._acks = Acks()
        self._ended = 0
        self._tags: list[str] = []
        self._is_leaving = False
        self._is_flush_posted = False
        self._is_timer_set = False
        self.channel = link.channel(on_close=self._lose, on_cancel=self._on_cancel)

    # --- any thread ----------------------------------------------------------------------------------------

    @property
    def is_taking(self) -> bool:
        """False once it is lost or stopped."""
        return self.error is None and not self._is_leaving

    def ask_for(self, prefetch: int) -> None:
        """Begin, or change :attr:`prefetch` if nothing is on its way. Raises ``Unavailable``."""
        self.channel.post(lambda channel: self._subscribe(channel, prefetch))

    def buffered(self) -> int:
        """How many are here and not handed out."""
        return sum(map(len, self.buffers))

    def take(self, limit: int = PREFETCH_MAX) -> Iterator[tuple[int, Raw]]:
        """Up to ``limit`` leave the buffers, with their levels, in the order they are to be handed out."""
        top = len(self.buffers) - 1
        for index, buffer in enumerate(self.buffers):
            while limit > 0:
                try:
                    raw = buffer.popleft()
                except IndexError:  # asked, not looked: another thread may purge
                    break
                limit -= 1
                yield self.source.level or top - index, raw

    def take_last(self, count: int) -> Iterator[tuple[int, Raw]]:
        """``count`` of those that would be handed out last leave the buffers."""
        for index, buffer in enumerate(reversed(self.buffers)):
            while buffer and count > 0:
                count -= 1
                yield self.source.level or index, buffer.pop()

    def unfinished(self) -> int:
        """How many came and are not settled, buffered ones included."""
        return self.arrived - self._ended

    def owns(self, tag: int) -> bool:
        """Whether this delivery is still ours."""
        with self._lock:
            self._acks.delivered(self.arrived)
            return self.error is None and tag in self._acks

    def finish(self, tags: Sequence[int]) -> list[int]:
        """Acknowledge these soon; returns those that are not ours any more."""
        with self._lock:
            if self.error is not None:
                return list(tags)
            self._acks.delivered(self.arrived)
            stale = self._acks.finish(tags, time.monotonic())
            self._ended += len(tags) - len(stale)
        self._flush_soon()
        return stale

    def give_back(self, tags: Sequence[int]) -> list[int]:
        """Have the broker hand these out again (``basic.nack``); returns those that are not ours any more."""
        with self._lock:
            if self.error is not None:
                return list(tags)
            self._acks.delivered(self.arrived)
            stale = self._acks.drop(tags)
            self._ended += len(tags) - len(stale)
        fresh = sorted(set(tags).difference(stale))
        self.channel.post(lambda channel: [channel.basic_nack(tag, requeue=True) for tag in fresh])
        self._flush_soon()
        return stale

    def stop(self) -> None:
        """Nothing new, please; waits until the broker has agreed. What is unsettled stays ours."""
        self._is_leaving = True
        if self.error is None:
            self.channel.post(self._unsubscribe)
            self.channel.call("basic_qos", prefetch_count=1)  # its answer comes after that to the cancellation

    def leave(self) -> None:
        """Close the channel as soon as all is settled. After :meth:`stop`."""
        if self.error is None:
            self._flush_soon()

    def flush(self) -> None:
        """Acknowledge all that is finished, now. Raises ``Unavailable``."""
        self.channel.post(lambda channel: self._send_acks(channel, float("inf")))

    # --- I/O thread ----------------------------------------------------------------------------------------

    def _subscribe(self, channel: Any, prefetch: int) -> None:
        """A consumer keeps the prefetch that it began with: another one takes its place.

        Only while the broker has sent all that it may: what is on its way to a consumer that is cancelled goes back,
        and a quorum queue counts that as a delivery.
        """
        with self._lock:
            self._acks.delivered(self.arrived)
            if self._is_leaving or len(self._acks) < self.prefetch:
                return
        self._unsubscribe(channel)
        self.prefetch = prefetch
        tag, take = f"dray-{len(self._tags) + 1}", self._taker()
        self._tags.append(tag)
        connection = self.link.connection
        if isinstance(connection, FastConnection):
            connection.takers[channel.channel_number, tag.encode()] = take
        channel.basic_qos(prefetch_count=prefetch, callback=lambda _: None)
        channel.basic_consume(
            self.source.name,
            lambda _, method, properties, body: take(method.delivery_tag, method.redelivered, properties, body),
            consumer_tag=tag,
            callback=lambda _: None,
        )

    def _unsubscribe(self, channel: Any) -> None:
        if self._tags:
            channel.basic_cancel(self._tags[-1], callback=lambda _: None)
            # What is on its way shall be taken as ever. Pika would reject it, and that counts as a delivery.
            getattr(channel, "_cancelled", set()).discard(self._tags[-1])

    def _taker(self) -> Take:
        buffers, lowest = self.buffers, len(self.buffers) - 1
        connection = self.link.connection
        after = connection.after if isinstance(connection, FastConnection) else None

        def take(tag: int, redelivered: bool, properties: Any, body: bytes) -> None:
            raw = Raw(tag, redelivered, properties, body)
            buffers[lowest - min(properties.priority or 0, lowest) if lowest else 0].append(raw)
            self.arrived = tag
            if self.waited_for:
                self.waited_for = False
                if after is None:
                    self.ring()
                else:
                    after.append(self.ring)

        return take

    def _on_cancel(self, _: str) -> None:
        """The broker ended the consumer. Its deliveries may have gone back: none is ours."""
        self._lose(
            Unavailable(
                f"rabbitmq: {self.link.address}: the broker cancelled the consumer of {self.source.name!r}: the queue "
                "was deleted or moved, or a delivery was out for longer than the consumer timeout"
            )
        )
        self.channel.close()

    def _lose(self, error: Exception) -> None:
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        connection = self.link.connection
        if isinstance(connection, FastConnection) and self.channel.pika is not None:
            for tag in self._tags:
                connection.takers.pop((self.channel.pika.channel_number, tag.encode()), None)
        self.ring()

    def _flush_soon(self) -> None:
        if not self._is_flush_posted:
            self._is_flush_posted = True
            self.channel.post(self._flush_posted)

    def _flush_posted(self, channel: Any) -> None:
        self._is_flush_posted = False
        self._send_acks(channel, time.monotonic())

    def _flush_late(self) -> None:
        self._is_timer_set = False
        if self.error is None and self.channel.pika.is_open:
            self._send_acks(self.channel.pika, time.monotonic())

    def _send_acks(self, channel: Any, now: float) -> None:
        """Always here, in this order: an acknowledgement that is overtaken by a ``multiple`` closes the channel."""
        with self._lock:
            self._acks.delivered(self.arrived)
            top, singly = self._acks.due(now)
            due_at = self._acks.due_at()
            is_done = self._is_leaving and not len(self._acks)
        if top:
            channel.basic_ack(top, multiple=True)
        for tag in singly:
            channel.basic_ack(tag)
        if is_done:
            self.channel.close()
        elif due_at is not None and not self._is_timer_set:
            self._is_timer_set = True
            self.link.later(max(due_at - time.monotonic(), 0.001), self._flush_late)
