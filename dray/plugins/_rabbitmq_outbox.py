"""What leaves for RabbitMQ: messages become parcels, their queues exist, and what is refused is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dray.core.errors import Unavailable
from dray.core.message import Delivery, Outgoing
from dray.plugins._rabbitmq_delays import DUE_HEADER
from dray.plugins._rabbitmq_link import Dialer, Link
from dray.plugins._rabbitmq_messages import burial, counted, packed
from dray.plugins._rabbitmq_publisher import Parcel, Partly, Publisher
from dray.plugins._rabbitmq_topology import Topology

PAUSES_S = (0.0, 0.2, 1.0)
"""Before a refused message is published again: a queue that is just being made cannot take it yet."""


class Item(NamedTuple):
    """A message and what it looks like on the wire."""

    message: Outgoing
    frame: bytes
    notes: dict[str, Any] | None = None
    """AMQP headers."""
    is_dead: bool = False


class Outbox:
    """Makes parcels and publishes them. Any thread.

    Responsibilities: declares queues before the first message goes there; finds the way of delayed ones; makes copies
    that know their count, and dead letters; publishes again what was refused, because its queue was deleted meanwhile,
    or is just being made by somebody else.
    """

    def __init__(self, dialer: Dialer, publisher: Publisher, topology: Topology, now: Callable[[], float]) -> None:
        self._dialer = dialer
        self._topology = topology
        self._now = now
        self._publisher = publisher

    @property
    def is_blocked(self) -> bool:
        """The broker is known to take no messages now."""
        return self._publisher.is_blocked

    @staticmethod
    def item(message: Outgoing) -> Item:
        """Raises ``TooLarge``, ``InvalidName``."""
        return Item(message, packed(message))

    def copy(self, delivery: Delivery, level: int, count: int, due: float | None = None) -> Item:
        """The same message once more, handed out ``count`` times so far."""
        priority = self._topology.priority(level)
        message = Outgoing(delivery.queue, delivery.id, delivery.body, delivery.headers, priority, due)
        return Item(message, packed(message), counted(count))

    def grave(self, delivery: Delivery, reason: str | None) -> Item:
        """A dead letter."""
        message = Outgoing(delivery.queue, delivery.id, delivery.body, delivery.headers)
        return Item(message, packed(message), burial(delivery, reason, self._now()), is_dead=True)

    def publish(self, items: Sequence[Item]) -> dict[int, str]:
        """Returns those that were refused, and why, by index; all others are stored.

        Raises ``Unavailable`` (none stored), ``Uncertain`` (any may be), ``Partly``.
        """
        refused = self._attempt(items)
        for pause_s in PAUSES_S:
            if not refused:
                break
            self._topology.forget({items[index].message.queue for index in refused})
            indices = sorted(refused)
            time.sleep(pause_s)
            try:
                again = self._attempt([items[index] for index in indices])
            except Partly as error:
                raise Partly(error, [indices[at] for at in (*error.unsent, *error.refused)], {}) from error
            except Unavailable as error:
                raise Partly(error, indices, {}) from error
            refused = {indices[at]: reason for at, reason in again.items()}
        return refused

    def _attempt(self, items: Sequence[Item]) -> dict[int, str]:
        link, topology = self._dialer.link(), self._topology
        topology.declare({item.message.queue for item in items if not item.is_dead}, link)
        now = self._now()
        return self._publisher.publish([self._parcel(item, now, link) for item in items])

    def _parcel(self, item: Item, now: float, link: Link) -> Parcel:
        message, frame, notes, is_dead = item
        topology = self._topology
        if is_dead:
            topology.declare_dead(link)
            return Parcel("", topology.dead, frame, message.id, 0, notes)
        level = topology.level(message.priority)
        due = message.not_before
        if due is None or due <= now:
            return Parcel("", topology.name(message.queue, level), frame, message.id, level, notes)
        route = topology.route(message, due - now, link)
        if route.rest_s:
            notes = {**(notes or {}), DUE_HEADER: math.ceil(due * 1000)}
        return Parcel(route.exchange, route.key, frame, message.id, level, notes)
