"""The values that travel between the parts. Immutable, cheap to build, and they know no service.

Named tuples: built in C, slotted, immutable. Times are seconds since the epoch (float, UTC), bodies are bytes that
only the codec understands, headers are small text (keys ASCII, values without NUL).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple


class State(enum.StrEnum):
    """What is known of a task. ``SUCCESS``, ``FAILURE`` and ``REVOKED`` are terminal: they never change."""

    PENDING = "PENDING"
    """Queued, or unknown: a result back end cannot tell the two apart."""
    STARTED = "STARTED"
    """Running; written only with ``track_started`` or by ``current().progress(...)``."""
    RETRY = "RETRY"
    """Failed, and queued again."""
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"


TERMINAL = frozenset({State.SUCCESS, State.FAILURE, State.REVOKED})


def _without_body(value: Any) -> str:
    """The ``repr`` of a value whose body holds a user's arguments or results: these are nobody's business in a log."""
    fields = zip(value._fields, value, strict=True)
    shown = (f"body=<{len(item)} bytes>" if name == "body" else f"{name}={item!r}" for name, item in fields)
    return f"{type(value).__name__}({', '.join(shown)})"


class Outgoing(NamedTuple):
    """A message on its way to a queue."""

    queue: str
    id: str
    body: bytes
    headers: Mapping[str, str]
    priority: int = 0
    """0 to 9, higher first."""
    not_before: float | None = None
    expires_at: float | None = None
    """For transports that can set expired messages aside (never drop them); the worker checks the signed header."""

    def __repr__(self) -> str:
        return _without_body(self)


class Delivery(NamedTuple):
    """A message that a transport handed out and guards until it is settled."""

    queue: str
    id: str
    body: bytes
    headers: Mapping[str, str]
    receipt: Any
    """Private to the transport: what proves that the delivery is still ours."""
    delivery_count: int = 1
    """How often the message was handed out, this time included; ``RELEASE`` takes its own delivery back."""
    lease_until: float | None = None

    def __repr__(self) -> str:
        return _without_body(self)


class Action(enum.Enum):
    """What becomes of a delivery."""

    ACK = "ack"
    """Done: remove it."""
    DEAD = "dead"
    """Put it aside among the dead letters, with a reason."""
    RELEASE = "release"
    """Not begun: give it back at once, at no charge to its delivery count."""


class Settlement(NamedTuple):
    """Swap a delivery for zero or more new messages: ``then`` is visible no later than the delivery is gone."""

    delivery: Delivery
    action: Action
    then: tuple[Outgoing, ...] = ()
    reason: str | None = None
    """Why it is dead; text for people, one line."""


class StoredResult(NamedTuple):
    """One task's state and encoded value, as a result back end keeps it."""

    id: str
    state: State
    body: bytes
    expires_at: float | None
    """None: kept for ever."""

    def __repr__(self) -> str:
        return _without_body(self)


class Outcome(NamedTuple):
    """What the executor made of a delivery."""

    settlement: Settlement
    result: StoredResult | None
    """None: nothing to keep."""


def acknowledged(delivery: Delivery, result: StoredResult | None = None) -> Outcome:
    """The outcome of nearly every task: done, nothing follows.

    Made for each task, in process pools twice; past the tuples' own constructors, which cost twice as much.
    """
    return _new(Outcome, (_new(Settlement, (delivery, _ACK, (), None)), result))


_new = tuple.__new__
_ACK = Action.ACK


class DeadLetter(NamedTuple):
    """A message that was put aside."""

    id: str
    queue: str
    body: bytes
    headers: Mapping[str, str]
    reason: str
    died_at: float
    delivery_count: int

    def __repr__(self) -> str:
        return _without_body(self)


class QueueStats(NamedTuple):
    """How full a queue is. None: the transport cannot tell."""

    ready: int
    leased: int | None
    delayed: int | None
    dead: int | None
    oldest_age_s: float | None
    """Age of the oldest ready message in seconds; None when nothing is ready or the transport cannot tell."""


class RunningTask(NamedTuple):
    """What a slot of a pool does now."""

    id: str
    task: str
    started_at: float
    """Monotonic seconds (``Clock.monotonic``)."""
    pid: int
