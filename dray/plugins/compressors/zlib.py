"""zlib: fast, in every Python. The default choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dray.plugins._compression import DeflateCompressor


class ZlibCompressor(DeflateCompressor):
    """One zlib stream."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of ``zlib``."""

        level: int = 6
        """0 (no compression) to 9 (smallest)."""

    api: ClassVar[int] = 1
    name: ClassVar[str] = "zlib"
    wbits: ClassVar[int] = 15
