"""The result back end kit over every back end in the tree."""

from __future__ import annotations

from dray.core.clock import Clock
from dray.core.contracts import NoOptions, ResultBackend
from dray.plugins.backends.filesystem import FilesystemBackend
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.backends.null import NullBackend
from dray.plugins.backends.sqlite import SqliteBackend
from dray.testing import ResultBackendConformance, plugin_context
from tests.stores import spoil


class TestMemory(ResultBackendConformance):
    def make(self, clock: Clock) -> ResultBackend:
        return MemoryBackend(NoOptions(), plugin_context("memory", clock))


class TestNull(ResultBackendConformance):
    def make(self, clock: Clock) -> ResultBackend:
        return NullBackend(NoOptions(), plugin_context("null", clock))


class TestFilesystem(ResultBackendConformance):
    def make(self, clock: Clock) -> ResultBackend:
        return FilesystemBackend(FilesystemBackend.Options(), plugin_context("filesystem", clock, self.tmp_path))

    def break_store(self) -> None:
        spoil(self.tmp_path / ".dray")


class TestFilesystemWithFsync(ResultBackendConformance):
    def make(self, clock: Clock) -> ResultBackend:
        options = FilesystemBackend.Options(path="synced", fsync=True)
        return FilesystemBackend(options, plugin_context("filesystem", clock, self.tmp_path))


class TestSqlite(ResultBackendConformance):
    def make(self, clock: Clock) -> ResultBackend:
        return SqliteBackend(SqliteBackend.Options(), plugin_context("sqlite", clock, self.tmp_path))

    def break_store(self) -> None:
        spoil(self.tmp_path / ".dray" / "dray.db")
