"""The transport kit over every transport in the tree."""

from __future__ import annotations

import pytest

from dray.core.clock import Clock
from dray.core.contracts import Transport
from dray.plugins._memory import MemoryStore
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing import TransportConformance, plugin_context


class TestMemory(TransportConformance):
    @pytest.fixture(autouse=True)
    def store(self) -> None:
        self.shared = MemoryStore()

    def make(self, clock: Clock) -> Transport:
        if not hasattr(self, "shared"):
            self.shared = MemoryStore()
        return MemoryTransport(MemoryOptions(), plugin_context("memory", clock), self.shared)
