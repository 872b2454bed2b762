"""What becomes of deliveries from RabbitMQ: settled, replaced by copies, given back, held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dray.core.contracts import PluginContext
from dray.core.errors import Unavailable
from dray.core.message import Action, Delivery, Settlement
from dray.plugins._rabbitmq_consumer import Found, Receipt
from dray.plugins._rabbitmq_feed import Feed, Raw
from dray.plugins._rabbitmq_hold import Holds
from dray.plugins._rabbitmq_link import Link
from dray.plugins._rabbitmq_messages import counted, deliveries_before, due_at, packed, unpacked
from dray.plugins._rabbitmq_outbox import Item, Outbox
from dray.plugins._rabbitmq_publisher import Parcel

NACK_IS_FREE = (4, 3)
"""From this version on giving back (``basic.nack``) does not count as a delivery of a quorum queue."""


class Custody:
    """Looks after deliveries from when they were pushed here until they are settled.

    Responsibilities: swaps a delivery for messages, published first and acknowledged second; counts what the broker
    does not count, and takes back what it counts too much, by replacing a message with a copy that knows its count;
    sends on what is not due yet; knows what is ours, on a feed or held.
    """

    def __init__(self, outbox: Outbox, is_quorum: bool, context: Callable[[], PluginContext]) -> None:
        self._outbox = outbox
        self._is_quorum = is_quorum
        self._context = context
        self.holds: Holds | None = None
        """Set with the first consumer: what the broker is depends on the link."""

    # --- settling ------------------------------------------------------------------------------------------

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See :class:`~dray.core.contracts.Transport`."""
        lost, ours = self._sort_out(settlements)
        items = [self._outbox.item(message) for settlement in ours for message in settlement.then]
        items += [self._outbox.grave(each.delivery, each.reason) for each in ours if each.action is Action.DEAD]
        finished: list[Receipt] = []
        given_back: list[Receipt] = []
        released: list[Item] = []
        for delivery, action, _, _ in ours:
            receipt: Receipt = delivery.receipt
            if action is not Action.RELEASE:
                finished.append(receipt)
            elif self.is_free_to_give_back(receipt.feed.link) and receipt.feed.owns(receipt.tag):
                given_back.append(receipt)
            else:
                finished.append(receipt)
                released.append(self._outbox.copy(delivery, receipt.level, delivery.delivery_count - 1))
        released.sort(key=lambda item: -item.message.priority)  # else a lower one is on its way to a consumer first
        self._publish(items)
        faults = self._context().faults
        if faults is not None:
            faults.hit("follow_ups_sent")
        self._publish(released)
        late = self._finish(finished)
        late.update(_each_feed(given_back, Feed.give_back))
        return lost + [each.delivery for each in ours if each.delivery.receipt in late] if late else lost

    def _sort_out(self, settlements: Sequence[Settlement]) -> tuple[list[Delivery], list[Settlement]]:
        """Deliveries that are not ours any more, and settlements of those that are, each once."""
        lost, ours, seen = list[Delivery](), list[Settlement](), set[Receipt]()
        for settlement in settlements:
            receipt: Receipt = settlement.delivery.receipt
            if receipt not in seen and self._owns(receipt):
                seen.add(receipt)
                ours.append(settlement)
            else:
                lost.append(settlement.delivery)
        return lost, ours

    def _owns(self, receipt: Receipt) -> bool:
        return receipt.feed.owns(receipt.tag) or (self.holds is not None and self.holds.owns(receipt))

    def _finish(self, receipts: Sequence[Receipt]) -> set[Receipt]:
        """Acknowledge these; those that are not ours any more."""
        late = _each_feed(receipts, Feed.finish)
        if late and self.holds is not None:
            late = set(self.holds.finish(late))  # type: ignore[arg-type]
        return late

    def _publish(self, items: Sequence[Item]) -> None:
        """Raises ``Unavailable`` or ``Uncertain`` unless all are stored."""
        refused = self._outbox.publish(items) if items else {}
        if refused:
            raise Unavailable(refusal(refused, len(items)))

    # --- for consumers -------------------------------------------------------------------------------------

    def watch(self, deliveries: Sequence[Delivery]) -> None:
        """These were handed out now."""
        if self.holds is not None:
            self.holds.watch(deliveries)

    def needs_copy(self, raw: Raw) -> bool:
        """It was handed out before and the queue does not count; or it is not due yet, for all that it has waited."""
        if raw.redelivered and not self._is_quorum:
            return True
        return bool(raw.properties.headers) and (due_at(raw.properties) or 0.0) > self._context().clock.time()

    def replace(self, feed: Feed, found: Sequence[Found]) -> None:
        """Copies take the place of these: they know their count, and how long to wait."""
        self._put_back(feed, found, lambda raw: 1 if raw.redelivered and not self._is_quorum else 0)

    def can_give_back(self, feed: Feed) -> bool:
        """A broker that is short of memory takes no copies."""
        return self.is_free_to_give_back(feed.link) or not self._outbox.is_blocked

    def give_back(self, feed: Feed, found: Sequence[Found]) -> None:
        """These were never handed out, and that must not count."""
        if not found:
            return
        if self.is_free_to_give_back(feed.link):
            feed.give_back([raw.tag for _, raw in found])
        else:
            self._put_back(feed, found, lambda _: 0)

    def is_free_to_give_back(self, link: Link) -> bool:
        """Whether the broker takes a message back without counting that as a delivery."""
        return self._is_quorum and link.server >= NACK_IS_FREE

    def peeked(self, queue: str, level: int, raws: Sequence[Raw]) -> None:
        """Copies of these shall take their place."""
        self._publish([self._again(queue, raw.properties.priority or level, raw) for raw in raws])

    def _put_back(self, feed: Feed, found: Sequence[Found], charge: Callable[[Raw], int]) -> None:
        queue = feed.source.queue
        self._publish([self._again(queue, level, raw, charge(raw)) for level, raw in found])
        feed.finish([raw.tag for _, raw in found])

    def _again(self, queue: str, level: int, raw: Raw, charge: int = 0) -> Item:
        """A copy of what was pushed here."""
        id_, headers, body = unpacked(raw.properties, raw.body)
        count = deliveries_before(raw.properties) + charge
        return self._outbox.copy(Delivery(queue, id_, body, headers, None), level, count, due_at(raw.properties))


def held_copy(delivery: Delivery, queue: str) -> Parcel:
    """The message of a delivery for a queue in which it is held: when it goes back, its worker has died."""
    receipt: Receipt = delivery.receipt
    frame = packed(delivery)
    return Parcel("", queue, frame, delivery.id, receipt.level, counted(delivery.delivery_count))


def refusal(refused: Mapping[int, str], count: int) -> str:
    """What to say of messages that the broker refused."""
    return f"rabbitmq: {len(refused)} of {count} messages were refused; the first: {next(iter(refused.values()))}"


def _each_feed(receipts: Sequence[Receipt], settle: Callable[[Feed, list[int]], list[int]]) -> set[Receipt]:
    """Settle these, feed by feed; those that are not ours any more."""
    feeds: dict[Feed, list[int]] = {}
    for feed, tag, _ in receipts:
        feeds.setdefault(feed, []).append(tag)
    stale = {(feed, tag) for feed, tags in feeds.items() for tag in settle(feed, tags)}
    return {receipt for receipt in receipts if receipt[:2] in stale} if stale else set()
