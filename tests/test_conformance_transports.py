"""The transport kit over every transport in the tree."""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property

from dray.core.clock import Clock
from dray.core.contracts import Transport
from dray.plugins._memory import MemoryStore
from dray.plugins.transports.filesystem import FilesystemTransport
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.plugins.transports.sqlite import SqliteTransport
from dray.testing import TransportConformance, plugin_context
from tests.stores import spoil


class TestMemory(TransportConformance):
    @cached_property
    def store(self) -> MemoryStore:
        return MemoryStore()

    def make(self, clock: Clock) -> Transport:
        return MemoryTransport(MemoryOptions(), plugin_context("memory", clock), self.store)


class TestFilesystem(TransportConformance):
    def make(self, clock: Clock) -> Transport:
        return FilesystemTransport(FilesystemTransport.Options(), plugin_context("filesystem", clock, self.tmp_path))

    def break_store(self) -> None:
        spoil(self.tmp_path / ".dray")


class TestFilesystemWithFsync(TransportConformance):
    machine_examples = 5  # each message waits for the disk

    def make(self, clock: Clock) -> Transport:
        options = FilesystemTransport.Options(path="synced", fsync=True)
        return FilesystemTransport(options, plugin_context("filesystem", clock, self.tmp_path))


class TestSqlite(TransportConformance):
    def make(self, clock: Clock) -> Transport:
        return SqliteTransport(SqliteTransport.Options(), plugin_context("sqlite", clock, self.tmp_path))

    def break_store(self) -> None:
        spoil(self.tmp_path / ".dray" / "dray.db")


def test_the_kit_is_imported_only_when_it_is_used() -> None:
    script = """
import sys
import dray.testing
dray.testing.FakeClock().advance(1)
dray.testing.plugin_context("x")
assert not {"pytest", "hypothesis"} & set(sys.modules)
dray.testing.TransportConformance
assert "pytest" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
