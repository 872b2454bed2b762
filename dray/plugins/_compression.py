"""What the compressors share: a checked level, and decompression that cannot outgrow its bound."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Protocol

from dray.core.contracts import Compressor, PluginContext
from dray.core.errors import ConfigError, DecodeError

_PIECE_BYTES = 256 * 1024


class Stream(Protocol):
    """One compressed stream being read, in the manner of ``bz2.BZ2Decompressor``."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Take ``data`` in, give at most ``max_length`` bytes; nothing only at the end, or when there is too little."""
        ...

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


class LevelledCompressor(Compressor):
    """A compressor with an option ``level``, which is checked when it is built."""

    levels: ClassVar[range]

    def __init__(self, options: Any, context: PluginContext) -> None:
        super().__init__(options, context)
        if options.level not in self.levels:
            first, last = self.levels[0], self.levels[-1]
            raise ConfigError(f"compression {context.name}: level {options.level} is not between {first} and {last}")


class DeflateCompressor(LevelledCompressor):
    """zlib and gzip: the same stream in different wrappers. ``wbits`` says which."""

    levels = range(10)
    wbits: ClassVar[int]

    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data, self.options.level, self.wbits)

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        return read_bounded(_Inflating(data, self.wbits), b"", max_bytes, self.name, zlib.error)


class _Inflating:
    """zlib's decompressor as a ``Stream``.

    It is fed in slices: zlib copies whatever input it has not used after each call, which would be quadratic.
    """

    def __init__(self, data: bytes, wbits: int) -> None:
        self._rest = memoryview(data)
        self._zlib = zlib.decompressobj(wbits)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        del data  # all of it was given at the start
        while True:
            source: bytes | memoryview = self._zlib.unconsumed_tail
            if not source:
                source, self._rest = self._rest[:_PIECE_BYTES], self._rest[_PIECE_BYTES:]
            piece = self._zlib.decompress(source, max_length)
            if piece or self._zlib.eof or not (self._zlib.unconsumed_tail or self._rest):
                return piece

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data or bytes(self._rest[:1])


def read_bounded(
    stream: Stream, data: bytes, max_bytes: int, name: str, error_types: type[Exception] | tuple[type[Exception], ...]
) -> bytes:
    """All of one stream; raises ``DecodeError`` when it is bad, cut short, followed by anything, or too big."""
    pieces: list[bytes] = []
    left = max_bytes
    while not stream.eof:
        try:
            piece = stream.decompress(data, min(_PIECE_BYTES, left + 1))
        except error_types as error:
            raise DecodeError(f"not valid {name} data: {error}") from error
        data = b""
        left -= len(piece)
        if left < 0:
            raise too_large(name, max_bytes)
        if piece:
            pieces.append(piece)
        elif not stream.eof:
            raise DecodeError(f"not valid {name} data: it is cut short")
    if stream.unused_data:
        raise DecodeError(f"not valid {name} data: something follows its end")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def too_large(name: str, max_bytes: int) -> DecodeError:
    """The error for data that unfolds to more than the bound."""
    return DecodeError(f"the {name} data is larger than {max_bytes} bytes when decompressed")
