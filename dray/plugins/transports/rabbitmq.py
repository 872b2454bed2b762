"""RabbitMQ (3.10 and newer) over AMQP 0-9-1, with pika."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dray.core.contracts import Consumer, Durability, PluginContext, Seconds, Transport, TransportFeatures
from dray.core.errors import ConfigError, SendError, Unavailable
from dray.core.message import DeadLetter, Delivery, Outgoing, QueueStats, Settlement
from dray.plugins._rabbitmq_admin import Admin
from dray.plugins._rabbitmq_broadcast import Broadcast
from dray.plugins._rabbitmq_consumer import RabbitMQConsumer
from dray.plugins._rabbitmq_custody import Custody, held_copy, refusal
from dray.plugins._rabbitmq_dead import Graveyard
from dray.plugins._rabbitmq_feed import Feed, Source
from dray.plugins._rabbitmq_hold import Holds
from dray.plugins._rabbitmq_link import Link
from dray.plugins._rabbitmq_messages import MAX_BODY_BYTES
from dray.plugins._rabbitmq_outbox import Outbox
from dray.plugins._rabbitmq_publisher import Partly, Publisher
from dray.plugins._rabbitmq_registry import Registry
from dray.plugins._rabbitmq_results import BrokerOptions
from dray.plugins._rabbitmq_tombstones import Tombstones
from dray.plugins._rabbitmq_topology import Topology

OLDEST = (3, 10)
TAKES_A_TIMEOUT = (3, 12)
"""From this version on a queue can say how long its deliveries may be out; older ones ignore that."""
CONSUMER_TIMEOUT_S = 24 * 86400.0
"""What ours say. Longer tasks are held."""
_ARGUMENTS = {"x-consumer-timeout": round(CONSUMER_TIMEOUT_S * 1000)}


class RabbitMQTransport(Transport):
    """Messages in queues of a RabbitMQ broker.

    Responsibilities: publishes with confirms, over a connection that does nothing else, because a broker short of
    memory stops those that publish; receives and acknowledges over a second one, made by the first consumer; swaps a
    delivery by publishing first and acknowledging second; counts deliveries with what the broker counts and, where it
    does not or counts too much, by replacing a message with a copy that knows its count.

    A lost connection is made again by the next call. The lease of a delivery is the connection it came over.
    """

    api: ClassVar[int] = 1
    features = TransportFeatures(
        durability=Durability.D3,
        lease_s=None,
        max_delay_s=math.inf,
        priorities=1,
        atomic_then=False,
        dead_letter=True,
        release=True,
        max_body_bytes=MAX_BODY_BYTES,
        push=True,
    )

    @dataclass(frozen=True, slots=True)
    class Options(BrokerOptions):
        """prefix, queue_type and priorities must be the same in all processes that share queues."""

        queue_type: Literal["quorum", "classic"] = "quorum"
        """``quorum``: replicated in a cluster, safe against power loss; ``classic``: on one node, quicker answers."""
        priorities: int = 1
        """Levels that are told apart, 1 to 10; on quorum queues each is a queue of its own."""
        consumer_timeout: Seconds = 1800.0
        """What a broker before 3.12 has as ``consumer_timeout``: a task that runs half as long is held otherwise."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        _check(options)
        is_quorum = options.queue_type == "quorum"
        durability = Durability.D3 if is_quorum else Durability.D2
        self.features = replace(self.features, durability=durability, priorities=options.priorities)
        self._publish_dialer = options.dialer(context, "publish")
        self._consume_dialer = options.dialer(context, "consume")
        self._topology = Topology(options.prefix, options.queue_type, options.priorities, _ARGUMENTS)
        self._publisher = publisher = Publisher(self._publish_dialer)
        self._outbox = Outbox(self._publish_dialer, publisher, self._topology, context.clock.time)
        self._custody = Custody(self._outbox, is_quorum, lambda: self.context)
        self._tombstones = Tombstones(options.prefix, self._consume_dialer, publisher, context)
        self._broadcast = Broadcast(options.prefix, self._consume_dialer, publisher, context)
        self._is_quorum = is_quorum
        self._admin = Admin(self._consume_dialer, self._topology, self._live_feeds)
        self._registry = Registry(self._topology.registry, self._consume_dialer, publisher)
        self._topology.register = self._registry.add
        self._graveyard = Graveyard(self._consume_dialer, self._topology.dead)
        self._feeds: set[Feed] = set()
        self._feeds_lock = threading.Lock()

    # --- life ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        self._publish_dialer.open()
        self._consume_dialer.open()
        link = self._publish_dialer.link()
        if link.server < OLDEST:
            raise ConfigError(
                f"rabbitmq: {link.address}: version {link.server[0]}.{link.server[1]} is too old; 3.10 at least"
            )

    def declare(self, queues: Sequence[str]) -> None:
        self._topology.declare(queues, self._publish_dialer.link())

    def close(self) -> None:
        with self._feeds_lock:
            feeds, self._feeds = self._feeds, set()
        for feed in feeds:
            try:
                feed.flush()
            except Unavailable:
                continue
        holds, self._custody.holds = self._custody.holds, None
        if holds is not None:
            holds.close()
        self._broadcast.close()
        self._tombstones.close()
        dialers = self._consume_dialer, self._publish_dialer
        for dialer in dialers:
            dialer.leave()
        for dialer in dialers:
            dialer.close()

    # --- sending and settling ------------------------------------------------------------------------------

    def send(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        items = [self._outbox.item(message) for message in messages]
        try:
            refused = self._outbox.publish(items)
        except Partly as error:
            unsent = [messages[index] for index in sorted({*error.unsent, *error.refused})]
            raise SendError(str(error), unsent) from error
        if refused:
            unsent = [messages[index] for index in sorted(refused)]
            raise SendError(refusal(refused, len(messages)), unsent)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        if not settlements:
            return []
        self._consume_dialer.require_open()
        return self._custody.settle(settlements)

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        del deliveries, lease_s  # the lease is the connection
        self._consume_dialer.require_open()
        return []

    # --- receiving -----------------------------------------------------------------------------------------

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        queues = tuple(dict.fromkeys(queues))
        sources = [Source(name, queue, level) for queue in queues for level, name in self._topology.names(queue)]
        levels, link = 1 if self._is_quorum else self.options.priorities, self._consume_dialer.link()
        self._topology.declare(queues, link)
        feeds = [Feed(link, source, levels) for source in sources]
        expected = self._topology.counts([source.name for source in sources], feeds[0].channel)
        self._topology.known.update(dict.fromkeys(queues))
        with self._feeds_lock:
            self._feeds = {each for each in self._feeds if each.error is None}.union(feeds)
            if self._custody.holds is None:
                self._custody.holds = self._holds(link)
        return RabbitMQConsumer(feeds, expected, buffer, self._custody)

    def _live_feeds(self) -> list[Feed]:
        with self._feeds_lock:
            return [feed for feed in self._feeds if feed.is_taking]

    def _holds(self, link: Link) -> Holds:
        """For tasks that run longer than the broker waits for an acknowledgement."""
        told = link.server >= TAKES_A_TIMEOUT
        return Holds(
            self.options.prefix,
            self._consume_dialer,
            self._publisher,
            self.context,
            timeout_s=CONSUMER_TIMEOUT_S if told else self.options.consumer_timeout,
            is_quorum=self._is_quorum,
            name_of=self._topology.name,
            copy=held_copy,
        )

    # --- what lies in the queues, dead letters -------------------------------------------------------------

    def queues(self) -> list[str]:
        names = dict.fromkeys([*self._registry.names(), *self._topology.known])
        return [queue for queue in names if self._admin.exists(queue)]

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        return self._admin.stats(queues)

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        is_free = self._custody.is_free_to_give_back(self._consume_dialer.link())
        return self._admin.peek(queue, limit, None if is_free else self._custody.peeked)

    def purge(self, queue: str) -> int:
        return self._admin.purge(queue)

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        return self._graveyard.newest(queue, limit)

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        return self._graveyard.get(ids)

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        return self._graveyard.purge(ids)

    # --- tombstones, broadcasts ----------------------------------------------------------------------------

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        self._tombstones.bury(marks, expires_at, hasten)

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        return self._tombstones.buried(ids)

    def exhume(self, ids: Sequence[str]) -> None:
        self._tombstones.exhume(ids)

    def broadcast(self, channel: str, payload: bytes) -> None:
        self._broadcast.broadcast(channel, payload)

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        return self._broadcast.listen(channel, deliver)


def _check(options: RabbitMQTransport.Options) -> None:
    if not 1 <= options.priorities <= 10:
        raise ConfigError(f"rabbitmq: priorities must be 1 to 10, not {options.priorities}")
    if not options.prefix or len(options.prefix.encode()) > 40 or options.prefix.startswith("amq."):
        raise ConfigError("rabbitmq: prefix must be 1 to 40 characters, and not begin with 'amq.'")
    if options.consumer_timeout <= 0:
        raise ConfigError("rabbitmq: consumer_timeout must be more than 0 seconds; it is the broker's setting")
    if options.heartbeat and options.heartbeat < 1:
        raise ConfigError("rabbitmq: heartbeat must be at least 1 second; 0 switches it off")
