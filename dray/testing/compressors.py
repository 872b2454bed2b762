"""The conformance kit for compressors: what :class:`~dray.core.contracts.Compressor` promises, as tests.

A plugin's test module holds a subclass with one method::

    from dray.testing import CompressorConformance, plugin_context

    class TestMine(CompressorConformance):
        def make(self):
            return MyCompressor(MyCompressor.Options(), plugin_context("mine"))

``DRAY_CONFORMANCE_REPORT=path`` writes down what was proven.
"""

from __future__ import annotations

import random
import tracemalloc
from abc import ABC, abstractmethod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray.core.contracts import API_VERSION, Compressor
from dray.core.errors import DecodeError
from dray.testing.harness import Background
from dray.testing.kit import Conformance

LIMIT = 2**20
BOMB_BYTES = 48 * 2**20
SLACK_BYTES = 3 * 2**20

# One test method runs in many subclasses: that is what a kit is for.
_settings = settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None)
_sample = b"All that is gold does not glitter. " * 20 + bytes(range(256))


class CompressorConformance(Conformance, ABC):
    """What every compressor must do."""

    kind = "compressors"

    @abstractmethod
    def make(self) -> Compressor:
        """A compressor, built as the core builds it."""

    def sample(self) -> Compressor:
        return self.make()

    def test_says_who_it_is(self) -> None:
        compressor = self.make()
        assert compressor.api == API_VERSION
        assert compressor.name.isascii()
        assert 1 <= len(compressor.name) <= 16

    @_settings
    @given(st.binary(max_size=2000) | st.binary(max_size=50).map(lambda data: data * 500))
    def test_bytes_survive(self, data: bytes) -> None:
        compressor = self.make()
        packed = compressor.compress(data)
        assert type(packed) is bytes
        assert compressor.decompress(packed, len(data)) == data

    @pytest.mark.parametrize("size", [0, 1, 255, 65_536, 262_143, 262_144, 262_145, 3_000_000])
    def test_any_size_survives(self, size: int) -> None:
        compressor = self.make()
        noise = random.Random(size).randbytes(size)
        for data in (noise, b"\x00" * size, noise[: size // 2] + b"x" * (size - size // 2)):
            assert compressor.decompress(compressor.compress(data), size) == data

    def test_repetition_becomes_small(self) -> None:
        assert len(self.make().compress(b"dray " * 20_000)) < 2000

    @pytest.mark.parametrize("size", [1, 1000, 262_144, 1_000_000])
    def test_one_byte_over_the_bound_is_refused(self, size: int) -> None:
        compressor = self.make()
        packed = compressor.compress(b"x" * size)
        with pytest.raises(DecodeError):
            compressor.decompress(packed, size - 1)
        assert compressor.decompress(packed, size) == b"x" * size

    def test_a_bomb_stays_within_the_bound(self) -> None:
        compressor = self.make()
        bomb = compressor.compress(bytes(BOMB_BYTES))
        assert len(bomb) < BOMB_BYTES // 500
        tracemalloc.start()
        try:
            with pytest.raises(DecodeError):
                compressor.decompress(bomb, LIMIT)
            assert tracemalloc.get_traced_memory()[1] < LIMIT + SLACK_BYTES
        finally:
            tracemalloc.stop()

    def test_every_truncation_is_refused(self) -> None:
        compressor = self.make()
        for data in (b"", b"x", _sample):
            packed = compressor.compress(data)
            for length in range(len(packed)):
                with pytest.raises(DecodeError):
                    compressor.decompress(packed[:length], LIMIT)

    @pytest.mark.parametrize("size", [0, 1, 800, 300_000, 1_000_000])
    def test_what_follows_the_end_is_refused(self, size: int) -> None:
        compressor = self.make()
        packed = compressor.compress(random.Random(size).randbytes(size))
        for extra in (b"\x00", b"x", packed, b"\x00" * 600_000):
            with pytest.raises(DecodeError):
                compressor.decompress(packed + extra, LIMIT * 3)

    def test_every_flipped_byte_is_an_error_or_a_value(self) -> None:
        compressor = self.make()
        packed = compressor.compress(_sample)
        for offset in range(len(packed)):
            for mask in (0x01, 0x80, 0xFF):
                flipped = bytearray(packed)
                flipped[offset] ^= mask
                _decompress(compressor, bytes(flipped))

    @_settings
    @given(st.binary(max_size=300), st.binary(max_size=100))
    def test_random_bytes_are_an_error_or_a_value(self, data: bytes, tail: bytes) -> None:
        compressor = self.make()
        _decompress(compressor, data)
        _decompress(compressor, compressor.compress(b"")[: len(data) % 12] + tail)

    def test_threads_do_not_disturb_each_other(self) -> None:
        compressor = self.make()

        def work(number: int) -> None:
            for step in range(30):
                data = f"{number} {step} ".encode() * 200
                assert compressor.decompress(compressor.compress(data), LIMIT) == data

        background = Background()
        for number in range(8):
            background.start(work, number)
        background.join()


def _decompress(compressor: Compressor, data: bytes) -> None:
    """Whatever is raised beside ``DecodeError`` fails the test, and so does more than was asked for."""
    try:
        assert len(compressor.decompress(data, LIMIT)) <= LIMIT
    except DecodeError as error:
        assert str(error)
