"""Runs a conformance kit inside one test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dray.testing.kit import Conformance


def first_failure(kit_class: type[Conformance], folder: Path, *, leave_out: Sequence[str] = ()) -> str | None:
    """Run a kit's tests, as pytest would; the name of the first one that fails."""
    for name in kit_class.kit_tests():
        if name in leave_out:
            continue
        test = getattr(kit_class, name)
        for number, arguments in enumerate(_arguments(test)):
            kit = kit_class()
            place = folder / f"{name}-{number}"
            place.mkdir(parents=True)
            kit.begin(place)
            try:
                if not kit.undeclared(test):
                    test(kit, **arguments, **_fixtures(kit, test))
            except (Exception, pytest.fail.Exception):
                return name
            finally:
                kit.end()
    return None


def _arguments(test: Any) -> Iterator[dict[str, Any]]:
    """What ``parametrize`` asks for."""
    columns = [
        [{mark.args[0]: value} for value in mark.args[1]]
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "parametrize"
    ]
    for row in itertools.product(*columns):
        yield {key: value for cell in row for key, value in cell.items()}


def _fixtures(kit: Any, test: Any) -> dict[str, Any]:
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    offered = {"start": lambda: kit.started, "harness": lambda: kit.started(2)}
    return {name: make() for name, make in offered.items() if name in wanted}
