"""MessagePack: smaller and faster than JSON, and it keeps bytes and text apart."""

from __future__ import annotations

from typing import Any, ClassVar

import msgpack

from dray.core.contracts import Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.plugins._plain import from_code, kind_of

_TRUSTED_BYTES_MAX = 4096
"""Above this, input is walked without building anything first: nested arrays may lie about their lengths, and each lie
makes the library reserve room for as many values as there are bytes."""


class MsgpackSerializer(Serializer):
    """Plain data as MessagePack.

    - Bytes and text stay apart; dates, times, durations, decimals and UUIDs are extension types 2 to 7 with a text.
      The standard timestamp of other programs is read as a ``datetime`` in UTC.
    - Tuples arrive as lists. Integers have 64 bits.
    - Keys that are not text (or bytes) are refused: what was packed is read back once, which costs less than asking
      each key, and proves that the other side can read it.
    """

    api: ClassVar[int] = 1
    name: ClassVar[str] = "msgpack"
    content_type: ClassVar[str] = "application/msgpack"

    def dumps(self, value: object) -> bytes:
        try:
            data: bytes = msgpack.packb(value, default=_extension)
            msgpack.unpackb(data, raw=True)
        except EncodeError:
            raise
        except Exception as error:  # the packer's own, or a user's class that raises
            told = None if isinstance(error, UnicodeEncodeError) else error  # its repr holds the whole text
            raise EncodeError(f"the value cannot be sent as msgpack: {_reason(error)}") from told
        return data

    def loads(self, data: bytes) -> object:
        try:
            if len(data) > _TRUSTED_BYTES_MAX:
                _skim(data)
            return msgpack.unpackb(data, object_pairs_hook=_object, ext_hook=from_code, timestamp=3)
        except DecodeError:
            raise
        except (ValueError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
            raise DecodeError(f"not valid msgpack: {str(error) or type(error).__name__}") from error


def _extension(value: object) -> msgpack.ExtType:
    kind = kind_of(value, "msgpack")
    return msgpack.ExtType(kind.code, kind.to_text(value).encode())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DecodeError("not valid msgpack: a map has the same key twice")
    return made


def _skim(data: bytes) -> None:
    """Raise unless all that is announced is there; builds no values."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    unpacker.skip()


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "a text holds a lone surrogate, which UTF-8 cannot carry; pass bytes instead"
    if isinstance(error, RecursionError) or "recursion limit" in str(error):
        return "it contains itself or is nested too deeply; pass something flatter"
    if "map key" in str(error):
        return f"{error}; use text keys, or pass a list of [key, value] pairs"
    return f"{type(error).__name__}: {error}"
