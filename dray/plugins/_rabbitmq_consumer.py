"""Receiving from RabbitMQ: demand goes out, messages come in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from dray.core.contracts import Consumer
from dray.core.errors import Unavailable, Uncertain
from dray.core.message import Delivery
from dray.plugins._rabbitmq_feed import PREFETCH_MAX, Feed, Raw
from dray.plugins._rabbitmq_messages import deliveries_before, unpacked

_RING, _WAKE = 0, 1
_GATHER_S = 0.25
"""How long the first call waits for what lies in earlier queues while later ones have something already."""
_YIELD_S = 0.001
"""Even who only polls lets the I/O thread work."""
_SHRINK_AFTER_S = 1.0
_EXACT = 16

Found = tuple[int, Raw]
"""A message and its level."""


class Receipt(NamedTuple):
    """What proves that a delivery is ours: its feed lives, and the tag is open there."""

    feed: Feed
    tag: int
    level: int


class Caretaker(Protocol):
    """What a consumer leaves to others."""

    def needs_copy(self, raw: Raw) -> bool:
        """Whether it must not be handed out as it is."""
        ...

    def replace(self, feed: Feed, found: Sequence[Found]) -> None:
        """Put copies in the place of these."""
        ...

    def can_give_back(self, feed: Feed) -> bool:
        """Whether :meth:`give_back` would succeed now: there may be no need to."""
        ...

    def give_back(self, feed: Feed, found: Sequence[Found]) -> None:
        """These were never handed out: others shall have them."""
        ...

    def watch(self, deliveries: Sequence[Delivery]) -> None:
        """These are handed out now."""
        ...


class RabbitMQConsumer(Consumer):
    """Hands out what feeds have buffered, earlier queues and higher levels first.

    Responsibilities: keeps each feed's prefetch at what is handed out and unsettled plus what is asked for; gives
    back what is buffered beyond that when tasks have become slow, and all of it at the end; has messages that must be
    counted, or are not due, replaced by a copy before anybody sees them.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        expected: Sequence[int],
        buffer: int,
        caretaker: Caretaker,
    ) -> None:
        """``expected``: how many messages were ready for each feed."""
        self._feeds = tuple(feeds)
        self._bell: SimpleQueue[int] = SimpleQueue()  # its put is reentrant: wake() may come from a signal handler
        self._caretaker = caretaker
        self._is_closed = False
        prefetch = min(max(buffer, 1), PREFETCH_MAX)
        self._expected = [min(count, prefetch) for count in expected] if len(feeds) > 1 else []
        self._gather_until = time.monotonic() + _GATHER_S
        self._wanted_at = dict.fromkeys(feeds, time.monotonic())
        for feed in feeds:
            feed.ring = self._ring
            feed.ask_for(prefetch)

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        if limit <= 0:
            self._check()
            self._adjust(0)
            return []
        deadline = time.monotonic() + timeout_s
        while True:
            self._check()
            found = self._take(limit)
            self._adjust(limit - len(found))
            if found:
                self._caretaker.watch(found)
                return found
            if not self._sleep(deadline):
                return []

    def _check(self) -> None:
        if self._is_closed:
            raise Unavailable("rabbitmq: the consumer is closed")
        for feed in self._feeds:
            if feed.error is not None:
                raise Unavailable(str(feed.error)) from feed.error

    # --- supply --------------------------------------------------------------------------------------------

    def _take(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        if not self._is_ready():
            return found
        self._expected = []
        for feed in self._feeds:
            queue, copied = feed.source.queue, list[Found]()
            for level, raw in feed.take(limit - len(found)):
                if self._caretaker.needs_copy(raw):
                    copied.append((level, raw))
                    continue
                id_, headers, body = unpacked(raw.properties, raw.body)
                count = deliveries_before(raw.properties) + 1
                found.append(Delivery(queue, id_, body, headers, Receipt(feed, raw.tag, level), count))
            if copied:
                self._caretaker.replace(feed, copied)
        return found

    def _is_ready(self) -> bool:
        """There is something, and nothing that should come before it is known to be on its way."""
        feeds = self._feeds
        if self._expected and time.monotonic() < self._gather_until:
            return all(feed.arrived >= count for feed, count in zip(feeds, self._expected, strict=True))
        return any(feed.error is not None or feed.buffered() for feed in feeds)

    def _sleep(self, deadline: float) -> bool:
        """Until there may be something (True); False when time is up, or after :meth:`wake`."""
        while True:
            for feed in self._feeds:
                feed.waited_for = True
            if self._is_ready():
                return True
            until = min(deadline, self._gather_until) if self._expected else deadline
            try:
                heard = self._bell.get(timeout=max(until - time.monotonic(), _YIELD_S))
            except Empty:
                if time.monotonic() >= deadline:
                    return self._is_ready()
            else:
                if heard == _WAKE:
                    return False

    def _ring(self) -> None:
        self._bell.put(_RING)

    # --- demand --------------------------------------------------------------------------------------------

    def _adjust(self, more: int) -> None:
        """Ask the broker for more when it has sent all that it may, and for less when that has lasted a while."""
        for feed in self._feeds:
            prefetch, unfinished, buffered = feed.prefetch, feed.unfinished(), feed.buffered()
            need = min(max(unfinished - buffered + more, 1), PREFETCH_MAX)
            if need > prefetch and unfinished >= prefetch > 0:
                feed.ask_for(_rounded(need))
            if need * 4 > prefetch or prefetch <= _EXACT:
                self._wanted_at[feed] = time.monotonic()
            elif time.monotonic() - self._wanted_at[feed] > _SHRINK_AFTER_S:
                feed.ask_for(_rounded(need))
            if unfinished > prefetch and buffered > more and self._caretaker.can_give_back(feed):  # it was more before
                self._caretaker.give_back(feed, list(feed.take_last(min(unfinished - prefetch, buffered - more))))

    def wake(self) -> None:
        self._bell.put(_WAKE)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            for feed in self._feeds:
                feed.stop()
            for feed in self._feeds:
                if feed.error is None:
                    self._caretaker.give_back(feed, list(feed.take()))
                    feed.leave()
        except (Unavailable, Uncertain):
            for feed in self._feeds:
                feed.channel.close()  # so the broker hands out again whatever is unsettled
            raise


def _rounded(count: int) -> int:
    """The next power of two, so that demand that grows asks seldom; exact where few are wanted, and each is held."""
    return count if count <= _EXACT else min(1 << (count - 1).bit_length(), PREFETCH_MAX)
