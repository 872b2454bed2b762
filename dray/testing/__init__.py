"""What a plugin author, or a user who tests tasks, needs: conformance kits and a clock that tests own.

Importing this module needs nothing beyond dray; the kits need ``pip install "dray[testing]"`` once they are used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dray.testing.backends import ResultBackendConformance
    from dray.testing.chaos import ChaosProxy, Trouble
    from dray.testing.clock import FakeClock
    from dray.testing.compressors import CompressorConformance
    from dray.testing.driver import Call, InlineWorker, Run
    from dray.testing.harness import plugin_context
    from dray.testing.pools import PoolConformance
    from dray.testing.serializers import SerializerConformance
    from dray.testing.signers import SignerConformance
    from dray.testing.transports import TransportConformance

__all__ = [
    "KIT_VERSION",
    "Call",
    "ChaosProxy",
    "CompressorConformance",
    "FakeClock",
    "InlineWorker",
    "PoolConformance",
    "ResultBackendConformance",
    "Run",
    "SerializerConformance",
    "SignerConformance",
    "TransportConformance",
    "Trouble",
    "plugin_context",
]

KIT_VERSION = "1.0"
"""The version of the conformance kits: the first number rises when a plugin that passed may fail."""

_HOMES = {
    "Call": "dray.testing.driver",
    "ChaosProxy": "dray.testing.chaos",
    "CompressorConformance": "dray.testing.compressors",
    "FakeClock": "dray.testing.clock",
    "InlineWorker": "dray.testing.driver",
    "PoolConformance": "dray.testing.pools",
    "ResultBackendConformance": "dray.testing.backends",
    "Run": "dray.testing.driver",
    "SerializerConformance": "dray.testing.serializers",
    "SignerConformance": "dray.testing.signers",
    "TransportConformance": "dray.testing.transports",
    "Trouble": "dray.testing.chaos",
    "plugin_context": "dray.testing.harness",
}
_TESTS = (
    "backend_life",
    "backend_network",
    "backends",
    "compressors",
    "kit",
    "network",
    "pools",
    "serializers",
    "signers",
    "transports",
    "transport_abilities",
    "transport_crashes",
    "transport_delivery",
    "transport_machine",
    "transport_model",
    "transport_network",
    "transport_ownership",
    "transport_reader",
    "transport_refusals",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Conformance"):
        import pytest

        # Failing assertions of the kit then show their values, as those of a test module do.
        names = (f"{__name__}.{module}" for module in _TESTS)
        pytest.register_assert_rewrite(*(name for name in names if name not in sys.modules))
    return getattr(importlib.import_module(_HOMES[name]), name)
