"""All that lies in a queue of RabbitMQ, taken out to be looked at, and put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from dray.plugins._rabbitmq_errors import ACCESS_REFUSED, NOT_FOUND, Refused
from dray.plugins._rabbitmq_feed import PREFETCH_MAX, Raw
from dray.plugins._rabbitmq_link import Link

_NEWS_S = 1.0
"""A queue that says nothing for so long has said all."""
_TURN_S = 10.0
"""How long to wait until somebody else has looked."""
_PAUSE_S = 0.02


class Scan:
    """The messages of one queue, for as long as they are looked at.

    Responsibilities: takes them by a consumer (``basic.get`` is a hundred times slower on quorum queues); ``remove``
    acknowledges some; ``close`` gives the others back, in their places, and waits until they are there.
    """

    def __init__(self, link: Link, name: str, limit: int, exclusive: bool) -> None:
        """``exclusive``: one looks at a time, or each would see a part."""
        self._name = name
        self._channel = link.channel()
        self._news: SimpleQueue[Raw] = SimpleQueue()
        self.messages: list[Raw] = []
        """The oldest first, ``limit`` at most."""
        self._removed: set[int] = set()
        self._count = min(self._ready(), limit)
        if self._count:
            tag = self._begin(min(limit, PREFETCH_MAX), exclusive)
            self._collect()
            self._channel.call("basic_cancel", consumer_tag=tag)

    def remove(self, tags: Iterable[int]) -> None:
        """These shall be gone."""
        gone = sorted(set(tags))
        self._removed.update(gone)
        self._channel.post(lambda channel: [channel.basic_ack(tag) for tag in gone])

    def close(self) -> None:
        left = [raw.tag for raw in self.messages if raw.tag not in self._removed]
        self._channel.post(lambda channel: [channel.basic_nack(tag, requeue=True) for tag in left])
        deadline = time.monotonic() + _NEWS_S
        while self._ready() < len(left) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        self._channel.close()

    def _ready(self) -> int:
        frame = self._channel.call("queue_declare", queue=self._name, passive=True)
        return int(frame.method.message_count)

    def _begin(self, prefetch: int, exclusive: bool) -> str:
        def take(_: Any, method: Any, properties: Any, body: bytes) -> None:
            self._news.put(Raw(method.delivery_tag, method.redelivered, properties, body))

        deadline = time.monotonic() + _TURN_S
        while True:
            try:
                self._channel.call("basic_qos", prefetch_count=prefetch)
                frame = self._channel.call(
                    "basic_consume", queue=self._name, on_message_callback=take, exclusive=exclusive
                )
                return str(frame.method.consumer_tag)
            except Refused as error:
                if error.code != ACCESS_REFUSED or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)
                self._channel = self._channel.link.channel()

    def _collect(self) -> None:
        while len(self.messages) < self._count:
            try:
                self.messages.append(self._news.get(timeout=_NEWS_S))
            except Empty:
                return


@contextlib.contextmanager
def scan(link: Link, name: str, limit: int = PREFETCH_MAX, exclusive: bool = False) -> Iterator[Scan | None]:
    """None when there is no such queue."""
    try:
        one = Scan(link, name, limit, exclusive)
    except Refused as error:
        if error.code != NOT_FOUND:
            raise
        yield None
        return
    try:
        yield one
    finally:
        one.close()
