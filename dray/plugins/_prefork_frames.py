"""What parent and child say to each other: length-prefixed frames, items, outcome records."""

from __future__ import annotations

import marshal
import socket
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any

from dray.core.message import Action, Delivery, Outcome, Outgoing, Settlement, State, StoredResult
from dray.plugins._prefork_memory import RECORD

HEADER = Struct("<QI")
"""Bytes that follow; the generation (parent to child) or the kind (child to parent)."""
READY, OUTCOMES, REPORT, DRY, BYE = range(1, 6)
"""Kinds: it waits for work; outcome records; a state to store; it met a missing token; it retires."""

TOKENS = tuple(bytes((number,)) for number in range(256))
"""The token of an item by the low byte of its sequence number: a stray byte from elsewhere hardly passes for one."""

Item = tuple[int, Delivery]
"""A sequence number and its delivery."""

_BUFFER_BYTES = 1 << 18
_ACK = Action.ACK
_ACTIONS = tuple(Action)
_ACTION_CODES = {action: code for code, action in enumerate(_ACTIONS)}
_STATES = {state.value: state for state in State}
_STATE_NAMES = {state: name for name, state in _STATES.items()}
_ITEMS, _ONE = 4, 2
"""Versions of marshal: the one with a table of references is the faster for many items, the slower for one record."""


def tune(sock: socket.socket) -> None:
    """Large buffers: a whole batch fits, and a child seldom waits for the parent."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)


def frame(tag: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), tag) + payload


class FrameReader:
    """Cuts what a socket delivers into frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = 0
        self._end = 0

    def fill(self) -> bool:
        """Read once; False at the end of the stream. Raises ``BlockingIOError`` if the socket does not block."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _BUFFER_BYTES:
                self._buffer = bytearray(_BUFFER_BYTES)
        elif self._end == len(self._buffer) or self._wanted() > len(self._buffer) - self._start:
            self._make_room()
        with memoryview(self._buffer) as view:
            count = self._sock.recv_into(view[self._end :])
        self._end += count
        return count > 0

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """The complete frames read so far: tag and payload."""
        while self._end - self._start >= HEADER.size:
            size, tag = HEADER.unpack_from(self._buffer, self._start)
            begin = self._start + HEADER.size
            if self._end - begin < size:
                return
            self._start = begin + size
            with memoryview(self._buffer) as view:
                payload = bytes(view[begin : begin + size])
            yield tag, payload

    def _wanted(self) -> int:
        if self._end - self._start < HEADER.size:
            return HEADER.size
        size: int = HEADER.unpack_from(self._buffer, self._start)[0]
        return HEADER.size + size

    def _make_room(self) -> None:
        rest = self._buffer[self._start : self._end]
        self._buffer = bytearray(max(_BUFFER_BYTES, self._wanted()))
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)


# --- items, parent to child --------------------------------------------------------------------------------


def pack_items(items: Sequence[Item]) -> bytes:
    """The receipt stays here: it is private to the transport, and may not even be plain data."""
    try:
        return marshal.dumps([(seq, (d[0], d[1], d[2], d[3], None, d[5], None)) for seq, d in items], _ITEMS)
    except ValueError:  # a subclass of dict or str: marshal takes exact types only
        return marshal.dumps(
            [
                (seq, (str(d.queue), str(d.id), bytes(d.body), _plain(d.headers), None, int(d.delivery_count), None))
                for seq, d in items
            ],
            _ITEMS,
        )


def unpack_items(payload: bytes) -> list[tuple[int, tuple[Any, ...]]]:
    """Sequence numbers, each with the fields of a delivery."""
    items: list[tuple[int, tuple[Any, ...]]] = marshal.loads(payload)  # noqa: S302 - our parent
    return items


def _plain(headers: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in headers.items()}


# --- outcomes, child to parent -----------------------------------------------------------------------------


def pack_outcome(outcome: Outcome) -> bytes:
    """Everything of the outcome but its delivery, which the parent has; nothing when it is just acknowledged."""
    (_, action, then, reason), result = outcome
    if action is _ACK and result is None and reason is None and not then:
        return b""
    code = _ACTION_CODES[action]
    follow_ups: Any = tuple([tuple(each) for each in then]) if then else ()
    stored: Any = None if result is None else (result[0], _STATE_NAMES[result[1]], result[2], result[3])
    try:
        return marshal.dumps((code, follow_ups, reason, stored), _ONE)
    except ValueError:
        return marshal.dumps(
            (
                code,
                tuple((str(o.queue), str(o.id), bytes(o.body), _plain(o.headers), *o[4:]) for o in then),
                None if reason is None else str(reason),
                None if result is None else pack_result(result),
            ),
            _ONE,
        )


def pack_result(result: StoredResult) -> tuple[str, str, bytes, float | None]:
    return str(result.id), _STATE_NAMES[result.state], bytes(result.body), result.expires_at


def records(data: bytes) -> Iterator[tuple[int, float, bytes]]:
    """The records in ``data``: sequence number, seconds it took, packed outcome."""
    at, end, unpack, size = 0, len(data), RECORD.unpack_from, RECORD.size
    while at < end:
        length, seq, took_s = unpack(data, at)
        start = at + size
        at = start + length
        yield seq, took_s, data[start:at]


def unpack_outcome(delivery: Delivery, data: bytes) -> Outcome:
    """The outcome again, around the very delivery that was submitted."""
    code, then, reason, result = marshal.loads(data)  # noqa: S302 - written by our own child
    stored = None if result is None else StoredResult(result[0], _STATES[result[1]], result[2], result[3])
    follow_ups = tuple(Outgoing(*each) for each in then) if then else ()
    return Outcome(Settlement(delivery, _ACTIONS[code], follow_ups, reason), stored)


def pack_report(result: StoredResult) -> bytes:
    return marshal.dumps(pack_result(result), _ONE)


def unpack_report(payload: bytes) -> StoredResult:
    key, state, body, expires_at = marshal.loads(payload)  # noqa: S302 - written by our own child
    return StoredResult(key, _STATES[state], body, expires_at)
