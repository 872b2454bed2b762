"""A shorter way through pika for what there is most of: our own messages, out and in.

Pika makes three frame objects and three writes of a message that it sends, and four objects and a callback of one that
it receives. Here the frames of a whole batch are joined before they are written, and deliveries are read in one loop.
This leans on a few names that pika does not promise, so it is used with versions that were looked at only; with any
other one pika does all, and dray works the same, at about half the speed.

Everything else (handshake, heartbeats, topology, confirms, large messages, whatever looks odd) goes through pika, and
so may each single message at any time: both ways end in the same callbacks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pika
from pika import data as pika_data

if TYPE_CHECKING:
    from dray.plugins._rabbitmq_publisher import Parcel

KNOWN = ("1.3.2", "1.4.0", "1.4.1", "1.4.2", "1.4.3", "1.4.4")
"""The versions of pika whose inside is as it is taken to be here."""
CONTENT_TYPE = "application/x-dray"
BODY_BYTES_MAX = 65536
"""Of what is read here: larger bodies come in many pieces, and pika joins these."""
_READ_BYTES = 65536
_FRAME = struct.Struct(">BHI")
_CONTENT = struct.Struct(">HHQH")
_DELIVER = b"\x00\x3c\x00\x3c"
_TAG = struct.Struct(">Q")
_END = b"\xce"
_TYPE, _HEADERS, _MODE, _PRIORITY, _ID = 1 << 15, 1 << 13, 1 << 12, 1 << 11, 1 << 7
_PERSISTENT = b"\x02"
_TABLES_MAX = 1000

Take = Callable[[int, bool, Any, bytes], None]
"""Delivery tag, whether it is redelivered, properties, body."""


def is_usable() -> bool:
    """Whether this pika may be used so."""
    return str(pika.__version__) in KNOWN


class Notes(NamedTuple):
    """The properties of a message that dray looks at."""

    content_type: str | None
    headers: dict[str, Any] | None
    priority: int | None
    message_id: str | None


# --- out ---------------------------------------------------------------------------------------------------


def encode(channel: int, parcels: Sequence[Parcel], frame_max: int) -> bytes:
    """The frames of these messages, as pika would write them. Raises ``ValueError`` for texts of over 255 bytes."""
    out: list[bytes] = []
    room, pack = frame_max - 8, _FRAME.pack
    for exchange, routing_key, body, message_id, priority, headers in parcels:
        size = len(body)
        content = _content(size, message_id, priority, headers)
        out += (_publish_frame(channel, exchange, routing_key), pack(2, channel, len(content)), content, _END)
        if size <= room:
            if size:
                out += (pack(3, channel, size), body, _END)
            continue
        for start in range(0, size, room):
            piece = body[start : start + room]
            out += (pack(3, channel, len(piece)), piece, _END)
    return b"".join(out)


def _content(size: int, message_id: str, priority: int, headers: dict[str, Any] | None) -> bytes:
    flags = _TYPE | _MODE | _ID
    if not headers and not priority:
        return _CONTENT.pack(60, 0, size, flags) + _CONTENT_TYPE + _PERSISTENT + _short(message_id)
    pieces: list[bytes] = []
    if headers:
        flags |= _HEADERS
        pika_data.encode_table(pieces, headers)
    pieces.append(_PERSISTENT)
    if priority:
        flags |= _PRIORITY
        pieces.append(bytes((priority,)))
    return _CONTENT.pack(60, 0, size, flags) + _CONTENT_TYPE + b"".join(pieces) + _short(message_id)


@lru_cache(maxsize=1024)
def _publish_frame(channel: int, exchange: str, routing_key: str) -> bytes:
    """``basic.publish``, mandatory."""
    payload = b"\x00\x3c\x00\x28\x00\x00" + _short(exchange) + _short(routing_key) + b"\x01"
    return _FRAME.pack(1, channel, len(payload)) + payload + _END


def _short(text: str) -> bytes:
    raw = text.encode()
    return bytes((len(raw),)) + raw


_CONTENT_TYPE = _short(CONTENT_TYPE)


# --- in ----------------------------------------------------------------------------------------------------


class FastConnection(pika.SelectConnection):  # type: ignore[misc]
    """Pika's connection with a shorter way for deliveries whose consumer asked for it by :attr:`takers`."""

    _frame_buffer: bytes
    """Pika's: the beginning of a frame that is not all there."""
    takers: dict[tuple[int, bytes], Take]
    after: list[Callable[[], None]]
    """Called, and forgotten, when all that was read has been taken."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.takers = {}
        self.after = []
        self._tables: dict[bytes, dict[str, Any]] = {}
        super().__init__(*args, **named)

    def read_more(self) -> None:
        """Read in larger pieces than pika does, once connected: each piece lets another thread run."""
        self._transport._MAX_RECV_BYTES = _READ_BYTES  # noqa: SLF001

    def emit(self, data: bytes) -> None:
        """Write these frames."""
        self.bytes_sent += len(data)
        self._adapter_emit_data(data)

    def _on_data_available(self, data_in: bytes) -> None:
        if not self.takers:
            super()._on_data_available(data_in)
            return
        buffer = self._frame_buffer + data_in if self._frame_buffer else data_in
        self._frame_buffer = b""
        at, end = 0, len(buffer)
        while end - at >= 8:
            kind, channel, size = _FRAME.unpack_from(buffer, at)
            following = at + 8 + size
            if following > end:
                break
            if kind == 1 and buffer[at + 7 : at + 11] == _DELIVER:
                taken = self._deliver(buffer, at, following, channel)
                if taken < 0:
                    break  # the rest of it is still to come
                if taken:
                    self.bytes_received += taken - at
                    at = taken
                    continue
            super()._on_data_available(buffer[at:following])
            at = following
        self._frame_buffer = buffer[at:] if at else buffer
        while self.after:
            self.after.pop()()

    def _deliver(self, buffer: bytes, at: int, header: int, channel: int) -> int:
        """Hand over the delivery that begins at ``at``; its end; 0: pika shall do it; -1: it is not all there."""
        tag_at = at + 12 + buffer[at + 11]
        take = self.takers.get((channel, buffer[at + 12 : tag_at]))
        if take is None:
            return 0
        end = len(buffer)
        if end - header < 8:
            return -1
        kind, of_channel, size = _FRAME.unpack_from(buffer, header)
        if kind != 2 or of_channel != channel or size < 14:
            return 0
        body = header + 8 + size
        if body > end:
            return -1
        _, _, length, flags = _CONTENT.unpack_from(buffer, header + 7)
        if length > BODY_BYTES_MAX:
            return 0
        after: int = body
        if length:
            if end - body < 8:
                return -1
            kind, of_channel, piece = _FRAME.unpack_from(buffer, body)
            if kind != 3 or of_channel != channel or piece != length:
                return 0
            if body + 8 + length > end:
                return -1
            content, after = buffer[body + 7 : body + 7 + length], body + 8 + length
        else:
            content = b""
        if buffer[header - 1] != 0xCE or buffer[body - 1] != 0xCE or buffer[after - 1] != 0xCE:
            return 0  # pika complains
        notes = self._notes(buffer, header + 21, body - 1, flags)
        take(_TAG.unpack_from(buffer, tag_at)[0], bool(buffer[tag_at + 8] & 1), notes, content)
        return after

    def _notes(self, buffer: bytes, at: int, end: int, flags: int) -> Any:
        if flags & ~(_TYPE | _HEADERS | _MODE | _PRIORITY | _ID):
            properties = pika.BasicProperties()
            properties.decode(buffer[at - 2 : end])
            return properties
        content_type = headers = priority = message_id = None
        if flags & _TYPE:
            length = buffer[at]
            content_type = str(buffer[at + 1 : at + 1 + length], "utf-8", "replace")
            at += 1 + length
        if flags & _HEADERS:
            length = 4 + int.from_bytes(buffer[at : at + 4], "big")
            headers = self._table(buffer[at : at + length])
            at += length
        if flags & _MODE:
            at += 1
        if flags & _PRIORITY:
            priority = buffer[at]
            at += 1
        if flags & _ID:
            message_id = str(buffer[at + 1 : at + 1 + buffer[at]], "utf-8", "replace")
        return Notes(content_type, headers, priority, message_id)

    def _table(self, encoded: bytes) -> dict[str, Any]:
        """Most tables are the same few: a count that the broker added. Callers don't change them."""
        table = self._tables.get(encoded)
        if table is None:
            if len(self._tables) >= _TABLES_MAX:
                self._tables.clear()
            table = self._tables[encoded] = pika_data.decode_table(encoded, 0)[0]
        return table
