"""Tasks that run for longer than RabbitMQ waits for an acknowledgement, where it cannot be told to wait longer."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dray.core.contracts import PluginContext
from dray.core.errors import TransportError, Unavailable
from dray.core.message import Delivery
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_publisher import Parcel, Publisher

_LEASE_MAX_S = 120.0
_WATCHED_MIN = 2000
_LEFTOVERS_S = 86400.0
"""How long the broker keeps a hold queue that is empty: its message went back because nobody renewed it."""


class Receipt(Protocol, Hashable):
    """What proves that a delivery is ours, as the consumer makes it."""

    @property
    def feed(self) -> Any: ...
    @property
    def tag(self) -> int: ...
    @property
    def level(self) -> int: ...


@dataclass(slots=True)
class _Hold:
    """A delivery whose message is a copy in a queue of its own."""

    delivery: Delivery
    queue: str
    until: float
    """When the copy goes back, at the earliest; monotonic seconds."""


class Holds:
    """Keeps deliveries that a worker has had for half the broker's consumer timeout, without the broker's patience.

    A copy of the message, which knows its count, is put into a queue made for it alone, and the original is
    acknowledged. There the copy waits out a lease, after which it goes back to its work queue by dead-lettering. As
    long as the worker lives, a thread of its own replaces the queue by a new one at a third of each lease. The delivery
    is settled by deleting the queue; what the broker says was in it tells whether it was still ours.

    - ``watch`` costs next to nothing; only what really takes so long costs the broker anything
    - a worker that died: its copies run again when their leases end
    - a copy is published before the original is acknowledged, the new one before the old is deleted: when the link is
      lost in between the task may run once more, and is never lost
    """

    def __init__(
        self,
        prefix: str,
        dialer: Dialer,
        publisher: Publisher,
        context: PluginContext,
        *,
        timeout_s: float,
        is_quorum: bool,
        name_of: Callable[[str, int], str],
        copy: Callable[[Delivery, str], Parcel],
    ) -> None:
        """``timeout_s`` is the broker's; ``name_of`` gives the broker's name of a work queue and level; ``copy`` a
        parcel of a delivery for a queue, which knows how often it was handed out."""
        self._prefix = f"{prefix}.hold."
        self._dialer = dialer
        self._publisher = publisher
        self._context = context
        self._is_quorum = is_quorum
        self._name_of = name_of
        self._copy = copy
        self._patience_s = timeout_s / 2
        self.lease_s = min(timeout_s / 4, _LEASE_MAX_S)
        """How long after its worker died a held task runs again, at most; and some seconds."""
        self._watched: deque[tuple[float, Sequence[Delivery]]] = deque()
        self._watched_count = 0
        self._watched_max = _WATCHED_MIN
        self._watching = threading.Lock()  # guards the three above
        self._held: dict[Hashable, _Hold] = {}
        self._orphans: set[str] = set()
        """Queues that may exist, and whose copies must not go back."""
        self._channel: Channel | None = None
        self._working = threading.Lock()  # one renews or settles
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # --- for the transport ---------------------------------------------------------------------------------

    def watch(self, deliveries: Sequence[Delivery]) -> None:
        """These were handed out now. One thread."""
        with self._watching:
            self._watched.append((time.monotonic(), deliveries))
            self._watched_count += len(deliveries)
            if self._watched_count > self._watched_max:
                self._forget_settled()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dray-rabbitmq-hold", daemon=True)
            self._thread.start()

    def owns(self, receipt: Hashable) -> bool:
        """Its delivery is held here and still ours. Any thread."""
        hold = self._held.get(receipt)
        return hold is not None and time.monotonic() < hold.until

    def finish(self, receipts: Iterable[Hashable]) -> list[Hashable]:
        """Remove these messages for good; returns those that were not held here, or not any more.

        Raises ``Unavailable``: none, some or all are removed, ask again.
        """
        receipts = list(receipts)
        if not self._held:
            return receipts
        with self._working:
            ours = [receipt for receipt in receipts if receipt in self._held]
            counts = self._delete([self._held[receipt].queue for receipt in ours])
            for receipt in ours:
                del self._held[receipt]
        gone = {receipt for receipt, count in zip(ours, counts, strict=True) if not count}
        return [receipt for receipt in receipts if receipt in gone or receipt not in ours]

    def close(self) -> None:
        """Renew nothing any more: what is held runs again when its lease ends. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(self._dialer.options.answer_timeout_s)

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        period_s = min(self._patience_s, self.lease_s / 3) / 3
        while not self._stopping.wait(period_s):
            try:
                with self._working:
                    self._tick()
            except TransportError as error:
                self._context.logger.warning("rabbitmq: %d long tasks cannot be held: %s", len(self._held), error)
            except Exception:
                self._context.logger.exception("rabbitmq: long tasks cannot be held")

    def _tick(self) -> None:
        now = time.monotonic()
        if self._orphans:
            self._delete(list(self._orphans))
            self._orphans.clear()
        for receipt, hold in list(self._held.items()):
            if hold.until <= now:
                del self._held[receipt]
                self._context.logger.warning("rabbitmq: task %s ran out of its lease; it runs again", hold.delivery.id)
        renewable = [hold for hold in self._held.values() if hold.until - now < self.lease_s * 2 / 3]
        if renewable:
            self._renew(renewable)
        overdue = self._overdue(now)
        if overdue:
            try:
                self._hold(overdue)
            except TransportError:
                with self._watching:
                    self._watched.appendleft((now - self._patience_s, overdue))
                    self._watched_count += len(overdue)
                raise

    def _forget_settled(self) -> None:
        """Each delivery is looked at about once, whether it took a millisecond or an hour."""
        batches = [(since, _open(deliveries)) for since, deliveries in self._watched]
        self._watched = deque(batch for batch in batches if batch[1])
        self._watched_count = sum(len(deliveries) for _, deliveries in self._watched)
        self._watched_max = 2 * self._watched_count + _WATCHED_MIN

    def _overdue(self, now: float) -> list[Delivery]:
        overdue: list[Delivery] = []
        with self._watching:
            while self._watched and self._watched[0][0] + self._patience_s <= now:
                _, deliveries = self._watched.popleft()
                self._watched_count -= len(deliveries)
                overdue += _open(deliveries)
        return overdue

    def _hold(self, deliveries: Sequence[Delivery]) -> None:
        """Copies take the place of these. The feed decides who was first, should one be settled just now."""
        holds = self._put(deliveries)
        self._context.logger.info("rabbitmq: %d tasks run for longer than the broker waits: they are held", len(holds))
        for hold in holds:
            receipt = hold.delivery.receipt
            self._held[receipt] = hold
            if receipt.feed.finish([receipt.tag]):
                del self._held[receipt]
                self._orphans.add(hold.queue)

    def _renew(self, holds: Sequence[_Hold]) -> None:
        fresh = self._put([hold.delivery for hold in holds])
        for new in fresh:
            self._held[new.delivery.receipt] = new
        try:
            counts = self._delete([hold.queue for hold in holds])
        except Unavailable:
            # The old ones may be gone, so the new ones are what we hold. Should one have gone back, it runs once more.
            self._orphans.update(hold.queue for hold in holds)
            raise
        for new, count in zip(fresh, counts, strict=True):
            if not count:  # it has gone back meanwhile
                del self._held[new.delivery.receipt]
                self._orphans.add(new.queue)

    # --- the broker ----------------------------------------------------------------------------------------

    def _put(self, deliveries: Sequence[Delivery]) -> list[_Hold]:
        """A copy of each into a new queue."""
        until = time.monotonic() + self.lease_s  # asked before it is sent: the broker's time begins later
        holds = [_Hold(delivery, self._prefix + uuid.uuid4().hex, until) for delivery in deliveries]
        names = {hold.queue for hold in holds}
        self._orphans |= names
        self._ready().calls([("queue_declare", self._declaration(hold)) for hold in holds])
        refused = self._publisher.publish([self._copy(hold.delivery, hold.queue) for hold in holds])
        if refused:
            raise Unavailable(f"rabbitmq: a task could not be held: {next(iter(refused.values()))}")
        self._orphans -= names
        return holds

    def _declaration(self, hold: _Hold) -> dict[str, Any]:
        delivery = hold.delivery
        arguments: dict[str, Any] = {
            "x-message-ttl": round(self.lease_s * 1000),
            "x-expires": round((self.lease_s + _LEFTOVERS_S) * 1000),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self._name_of(delivery.queue, delivery.receipt.level),
        }
        if self._is_quorum:
            arguments |= {
                "x-queue-type": "quorum",
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
        return {"queue": hold.queue, "durable": True, "arguments": arguments}

    def _delete(self, names: Sequence[str]) -> list[int]:
        """How many messages were in each."""
        frames = self._ready().calls([("queue_delete", {"queue": name}) for name in names])
        return [int(frame.method.message_count) for frame in frames]

    def _ready(self) -> Channel:
        if self._channel is None or not self._channel.is_open:
            self._channel = self._dialer.link().channel()
        return self._channel


def _open(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Those that are not settled."""
    return [each for each in deliveries if each.receipt.feed.owns(each.receipt.tag)]
