"""gzip: zlib's stream with the wrapper that other programs know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dray.plugins._compression import DeflateCompressor


class GzipCompressor(DeflateCompressor):
    """One gzip stream."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of ``gzip``."""

        level: int = 6
        """0 (no compression) to 9 (smallest)."""

    api: ClassVar[int] = 1
    name: ClassVar[str] = "gzip"
    wbits: ClassVar[int] = 31
