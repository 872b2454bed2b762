"""Delays in RabbitMQ without a plug-in: queues in which every message waits equally long, one after the other.

A delay is written as days, hours, minutes, seconds, tenths and hundredths, like a clock's hands. For each hand and each
position there is a queue whose messages all wait that long, so that none waits behind a longer one; a message goes
through one queue per hand that is not at zero, the longest first. A countdown of 30 s, 5 min or 1 h is one hop; none
takes more than six. Each hop costs the broker one more message, which is why the steps are a clock's and not powers of
two (the same 60 s would be seven hops).

Between the queues stand topic exchanges, one per hand. The routing key is ``target.hundredths.tenths.seconds...``: as
long as it must be, and the same on every hop. The exchange of a hand sends a message into the queue of its word there,
or for a zero on to the next hand; the exchange after the last one knows the work queues by their targets.

Nothing here talks to a broker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Hand(NamedTuple):
    """One hand of the clock."""

    step_ms: int
    positions: int
    unit: str
    shown: int
    """Units in a step, for names that people read."""


HANDS = (
    Hand(10, 10, "ms", 10),
    Hand(100, 10, "ms", 100),
    Hand(1_000, 60, "s", 1),
    Hand(60_000, 60, "m", 1),
    Hand(3_600_000, 24, "h", 1),
    Hand(86_400_000, 49, "d", 1),
)
"""The shortest first. A queue's TTL must be less than 2**32 ms: 49 days are the most that the last one can do."""
LONGEST_S = (HANDS[-1].step_ms * HANDS[-1].positions - HANDS[0].step_ms) / 1000
"""Whoever wants to wait longer waits that long first: see :attr:`Route.rest_s`."""
DUE_HEADER = "dray-due"
"""When a message that waits longer than the ladder is due, in epoch milliseconds."""


class Declaration(NamedTuple):
    """A call of pika's channel; each may be repeated."""

    method: str
    arguments: dict[str, Any]


class Route(NamedTuple):
    """Where to publish a message so that it reaches its queue after the delay."""

    exchange: str
    key: str
    waits: tuple[tuple[int, int], ...]
    """Hand and position of each queue on its way, which must exist: :meth:`Delays.waiting`."""
    rest_s: float
    """What is left to wait when it arrives, because the delay is longer than the ladder; else 0."""


class Delays:
    """The ladder below one prefix: what to declare, and the way of each message.

    - never shorter than asked for; rounded up to 10 ms; the broker adds a few milliseconds a hop
    - exchanges are declared once (:meth:`exchanges`), a waiting queue when the first message needs it, the binding of
      a work queue with the work queue (:meth:`arrival`)
    - ``quorum``: a hop is a transfer that loses nothing (dead-lettering at least once); classic queues hand on at most
      once, so that a broker that dies between the two may lose a message
    """

    def __init__(self, prefix: str, quorum: bool) -> None:
        self._prefix = prefix
        self._quorum = quorum
        self._targets: dict[str, str] = {}
        self.arrivals = f"{prefix}.delay.due"
        """The exchange that messages leave the ladder by."""

    def route(self, queue: str, delay_s: float) -> Route:
        """The way to ``queue``, whose wait takes ``delay_s`` seconds or (up to 10 ms) more."""
        rest_s = max(0.0, delay_s - LONGEST_S)
        left = max(1, math.ceil(round((delay_s - rest_s) * 1e6) / (HANDS[0].step_ms * 1000)))
        waits: list[tuple[int, int]] = []
        words = [self._target(queue)]
        for at, hand in enumerate(HANDS):
            left, position = divmod(left, hand.positions)
            words.append(str(position))
            if position:
                waits.append((at, position))
            if not left:
                break
        return Route(self._exchange(len(words) - 2), ".".join(words), tuple(reversed(waits)), rest_s)

    def exchanges(self) -> Iterator[Declaration]:
        """The exchanges between the queues, and the ways past hands at zero."""
        yield _exchange(self.arrivals)
        for at in range(len(HANDS)):
            yield _exchange(self._exchange(at))
            yield Declaration(
                "exchange_bind",
                {"destination": self._after(at), "source": self._exchange(at), "routing_key": _word(at, 0)},
            )

    def waiting(self, at: int, position: int) -> Iterator[Declaration]:
        """The queue in which messages wait for ``position`` steps of a hand."""
        name, hand = self.queue_name(at, position), HANDS[at]
        arguments: dict[str, Any] = {
            "x-message-ttl": hand.step_ms * position,
            "x-dead-letter-exchange": self._after(at),
        }
        if self._quorum:
            arguments |= {
                "x-queue-type": "quorum",
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # the broker insists on it for the line above
            }
        yield Declaration("queue_declare", {"queue": name, "durable": True, "arguments": arguments})
        yield Declaration(
            "queue_bind", {"queue": name, "exchange": self._exchange(at), "routing_key": _word(at, position)}
        )

    def arrival(self, queue: str) -> Declaration:
        """What lets delayed messages reach a work queue."""
        return Declaration(
            "queue_bind", {"queue": queue, "exchange": self.arrivals, "routing_key": f"{self._target(queue)}.#"}
        )

    def queue_name(self, at: int, position: int) -> str:
        """For instance ``dray.delay.300ms`` or ``dray.delay.5m``."""
        return f"{self._prefix}.delay.{HANDS[at].shown * position}{HANDS[at].unit}"

    def _exchange(self, at: int) -> str:
        return f"{self._prefix}.delay.hand{at}"

    def _after(self, at: int) -> str:
        """Where a message goes after a hand."""
        return self._exchange(at - 1) if at else self.arrivals

    def _target(self, queue: str) -> str:
        """One word that stands for a work queue: its name may hold dots, and be as long as a routing key."""
        target = self._targets.get(queue)
        if target is None:
            target = self._targets[queue] = hashlib.blake2b(queue.encode(), digest_size=12).hexdigest()
        return target


def _exchange(name: str) -> Declaration:
    return Declaration("exchange_declare", {"exchange": name, "exchange_type": "topic", "durable": True})


def _word(at: int, position: int) -> str:
    """A pattern for keys with ``position`` at this hand."""
    return "*." * (at + 1) + f"{position}.#"
