"""The only emulation: what a transport cannot do itself, done with what every transport can.

Chosen from features, never from names. Delays longer than the transport's longest are sent with the longest and
re-armed by the worker; dead letters become messages of the queue ``<queue>.dead``; a release becomes a fresh copy;
priorities are dropped where there are none.
"""

from __future__ import annotations

import logging

from dray.core.clock import Clock
from dray.core.codec import float_header, int_header
from dray.core.contracts import TransportFeatures
from dray.core.errors import NotSupported
from dray.core.message import Action, Delivery, Outgoing, Settlement

log = logging.getLogger(__name__)
DEAD_SUFFIX = ".dead"


class Fallback:
    """Adapts messages and settlements to one transport's features. Any thread."""

    def __init__(self, features: TransportFeatures, clock: Clock, transport: str) -> None:
        self._features = features
        self._clock = clock
        self._transport = transport
        self._flattened = False
        self.native = (
            features.dead_letter
            and features.release
            and features.max_delay_s == float("inf")
            and features.priorities > 1
        )
        """True: nothing is emulated, and nothing below need be called."""
        self.rearms = features.max_delay_s != float("inf")
        """True: messages may come before their time, and :meth:`early` is to be asked."""

    def outgoing(self, message: Outgoing) -> Outgoing:
        """The message as this transport can keep it. Raises ``NotSupported`` for a delay it cannot keep at all."""
        if self.native:
            return message
        features = self._features
        if message.not_before is not None:
            longest = self._clock.time() + features.max_delay_s
            if message.not_before > longest:
                if features.max_delay_s <= 0:
                    raise NotSupported(
                        f"the transport {self._transport!r} cannot delay: no countdown, eta or retry with a delay"
                    )
                message = message._replace(not_before=longest)
        if message.priority and features.priorities == 1:
            if not self._flattened:
                self._flattened = True
                log.warning(
                    "the transport %s tells no priorities apart as it is set up: all are alike", self._transport
                )
            message = message._replace(priority=0)
        return message

    def settlement(self, settlement: Settlement) -> Settlement:
        """The settlement in actions that this transport has."""
        if self.native:
            return settlement
        delivery, action, then, reason = settlement
        if action is Action.ACK and not then:
            return settlement
        if action is Action.DEAD and not self._features.dead_letter:
            headers = {**delivery.headers, "x-dead-reason": (reason or "")[:500], "x-dead-queue": delivery.queue}
            letter = Outgoing(delivery.queue + DEAD_SUFFIX, delivery.id, delivery.body, headers)
            then, action = (*then, letter), Action.ACK
        elif action is Action.RELEASE and not self._features.release:
            then, action = (*then, _copy(delivery, None)), Action.ACK
        return Settlement(delivery, action, tuple(map(self.outgoing, then)), reason)

    def early(self, delivery: Delivery) -> Settlement | None:
        """For a message that a shorter delay brought here before its time: the settlement that sends it on."""
        if not self.rearms:
            return None
        eta = float_header(delivery.headers, "eta")
        if eta is None or eta <= self._clock.time():
            return None
        return Settlement(delivery, Action.ACK, (_copy(delivery, eta),))


def _copy(delivery: Delivery, not_before: float | None) -> Outgoing:
    """The same message once more, its signature included: it was not verified here, so it must not get a new one."""
    headers = delivery.headers
    priority, expires_at = min(int_header(headers, "prio", 0), 9), float_header(headers, "expires")
    return Outgoing(delivery.queue, delivery.id, delivery.body, headers, priority, not_before, expires_at)
