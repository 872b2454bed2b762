"""What a plugin author, or a user who tests tasks, needs: conformance kits and a clock that tests own.

Importing this module needs nothing beyond dray; the kits need ``pip install "dray[testing]"`` once they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dray.testing.backends import ResultBackendConformance
    from dray.testing.clock import FakeClock
    from dray.testing.compressors import CompressorConformance
    from dray.testing.driver import Call, InlineWorker, Run
    from dray.testing.harness import plugin_context
    from dray.testing.pools import PoolConformance
    from dray.testing.serializers import SerializerConformance
    from dray.testing.transports import TransportConformance

__all__ = [
    "Call",
    "CompressorConformance",
    "FakeClock",
    "InlineWorker",
    "PoolConformance",
    "ResultBackendConformance",
    "Run",
    "SerializerConformance",
    "TransportConformance",
    "plugin_context",
]

_HOMES = {
    "Call": "dray.testing.driver",
    "CompressorConformance": "dray.testing.compressors",
    "FakeClock": "dray.testing.clock",
    "InlineWorker": "dray.testing.driver",
    "PoolConformance": "dray.testing.pools",
    "ResultBackendConformance": "dray.testing.backends",
    "Run": "dray.testing.driver",
    "SerializerConformance": "dray.testing.serializers",
    "TransportConformance": "dray.testing.transports",
    "plugin_context": "dray.testing.harness",
}
_TESTS = ("backends", "compressors", "pools", "serializers", "transports", "transport_delivery", "transport_abilities")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Conformance"):
        import pytest

        # Failing assertions of the kit then show their values, as those of a test module do.
        pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _TESTS))
    return getattr(importlib.import_module(_HOMES[name]), name)
