"""The network part of the kits: it passes a plugin that is right, and catches those that lie about a connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from dray.testing import backend_network, network, transport_network
from dray.testing.kit import Conformance
from tests.kit_runner import first_failure
from tests.toy_mutants import BACKEND_NETWORK_MUTANTS, NETWORK_MUTANTS, ToyBackendKit, ToyKit


class TestToyTransport(ToyKit):
    machine_examples = 5


class TestToyBackend(ToyBackendKit):
    pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What hangs for ever hangs for long enough in a second."""
    if request.cls is None:
        for module in (network, transport_network, backend_network):
            monkeypatch.setattr(module, "MARGIN_S", 1.0)
            monkeypatch.setattr(module, "RECOVERY_S", 2.0)


@pytest.mark.parametrize("name", NETWORK_MUTANTS)
def test_the_network_tests_catch_a_transport(name: str, tmp_path: Path) -> None:
    assert failure(type("Kit", (ToyKit,), {"transport": NETWORK_MUTANTS[name]}), tmp_path) is not None


@pytest.mark.parametrize("name", BACKEND_NETWORK_MUTANTS)
def test_the_network_tests_catch_a_back_end(name: str, tmp_path: Path) -> None:
    assert failure(type("Kit", (ToyBackendKit,), {"backend": BACKEND_NETWORK_MUTANTS[name]}), tmp_path) is not None


def failure(kit_class: type[Conformance], folder: Path) -> str | None:
    """The first of the network tests that fails."""
    others = [name for name, needs in kit_class.kit_tests().items() if "networked" not in needs]
    return first_failure(kit_class, folder, leave_out=others)
