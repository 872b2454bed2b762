"""The compressor kit over every compressor in the tree, and what is particular to ours."""

from __future__ import annotations

import importlib
import lzma
import tracemalloc
import zlib
from typing import Any

import pytest

from dray.core.contracts import Compressor
from dray.core.errors import ConfigError, DecodeError
from dray.testing.compressors import CompressorConformance
from dray.testing.harness import plugin_context

CLASSES = {
    "zlib": "ZlibCompressor",
    "gzip": "GzipCompressor",
    "bzip2": "Bzip2Compressor",
    "lzma": "LzmaCompressor",
    "zstd": "ZstdCompressor",
}


def make(name: str, **options: Any) -> Compressor:
    cls = getattr(importlib.import_module(f"dray.plugins.compressors.{name}"), CLASSES[name])
    compressor = cls(cls.Options(**options), plugin_context(name))
    assert isinstance(compressor, Compressor)
    assert compressor.name == name
    return compressor


class TestZlib(CompressorConformance):
    def make(self) -> Compressor:
        return make("zlib")


class TestGzip(CompressorConformance):
    def make(self) -> Compressor:
        return make("gzip")


class TestBzip2(CompressorConformance):
    def make(self) -> Compressor:
        return make("bzip2")


class TestLzma(CompressorConformance):
    def make(self) -> Compressor:
        return make("lzma")


class TestZstd(CompressorConformance):
    def make(self) -> Compressor:
        return make("zstd")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("level", [-1, 23, 100])
def test_an_impossible_level_is_a_configuration_error(name: str, level: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: level {level} is not between \d and \d+"):
        make(name, level=level)


@pytest.mark.parametrize(("name", "low", "high"), [("zlib", 1, 9), ("gzip", 1, 9), ("lzma", 0, 6), ("zstd", 1, 19)])
def test_the_level_is_used(name: str, low: int, high: int) -> None:
    data = "".join(f"line {number * number} of {number}\n" for number in range(20_000)).encode()
    assert len(make(name, level=high).compress(data)) < len(make(name, level=low).compress(data))


def test_200_megabytes_from_200_kilobytes_stay_bounded() -> None:
    stream = zlib.compressobj(9)
    megabyte = bytes(2**20)
    bomb = b"".join(stream.compress(megabyte) for _ in range(200)) + stream.flush()
    assert len(bomb) < 250_000
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="larger than 1048576 bytes"):
            make("zlib").decompress(bomb, 2**20)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


def test_gzip_can_be_read_by_others_and_is_the_same_each_time() -> None:
    import gzip

    packed = make("gzip").compress(b"dray")
    assert gzip.decompress(packed) == b"dray"
    assert packed == make("gzip").compress(b"dray")


def test_lzma_refuses_a_dictionary_that_would_take_a_gigabyte() -> None:
    greedy = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}])
    with pytest.raises(DecodeError, match="lzma"):
        make("lzma").decompress(greedy, 100)


@pytest.mark.skipif("sys.version_info >= (3, 14)")
def test_zstd_frames_that_do_not_tell_their_size() -> None:
    import zstandard

    stream = zstandard.ZstdCompressor().compressobj()
    packed = stream.compress(b"x" * 500_000) + stream.flush()
    assert zstandard.get_frame_parameters(packed).content_size == zstandard.CONTENTSIZE_UNKNOWN
    assert make("zstd").decompress(packed, 500_000) == b"x" * 500_000
    for bad in (packed[:-1], packed + b"x", packed + packed):
        with pytest.raises(DecodeError):
            make("zstd").decompress(bad, 2_000_000)
    with pytest.raises(DecodeError):
        make("zstd").decompress(packed, 499_999)


@pytest.mark.skipif("sys.version_info >= (3, 14)")
def test_zstd_frames_that_lie_about_their_size() -> None:
    frame = make("zstd").compress(bytes(100_000))
    assert frame[4] & 0xC0 == 0x80  # a four-byte size follows the descriptor
    lying = bytearray(frame)
    lying[5:9] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(DecodeError, match="larger than 1000 bytes"):
        make("zstd").decompress(bytes(lying), 1000)
    lying[5:9] = bytes(4)
    with pytest.raises(DecodeError):
        make("zstd").decompress(bytes(lying), 1_000_000)
