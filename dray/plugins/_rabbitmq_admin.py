"""How full the queues of a RabbitMQ transport are, and what lies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dray.core.errors import NotSupported
from dray.core.message import Outgoing, QueueStats
from dray.plugins._rabbitmq_errors import NOT_FOUND, Refused
from dray.plugins._rabbitmq_feed import Feed, Raw
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_messages import unpacked
from dray.plugins._rabbitmq_scan import scan
from dray.plugins._rabbitmq_topology import Topology

PEEK_MAX = 1000
Replace = Callable[[str, int, Sequence[Raw]], None]
"""Store copies of these messages of a work queue's level, in order."""


class Admin:
    """Looks into work queues. Any thread.

    Messages that consumers of this process were pushed and have not handed out count as waiting; those that lie so in
    other processes count as theirs.
    """

    def __init__(self, dialer: Dialer, topology: Topology, feeds: Callable[[], Sequence[Feed]]) -> None:
        self._dialer = dialer
        self._topology = topology
        self._feeds = feeds

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        """How many are leased, delayed or dead by queue, and since when they wait, AMQP does not tell."""
        self._dialer.require_open()
        return {
            queue: QueueStats(sum(map(self._ready, self._names(queue))), None, None, None, None) for queue in queues
        }

    def purge(self, queue: str) -> int:
        """Delete what is ready; returns how many. Delayed messages stay: they lie in queues that all share."""
        self._dialer.require_open()
        return sum(map(self._purge, self._names(queue)))

    def _purge(self, name: str) -> int:
        feed = self._feed_of(name)
        if feed is None:
            return self._ask(name, "queue_purge")
        purged = int(feed.channel.call("queue_purge", queue=name).method.message_count)
        tags = [raw.tag for _, raw in feed.take()]
        feed.finish(tags)
        return purged + len(tags)

    def peek(self, queue: str, limit: int, replace: Replace | None) -> list[Outgoing]:
        """The first ones; delayed messages are not seen.

        With ``replace`` giving back would count as a delivery: all that lies in the queue is replaced by copies, which
        is refused for more than ``PEEK_MAX``.
        """
        found: list[Outgoing] = []
        for level, name in self._topology.names(queue):
            left = limit - len(found)
            if left <= 0:
                break
            if replace is not None and (ready := self._ask(name, "queue_declare", passive=True)) > PEEK_MAX:
                raise NotSupported(
                    f"the queue {queue!r} holds {ready:,} messages; RabbitMQ before 4.3, and classic queues, count a "
                    f"look as a delivery, so that dray looks into queues of up to {PEEK_MAX:,} only"
                )
            with scan(self._dialer.link(), name, PEEK_MAX if replace is not None else left) as seen:
                if seen is None:
                    continue
                found += [self._outgoing(queue, level, raw) for raw in seen.messages[:left]]
                if replace is not None:
                    replace(queue, level, seen.messages)
                    seen.remove([raw.tag for raw in seen.messages])
        return found

    def _outgoing(self, queue: str, level: int, raw: Raw) -> Outgoing:
        id_, headers, body = unpacked(raw.properties, raw.body)
        return Outgoing(queue, id_, body, headers, self._topology.priority(level or raw.properties.priority or 0))

    def _ready(self, name: str) -> int:
        feed = self._feed_of(name)
        if feed is None:
            return self._ask(name, "queue_declare", passive=True)
        # On the feed's channel: what was pushed before the queue was counted has come before the answer.
        return sum(self._topology.counts([name], feed.channel)) + feed.buffered()

    def _names(self, queue: str) -> list[str]:
        return [name for _, name in self._topology.names(queue)]

    def _feed_of(self, name: str) -> Feed | None:
        """One of this process's, if it takes from this queue of the broker's."""
        return next((feed for feed in self._feeds() if feed.source.name == name), None)

    def exists(self, queue: str) -> bool:
        """Whether it is in the broker."""
        return self._count(self._topology.name(queue), "queue_declare", passive=True) is not None

    def _ask(self, name: str, method: str, **arguments: Any) -> int:
        """The message count in the answer; 0 for a queue that is not there."""
        return self._count(name, method, **arguments) or 0

    def _count(self, name: str, method: str, **arguments: Any) -> int | None:
        channel = self._dialer.link().channel()
        try:
            return int(channel.call(method, queue=name, **arguments).method.message_count)
        except Refused as error:
            if error.code != NOT_FOUND:
                raise
            return None
        finally:
            channel.close()
