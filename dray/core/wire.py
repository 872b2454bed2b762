"""One byte frame for stores that carry only bytes: headers and body in one value.

Layout: ``b"D"``, version (1 byte, 1), length of the header block (4 bytes, big endian), header block, body. The
header block is ``key NUL value NUL key NUL value`` in UTF-8; keys and values therefore hold no NUL.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache

from dray.core.errors import DecodeError, EncodeError

_HEAD = struct.Struct(">2sI")
_MAGIC = b"D\x01"
_ALIKE, _ALIKE_BYTES = 256, 256
"""So many header blocks, and so long ones, are remembered: most messages of a task have the same headers."""


def pack_headers(headers: Mapping[str, str]) -> bytes:
    """The header block alone. Raises ``EncodeError`` for a NUL in a key or a value, or a lone surrogate."""
    alike = len(headers) == 2  # task and serializer, nothing that only this call has
    return (_join_once if alike else _join)(tuple(headers.items()))


def _join(items: tuple[tuple[str, str], ...]) -> bytes:
    flat = [part for item in items for part in item]
    text = "\0".join(flat)
    if text.count("\0") != max(len(flat) - 1, 0):
        raise EncodeError("a header key or value holds a NUL character")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"a header is not valid Unicode text: {error}") from error


def unpack_headers(block: bytes) -> dict[str, str]:
    """The inverse of :func:`pack_headers`; raises ``DecodeError``. Not to be changed: equal blocks may share it."""
    return (_split_once if len(block) <= _ALIKE_BYTES else _split)(block)


def _split(block: bytes) -> dict[str, str]:
    if not block:
        return {}
    try:
        parts = str(block, "utf-8").split("\0")
    except UnicodeDecodeError as error:
        raise DecodeError(f"headers are not UTF-8: {error}") from error
    if len(parts) % 2:
        raise DecodeError("headers are cut off: a key has no value")
    headers = dict(zip(parts[::2], parts[1::2], strict=True))
    if len(headers) * 2 != len(parts):
        raise DecodeError("a header is given twice")
    return headers


_join_once = lru_cache(_ALIKE)(_join)
_split_once = lru_cache(_ALIKE)(_split)


def pack(headers: Mapping[str, str], body: bytes) -> bytes:
    """Headers and body as one frame."""
    block = pack_headers(headers)
    return b"".join((_HEAD.pack(_MAGIC, len(block)), block, body))


def unpack(frame: bytes) -> tuple[dict[str, str], bytes]:
    """The inverse of :func:`pack`; raises ``DecodeError`` for anything that :func:`pack` did not make."""
    if len(frame) < _HEAD.size:
        raise DecodeError(f"the frame is cut off: {len(frame)} bytes, {_HEAD.size} at least")
    magic, length = _HEAD.unpack_from(frame)
    if magic != _MAGIC:
        raise DecodeError(f"not a frame of dray's, or of a newer version: it starts with {magic!r}")
    end = _HEAD.size + length
    if end > len(frame):
        raise DecodeError(f"the frame is cut off: its headers need {length} bytes, {len(frame) - _HEAD.size} are there")
    return unpack_headers(frame[_HEAD.size : end]), frame[end:]
