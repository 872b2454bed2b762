"""What all conformance kits are made of: which tests apply to a plugin, and that none of those can be left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dray.core.contracts import Plugin
from dray.testing import report

EXAMPLES_VARIABLE = "DRAY_CONFORMANCE_EXAMPLES"
"""How much longer than usual the tests shall look that try many things."""
_HOME = __name__.rpartition(".")[0]


class Conformance:
    """The part of each kit that decides what a plugin has to prove.

    - a test that :func:`~dray.testing.harness.needs` an ability applies to plugins that declare it
    - a declared ability cannot be skipped, and one that no test exercises fails the suite
    - tells the report (``DRAY_CONFORMANCE_REPORT``) how each test ended
    """

    kind: ClassVar[str]
    """As in the group of the entry point: ``transports``, ``backends``, ..."""
    proofs: ClassVar[Mapping[str, str]] = {}
    """Each field of the kind's features, with the ability whose tests prove it; ``contract``: tests of every plugin."""
    tmp_path: Path

    def begin(self, tmp_path: Path) -> None:
        """Before each test: an empty store."""
        self.tmp_path = tmp_path

    def end(self) -> None:
        """After each test: close what it opened."""

    def sample(self) -> Plugin:
        """A plugin as the tests get it, to ask what it declares."""
        raise NotImplementedError

    def abilities(self) -> Mapping[str, bool]:
        """The abilities that tests may need: does the plugin declare them?"""
        return {}

    @pytest.fixture(autouse=True)
    def dray_kit(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
        """See that the test applies, and tell the report."""
        self.begin(tmp_path)
        try:
            report.note(request, self)
            undeclared = self.undeclared(request.function)
            if undeclared:
                pytest.skip(f"not applicable: {type(self).__name__} does not declare {', '.join(undeclared)}")
            yield
        finally:
            self.end()

    def undeclared(self, test: Callable[..., Any]) -> list[str]:
        """The abilities that a test needs and the plugin does not declare."""
        wanted = getattr(test, "dray_needs", ())
        if not wanted:
            return []
        declared = self.abilities()
        return [ability for ability in wanted if not declared[ability]]

    @classmethod
    def kit_tests(cls) -> dict[str, tuple[str, ...]]:
        """The kit's tests, each with the abilities that it needs."""
        return {
            name: getattr(function, "dray_needs", ())
            for base in reversed(cls.__mro__)
            if base.__module__.startswith(f"{_HOME}.")
            for name, function in vars(base).items()
            if name.startswith("test_")
        }

    def test_nothing_that_is_declared_goes_unproven(self) -> None:
        tests = self.kit_tests()
        replaced = sorted(
            name
            for base in type(self).__mro__
            if not base.__module__.startswith(f"{_HOME}.")
            for name in vars(base).keys() & tests.keys()
        )
        assert not replaced, f"{type(self).__name__} replaces tests of the kit: {', '.join(replaced)}"
        exercised = {"contract", *(ability for needed in tests.values() for ability in needed)}
        features = getattr(self.sample(), "features", None)
        declared = {ability for ability, is_declared in self.abilities().items() if is_declared}
        if features is not None:
            unknown = {field.name for field in dataclasses.fields(features)} - self.proofs.keys()
            assert not unknown, f"no test of the kit proves these features: {', '.join(sorted(unknown))}"
            assert exercised >= set(self.proofs.values()), "a feature of the contract has no test in the kit"
        assert declared <= exercised, f"declared, but no test exercises it: {', '.join(sorted(declared - exercised))}"
