"""The kits catch plugins that are wrong in one way, and pass those that are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase

from dray.testing import pool_kit
from dray.testing.transport_machine import run_machine
from tests.kit_runner import first_failure
from tests.mutants import NOT_FOR_THE_MACHINE, TRANSPORT_MUTANTS, ReferenceKit, Stepwise, kit_of
from tests.mutants_least import LEAST_MUTANTS, DeafBroadcast, LeastKit
from tests.mutants_other import BACKEND_MUTANTS, POOL_MUTANTS, BackendKit, PoolKit

MACHINE = ["test_state_machine"]
EXAMPLES = 200


@pytest.fixture
def machine_kit(tmp_path: Path) -> Iterator[list[ReferenceKit]]:
    """A list for kits that are closed at the end."""
    kits: list[ReferenceKit] = []
    yield kits
    for kit in kits:
        kit.end()


def begun(kit_class: type[ReferenceKit], folder: Path, kits: list[ReferenceKit]) -> ReferenceKit:
    kit = kit_class()
    kit.begin(folder)
    kits.append(kit)
    return kit


@pytest.mark.parametrize("kit_class", [kit_of(), kit_of(Stepwise), LeastKit], ids=["reference", "stepwise", "least"])
def test_right_transports_pass(kit_class: type[ReferenceKit], tmp_path: Path) -> None:
    assert first_failure(kit_class, tmp_path) is None


@pytest.mark.parametrize("name", TRANSPORT_MUTANTS)
def test_the_tests_catch_a_transport(name: str, tmp_path: Path) -> None:
    assert first_failure(TRANSPORT_MUTANTS[name], tmp_path, leave_out=MACHINE) is not None


@pytest.mark.parametrize("name", sorted(TRANSPORT_MUTANTS.keys() - NOT_FOR_THE_MACHINE))
def test_the_machine_catches_a_transport(name: str, tmp_path: Path, machine_kit: list[ReferenceKit]) -> None:
    kit = begun(TRANSPORT_MUTANTS[name], tmp_path, machine_kit)
    with pytest.raises(AssertionError):
        run_machine(kit, EXAMPLES, [Phase.generate])


@pytest.mark.parametrize("name", LEAST_MUTANTS)
def test_what_is_not_declared_must_be_refused(name: str, tmp_path: Path) -> None:
    transport, test = LEAST_MUTANTS[name]
    kit_class = type("Kit", (LeastKit,), {"least": transport})
    assert first_failure(kit_class, tmp_path, leave_out=kit_class.kit_tests().keys() - {test}) == test


def test_a_broadcast_that_not_all_hear_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.testing.transport_refusals.PROMPT_S", 0.2)
    kit_class = type("Kit", (LeastKit,), {"least": DeafBroadcast})
    test = "test_a_broadcast_reaches_all_who_listen_and_nobody_else"
    assert first_failure(kit_class, tmp_path, leave_out=kit_class.kit_tests().keys() - {test}) == test


@pytest.mark.parametrize("name", BACKEND_MUTANTS)
def test_the_tests_catch_a_back_end(name: str, tmp_path: Path) -> None:
    assert first_failure(type("Kit", (BackendKit,), {"backend": BACKEND_MUTANTS[name]}), tmp_path) is not None


@pytest.mark.parametrize("name", POOL_MUTANTS)
def test_the_tests_catch_a_pool(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_kit, "PATIENCE_S", 2.0)
    assert first_failure(type("Kit", (PoolKit,), {"pool": POOL_MUTANTS[name]}), tmp_path) is not None


# --- nothing that is declared can be left out --------------------------------------------------------------


def test_a_test_of_the_kit_cannot_be_taken_away(tmp_path: Path) -> None:
    kit_class = type("Kit", (ReferenceKit,), {"test_settling_twice_is_harmless": None})
    only = "test_nothing_that_is_declared_goes_unproven"
    assert first_failure(kit_class, tmp_path, leave_out=kit_class.kit_tests().keys() - {only}) == only


def test_an_ability_without_a_test_fails_the_suite(tmp_path: Path) -> None:
    class Boasting(ReferenceKit):
        def abilities(self) -> dict[str, bool]:
            return {**super().abilities(), "teleports": True}

    only = "test_nothing_that_is_declared_goes_unproven"
    assert first_failure(Boasting, tmp_path, leave_out=Boasting.kit_tests().keys() - {only}) == only
