"""The pytest plugin that dray's distribution registers: the fixtures ``dray_app`` and ``dray_worker``.

pytest imports this module in every run where dray is installed, so it imports nothing until a fixture is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dray.core.app import Dray
    from dray.testing.driver import InlineWorker

INI = "dray_app"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(INI, "the app that the fixtures dray_app and dray_worker are for, as module:app")


@pytest.fixture
def dray_app(request: pytest.FixtureRequest) -> Dray:
    """The app under test: the one that the ini option ``dray_app = shop.tasks:app`` names.

    Define a fixture of this name to use another one::

        @pytest.fixture
        def dray_app():
            return make_app(settings="test")
    """
    name = str(request.config.getini(INI) or "")
    if not name:
        pytest.fail(
            f"which app? Set `{INI} = module:app` in pytest's configuration, or define a fixture {INI!r}",
            pytrace=False,
        )
    module_name, _, attribute = name.partition(":")
    try:
        app: object = getattr(importlib.import_module(module_name), attribute or "app")
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{INI} = {name}: {error}; it is module:app, importable from here (pytest's `pythonpath` helps)",
            pytrace=False,
        )
    from dray.core.app import Dray

    if not isinstance(app, Dray):
        pytest.fail(f"{INI} = {name}: this is a {type(app).__name__}, not a Dray app", pytrace=False)
    return app


@pytest.fixture
def dray_worker(dray_app: Dray) -> Iterator[InlineWorker]:
    """A :class:`~dray.testing.InlineWorker` for ``dray_app``: memory stores, a clock of its own, no waiting.

    ::

        def test_reminder(dray_worker):
            remind.apply_async((7,), countdown=3600)
            assert dray_worker.run_until_idle() == 0
            assert dray_worker.advance("1h") == 1
    """
    from dray.testing.driver import InlineWorker

    with InlineWorker(dray_app) as worker:
        yield worker
