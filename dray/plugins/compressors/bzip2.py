"""bzip2: smaller than zlib on long texts, several times slower."""

from __future__ import annotations

import bz2
from dataclasses import dataclass
from typing import ClassVar

from dray.plugins._compression import LevelledCompressor, read_bounded


class Bzip2Compressor(LevelledCompressor):
    """One bzip2 stream."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of ``bzip2``."""

        level: int = 9
        """1 to 9: the block size in units of 100 kB."""

    api: ClassVar[int] = 1
    name: ClassVar[str] = "bzip2"
    levels: ClassVar[range] = range(1, 10)

    def compress(self, data: bytes) -> bytes:
        return bz2.compress(data, self.options.level)

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        return read_bounded(bz2.BZ2Decompressor(), data, max_bytes, self.name, (OSError, ValueError))
