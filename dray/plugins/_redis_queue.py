"""How the Redis transport writes messages: the names of a queue's keys, and the value that holds a message.

The layout is described at the top of ``_redis_lua/common.lua``; Lua never looks behind the id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

from dray.core.errors import DecodeError, TooLarge
from dray.core.message import Outgoing
from dray.core.wire import pack_headers, unpack_headers

MAX_BODY_BYTES = 2**20
BATCH = 1000
"""What one command takes or gives at most, ``BATCH`` of the Lua files: other clients get their turn in between."""
LATEST_MS = 2**48 - 1
INDEXES = tuple(b"%04d" % index for index in range(BATCH + 1))
"""As messages are numbered within a batch."""

Receipt = tuple[str, int, bytes]
"""What proves that a delivery is still ours: queue, batch, index."""
_MARK = b"d1"
_HEAD = 25
"""Where the id begins."""

Stored = tuple[str, bytes, dict[str, str], int, int]
"""What a stored message says: id, body, headers, priority, how often it was handed out in vain."""


def encode(message: Outgoing, head: bytes) -> bytes:
    """The value that holds the message; ``head`` is :func:`head_of` it. Raises ``TooLarge``, ``EncodeError``."""
    _, id_, body, headers, _, _, _ = message
    block = pack_headers(headers)
    if len(block) + len(body) > MAX_BODY_BYTES:
        size = len(body) + len(block) - max(2 * len(headers) - 1, 0)  # without the separators
        if size > MAX_BODY_BYTES:
            raise TooLarge(
                f"message {id_} for queue {message.queue!r} is {size:,} bytes, headers included; "
                f"the redis transport takes {MAX_BODY_BYTES:,}: store the data elsewhere and pass a reference to it"
            )
    return b"%b%06x%b\0%b%b" % (head, len(block), id_.encode(), block, body)


def head_of(priority: int, sent_ms: int) -> bytes:
    """What a stored message begins with."""
    return b"%b0000%d%012x" % (_MARK, priority, sent_ms)


def decode(value: bytes) -> Stored:
    """The inverse. What dray did not write becomes a message without headers, which the worker puts aside."""
    try:
        if not value.startswith(_MARK):
            return _foreign(value)
        end = value.index(b"\0", _HEAD + 1)
        vain, priority, length = int(value[2:6], 16), value[6] - 48, int(value[19:_HEAD], 16)
        id_, start = str(value[_HEAD:end], "utf-8"), end + 1
    except ValueError:
        return _foreign(value)
    try:
        return id_, value[start + length :], unpack_headers(value[start : start + length]), priority, vain
    except DecodeError:
        return id_, value[start:], {}, priority, vain


def _foreign(value: bytes) -> Stored:
    """Its id is what id_of() of common.lua makes of it."""
    return f"foreign-{hashlib.sha1(value, usedforsecurity=False).hexdigest()}", value, {}, 0, 0


def due_ms(not_before: float | None) -> int:
    """Milliseconds since the epoch, rounded up: not early; 0 for now."""
    if not_before is None or not_before <= 0:
        return 0
    return min(math.ceil(min(not_before, LATEST_MS / 1000) * 1000), LATEST_MS)


def runs(
    messages: Iterable[Outgoing], index_of: Callable[[str], int], now: float
) -> tuple[int, list[bytes | int | str]]:
    """Messages as ``store()`` of ``common.lua`` takes them: how many runs, and the runs.

    ``index_of`` gives a queue's index in KEYS. Consecutive messages of one queue and priority are one run.
    """
    now_ms = int(now * 1000)
    arguments: list[bytes | int | str] = []
    count, size, size_at, head, last = 0, 0, 0, b"", None
    for message in messages:
        due = due_ms(message.not_before)
        kind = (message.queue, "d" if due else message.priority)
        if kind != last:
            if count:
                arguments[size_at] = size
            last, size_at, size = kind, len(arguments) + 2, 0
            arguments += (index_of(message.queue), kind[1], 0)
            count, head = count + 1, head_of(message.priority, now_ms)
        if due:
            arguments.append(due)
            head = head_of(message.priority, due)
        arguments.append(encode(message, head))
        size += 1
    if count:
        arguments[size_at] = size
    return count, arguments


def base_of(prefix: str, queue: str) -> str:
    """What the names of a queue's keys begin with: a hash tag that puts all of them in one slot of a cluster."""
    return f"{{{prefix}:{queue}}}"
