"""LZMA in the xz container: the smallest, and the slowest to write."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import ClassVar

from dray.plugins._compression import LevelledCompressor, read_bounded

_MEMORY_BYTES_MAX = 80 * 2**20  # level 9 needs 65 MiB; a header may claim gigabytes


class LzmaCompressor(LevelledCompressor):
    """One xz stream."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of ``lzma``."""

        level: int = 1
        """0 to 9. Memory for writing grows from 3 MB at 0, over 9 MB at 1 and 94 MB at 6, to 674 MB at 9."""

    api: ClassVar[int] = 1
    name: ClassVar[str] = "lzma"
    levels: ClassVar[range] = range(10)

    def compress(self, data: bytes) -> bytes:
        return lzma.compress(data, preset=self.options.level)

    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES_MAX)
        return read_bounded(stream, data, max_bytes, self.name, lzma.LZMAError)
