"""What a client of a transport can know of its messages: certainly done, maybe done, certainly not done.

The model of :mod:`dray.testing.transport_machine`. A message is told apart from others of its id by its body. Three
answers are kept as ``True``, ``None`` (maybe) and ``False``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dray.core.contracts import TransportFeatures
from dray.core.message import Action, DeadLetter, Delivery, Outgoing, Settlement

Perhaps = bool | None


@dataclass(eq=False, slots=True)
class Copy:
    """One message that was sent, or tried to be."""

    message: Outgoing
    exists: Perhaps = False
    ended: Perhaps = False
    """Acknowledged or dead."""
    dead: Perhaps = False
    hastened: Perhaps = False
    """Its delay was ended by a tombstone."""
    waiting: bool = True
    """Certainly not handed out: never, or given back for certain."""
    doubled: bool = False
    """A call that sends it was cut in the middle and repeated: there may be two."""
    holder: Delivery | None = None
    held_until: float = -math.inf
    """Nobody else gets it before this."""
    maybe_held_until: float = -math.inf
    """Somebody unknown may have it until this."""
    charges: tuple[int, int] = (0, 0)
    """How often it was handed out and not given back: at least, at most."""
    endings: list[tuple[Action, tuple[Copy, ...]]] = field(default_factory=list)
    """Settlements of it that may have happened, with their follow-ups."""

    def is_ready(self, now: float, slack_s: float) -> bool:
        """Certainly there for who asks."""
        due = 0.0 if self.hastened else self.message.not_before or 0.0
        free_at = max(due, self.held_until, self.maybe_held_until)
        return self.is_ready_or_delayed(now) and free_at + slack_s < now

    def is_ready_or_delayed(self, now: float) -> bool:
        """Certainly there, and not set aside for its expiry."""
        return self.exists is True and self.ended is False and not self.expired(now)

    def expired(self, now: float) -> bool:
        """Past its expiry: a transport may have set it aside."""
        return self.message.expires_at is not None and self.message.expires_at <= now

    def owned(self, delivery: Delivery, now: float, slack_s: float) -> Perhaps:
        """Is this delivery of it still its client's?"""
        if self.doubled:
            return None
        if self.ended is True or (self.holder is not None and self.holder is not delivery):
            return False
        certain = self.ended is False and self.holder is delivery and self.held_until > now + slack_s
        return True if certain else None


class Model:
    """All messages of one example, and what may be true of each."""

    def __init__(self, features: TransportFeatures, slack_s: float) -> None:
        self._features = features
        self._slack_s = slack_s
        self.copies: dict[bytes, Copy] = {}
        self._settled: dict[int, Delivery] = {}
        """By identity: two deliveries of one message may be equal."""
        self.live: list[Delivery] = []
        """Every delivery that was heard of, also those that are no longer anybody's."""

    def add(self, message: Outgoing) -> Copy:
        """A message that is about to be sent."""
        copy = self.copies[message.body] = Copy(message)
        return copy

    def of(self, delivery: Delivery) -> Copy:
        """The message that was delivered. Fails for one that was never sent, or was changed on its way."""
        copy = self.copies.get(delivery.body)
        assert copy is not None, f"a message that nobody sent: {delivery}"
        message = copy.message
        assert (delivery.queue, delivery.id, dict(delivery.headers)) == (
            message.queue,
            message.id,
            dict(message.headers),
        ), f"changed on its way: {delivery} was {message}"
        return copy

    # --- deliveries ----------------------------------------------------------------------------------------

    def delivered(self, delivery: Delivery, now: float) -> Copy:
        """It was handed out: it must have been there, due, and nobody else's; and that many times."""
        copy, label = self.of(delivery), delivery.body.decode()
        lease_s = self._features.lease_s
        if not copy.doubled:
            assert copy.exists is not False, f"{label} was delivered, but what sends it never happened"
            assert copy.ended is not True, f"{label} was delivered after it was settled"
            assert copy.held_until <= now + self._slack_s, f"{label} was delivered while another owns it"
            low, high = copy.charges
            if lease_s is not None:
                assert low < delivery.delivery_count <= high + 1, (
                    f"{label} has the delivery count {delivery.delivery_count} after {low} to {high} deliveries"
                )
        early = (copy.message.not_before or 0.0) > now + self._slack_s
        assert not early or copy.hastened is not False, f"{label} was delivered before it is due"
        if self._features.atomic_then and not copy.doubled and copy.ended is None:
            self._never_happened(copy)
        copy.exists, copy.ended, copy.dead, copy.waiting = True, False, False, False
        copy.endings.clear()
        copy.holder = delivery
        copy.held_until = math.inf if lease_s is None else now + lease_s
        copy.maybe_held_until = -math.inf
        copy.charges = (delivery.delivery_count, delivery.delivery_count)
        self.live.append(delivery)
        return copy

    @staticmethod
    def _never_happened(copy: Copy) -> None:
        """What was maybe settled is still there: with atomic swaps its follow-ups are not."""
        for _, follow_ups in copy.endings:
            for follow_up in follow_ups:
                assert follow_up.exists is not True or follow_up.doubled, (
                    f"{follow_up.message.body.decode()} is there, and so is what it replaces"
                )
                follow_up.exists = False

    def abandoned(self, deliveries: Iterable[Delivery]) -> None:
        """The client forgot these (it restarted): they come back when their lease ends, or sooner."""
        gone = {id(delivery) for delivery in deliveries}
        for delivery in self.live:
            copy = self.copies[delivery.body]
            if id(delivery) in gone and copy.holder is delivery:
                self._loosen(copy)
                if self._features.lease_s is None:
                    copy.maybe_held_until = -math.inf
        self.live = [delivery for delivery in self.live if id(delivery) not in gone]

    @staticmethod
    def _loosen(copy: Copy) -> None:
        copy.maybe_held_until = max(copy.maybe_held_until, copy.held_until)
        copy.held_until = -math.inf

    # --- settlements ---------------------------------------------------------------------------------------

    def settled(self, settlement: Settlement, lost: bool, now: float) -> None:
        """The transport answered."""
        delivery, action, then, _ = settlement
        copy, label = self.copies[delivery.body], delivery.body.decode()
        owned = False if id(delivery) in self._settled else copy.owned(delivery, now, self._slack_s)
        if lost:
            assert owned is not True, f"{label} was refused to be settled while its lease holds"
            return
        assert owned is not False, f"{label} was settled by who no longer owns it"
        for message in then:
            self.copies[message.body].exists = True
        self._settled[id(delivery)] = delivery
        copy.waiting = action is Action.RELEASE
        copy.ended = action is not Action.RELEASE
        if copy.doubled and copy.ended:
            copy.ended = None  # one of two, maybe
        copy.dead = action is Action.DEAD
        copy.held_until = copy.maybe_held_until = -math.inf
        if action is Action.RELEASE:
            low, high = copy.charges
            copy.charges = (low - 1, high - 1)

    def maybe_settled(self, settlement: Settlement, now: float, *, in_half: bool = False) -> None:
        """No answer came; ``in_half``: the follow-ups may have been sent and nothing more done."""
        delivery, action, then, _ = settlement
        copy = self.copies[delivery.body]
        if id(delivery) in self._settled or copy.owned(delivery, now, self._slack_s) is False:
            return
        follow_ups = tuple(self.copies[message.body] for message in then)
        for follow_up in follow_ups:
            follow_up.exists = None if follow_up.exists is False else follow_up.exists
            follow_up.doubled |= in_half
        copy.endings.append((action, follow_ups))
        if in_half:  # its lease may have been extended on the way
            copy.maybe_held_until = max(copy.maybe_held_until, now + (self._features.lease_s or 0.0))
        if action is Action.RELEASE:
            low, high = copy.charges
            copy.charges = (low - 1, high)
        elif copy.ended is False:
            copy.ended = None
        if action is Action.DEAD:
            copy.dead = None
        self._loosen(copy)

    def extended(self, delivery: Delivery, lost: bool, until: float, now: float) -> None:
        """The transport answered."""
        copy, label = self.copies[delivery.body], delivery.body.decode()
        if self._features.lease_s is None:
            assert not lost, f"{label} was reported lost by a transport without leases"
            return
        owned = False if id(delivery) in self._settled else copy.owned(delivery, now, self._slack_s)
        if lost:
            assert owned is not True, f"{label} was reported lost while its lease holds"
            return
        assert owned is not False, f"a lost lease of {label} was extended"
        if copy.holder is delivery and copy.ended is False:
            copy.held_until, copy.maybe_held_until = until, -math.inf

    def maybe_extended(self, delivery: Delivery, until: float) -> None:
        """No answer came."""
        copy = self.copies[delivery.body]
        copy.maybe_held_until = max(copy.maybe_held_until, copy.held_until, until)
        copy.held_until = min(copy.held_until, until)

    # --- tombstones ----------------------------------------------------------------------------------------

    def hastened(self, ids: Iterable[str], answered: bool) -> None:
        """Delayed messages of these ids were made due; without an answer, perhaps."""
        for copy in self.copies.values():
            if copy.message.id in ids and copy.exists is not False and copy.ended is not True:
                certain = answered and copy.waiting and copy.exists is True and copy.ended is False
                copy.hastened = copy.hastened or (True if certain and not copy.doubled else None)

    # --- the end -------------------------------------------------------------------------------------------

    def next_change(self, now: float) -> float:
        """When the next delay or lease is over; ``inf``: never."""
        return min((time for time in self._changes() if time > now), default=math.inf)

    def quiet_at(self, now: float) -> float:
        """When all delays and leases are over."""
        return max([now, *(time for time in self._changes() if time < math.inf)])

    def _changes(self) -> Iterator[float]:
        for copy in self.copies.values():
            if copy.ended is not True:
                yield from (copy.message.not_before or 0.0, copy.held_until, copy.maybe_held_until)

    def lost(self, drained: set[bytes], letters: Sequence[DeadLetter], now: float) -> list[str]:
        """What is gone although it must not be, after all that was there was ``drained``."""
        dead = {letter.body for letter in letters}
        return [
            body.decode()
            for body, copy in self.copies.items()
            if copy.exists is True and body not in drained and not self._accounted(copy, body in dead, now)
        ]

    @staticmethod
    def _accounted(copy: Copy, is_dead: bool, now: float) -> bool:
        if copy.ended is True:
            return is_dead or copy.dead is not True
        if copy.ended is None:
            return bool(
                copy.doubled
                or any(
                    (is_dead or action is not Action.DEAD) and all(follow_up.exists is True for follow_up in follow_ups)
                    for action, follow_ups in copy.endings
                )
            )
        return is_dead and copy.expired(now)
