"""Messages as they travel through RabbitMQ.

The body is a frame of ``dray.core.wire`` (headers and body), the content type says so, ``message_id`` is the id: AMQP's
own header tables are slow to encode and know no long text without loss. Only what the transport itself must remember
of few messages stands in AMQP headers: ``dray-count`` (deliveries before this copy was made), ``dray-due`` (a delay
that is longer than the ladder), ``dray-queue``, ``dray-reason`` and ``dray-died`` (of dead letters).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from dray.core.errors import DecodeError, InvalidName, TooLarge
from dray.core.message import DeadLetter, Delivery, Outgoing
from dray.core.wire import pack, unpack
from dray.plugins._rabbitmq_delays import DUE_HEADER
from dray.plugins._rabbitmq_fast import CONTENT_TYPE

MAX_BODY_BYTES = 15 * 2**20
"""RabbitMQ 4 takes 16 MiB; headers of our own and of the broker's dead-lettering come on top."""
COUNT, QUEUE, REASON, DIED = "dray-count", "dray-queue", "dray-reason", "dray-died"
_BROKER_COUNT = "x-delivery-count"
_ID_BYTES_MAX = 255


def packed(message: Outgoing | Delivery) -> bytes:
    """The body on the wire. Raises ``TooLarge``, ``InvalidName``."""
    frame = pack(message.headers, message.body)
    size = len(frame) - 6 - max(2 * len(message.headers) - 1, 0)  # without the frame's own bytes
    if size > MAX_BODY_BYTES:
        raise TooLarge(
            f"message {message.id} for queue {message.queue!r} is {size:,} bytes, headers included; "
            f"rabbitmq takes {MAX_BODY_BYTES:,}: store the data elsewhere and pass a reference to it"
        )
    if len(message.id) * 4 > _ID_BYTES_MAX and len(message.id.encode()) > _ID_BYTES_MAX:
        raise InvalidName(f"message {message.id!r}: RabbitMQ takes ids of up to {_ID_BYTES_MAX} bytes")
    return frame


def unpacked(properties: Any, body: bytes) -> tuple[str, dict[str, str], bytes]:
    """Id, headers and body. What was not made by dray has no headers: the worker refuses it and says why."""
    if properties.content_type == CONTENT_TYPE:
        try:
            return properties.message_id or _made_up(body), *unpack(body)
        except DecodeError:
            pass
    return properties.message_id or _made_up(body), {}, body


def deliveries_before(properties: Any) -> int:
    """How often it was handed out before, as far as the message itself and its quorum queue know."""
    headers = properties.headers
    return 0 if not headers else _number(headers, COUNT) + _number(headers, _BROKER_COUNT)


def due_at(properties: Any) -> float | None:
    """When a message that was to wait longer than the ladder is due; None for all others."""
    headers = properties.headers
    due_ms = _number(headers, DUE_HEADER) if headers else 0
    return due_ms / 1000 if due_ms > 0 else None


def counted(count: int) -> dict[str, Any] | None:
    """The AMQP headers of a copy that was handed out that often."""
    return {COUNT: count} if count > 0 else None


def burial(delivery: Delivery, reason: str | None, died_at: float) -> dict[str, Any]:
    """The AMQP headers of a dead letter."""
    return {QUEUE: delivery.queue, REASON: reason or "", DIED: repr(died_at), COUNT: delivery.delivery_count}


def dead_letter(properties: Any, body: bytes) -> DeadLetter:
    """The inverse; what was put there by hand says so."""
    id_, headers, content = unpacked(properties, body)
    notes: Mapping[str, Any] = properties.headers or {}
    try:
        died_at = float(notes.get(DIED, 0))
    except (TypeError, ValueError):
        died_at = 0.0
    queue, reason = str(notes.get(QUEUE, "")), str(notes.get(REASON, "put here by hand"))
    return DeadLetter(id_, queue, content, headers, reason, died_at, max(_number(notes, COUNT), 0))


def _number(headers: Mapping[str, Any], key: str) -> int:
    value = headers.get(key, 0)
    return value if isinstance(value, int) else 0


def _made_up(body: bytes) -> str:
    """An id for a message that came without: the same one whenever it comes again."""
    return "by-hand-" + hashlib.blake2b(body, digest_size=12).hexdigest()
