"""From ``module:app`` on the command line, or the configuration's ``imports``, to the application object."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from dray.core.app import Dray
from dray.core.errors import ConfigError, DrayError

F = TypeVar("F", bound=Callable[..., Any])
TRACEBACK_LINES = 12


def app_options(function: F) -> F:
    """The options ``--app`` and ``--config``, as ``target`` and ``config``."""
    function = click.option("--config", metavar="FILE", help="The configuration: a YAML file, or a module's name.")(
        function
    )
    return click.option("-A", "--app", "target", metavar="MODULE:APP", help="The application.")(function)


def find_app(target: str | None, config: str | None, *, tasks: bool = True) -> Dray:
    """The application; with ``tasks``, all of its task modules are imported. Raises ``ConfigError``.

    Without a target it is the one in the modules that the configuration imports; a command that needs no tasks makes
    its own from the configuration alone.
    """
    _look_here()
    if target is not None:
        app = _named(target)
        if config is not None:
            _configure(app, target, config)
    elif tasks:
        app = _imported(config)
    else:
        app = Dray(config=config)
    if tasks:
        with users_import("the modules under 'imports'"):
            app.import_tasks()
    return app


def _look_here() -> None:
    """The working directory is where people keep their task modules."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _named(target: str) -> Dray:
    module_name, _, attribute = target.partition(":")
    module = _import(module_name)
    if not attribute:
        return _only_app([module], f"{module_name}:NAME")
    value: object = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{module_name} has no {attribute!r}{_suggest(attribute, _apps(module))}")
        value = getattr(value, part)
    if not isinstance(value, Dray):
        raise ConfigError(f"{target} is no Dray application but {_a(value)}{_suggest(attribute, _apps(module))}")
    return value


def _imported(config: str | None) -> Dray:
    """The one application in the modules that the configuration imports."""
    plain = Dray(config=config)
    imports = plain.config.imports
    if not imports:
        where = plain.config.path or "no dray.yaml here or above"
        raise ConfigError(
            f"which application? Name it, as in 'tasks:app', or list its module under 'imports' ({where} lists none)"
        )
    base = str(plain.config.base)
    if base not in sys.path:
        sys.path.insert(0, base)
    app = _only_app([_import(name) for name in imports], "MODULE:NAME")
    if config is not None:
        _configure(app, "the application", config)
    return app


def _only_app(modules: list[ModuleType], form: str) -> Dray:
    found = {id(app): (f"{module.__name__}:{name}", app) for module in modules for name, app in _apps(module).items()}
    names = ", ".join(module.__name__ for module in modules)
    if not found:
        raise ConfigError(f"no Dray application in {names}; it needs one: app = Dray()")
    if len(found) > 1:
        raise ConfigError(f"several applications: {', '.join(name for name, _ in found.values())}; say which: {form}")
    return next(iter(found.values()))[1]


def _apps(module: ModuleType) -> dict[str, Dray]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Dray)}


def _configure(app: Dray, name: str, config: str) -> None:
    try:
        app.configure(config)
    except ConfigError as error:
        raise ConfigError(
            f"--config {config} comes too late: {name} was used while it was imported ({error})"
        ) from error


def _import(name: str) -> ModuleType:
    if name.endswith(".py") or "/" in name:
        raise ConfigError(f"{name!r} is a file; name the module, from its folder: {Path(name).stem}:app")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{name!r} is no module's name; an application is named as in 'tasks:app'")
    try:
        with users_import(name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = Path.cwd()
        near = [path.stem for path in here.glob("*.py")] + [path.parent.name for path in here.glob("*/__init__.py")]
        raise ConfigError(f"no module {name!r} (looked in {here} and the Python path){_suggest(name, near)}") from error


@contextlib.contextmanager
def users_import(name: str) -> Iterator[None]:
    """Whatever a user's module raises while it is imported becomes a ``ConfigError`` with the traceback's end.

    That the very module ``name`` is not there stays ``ModuleNotFoundError``.
    """
    try:
        yield
    except DrayError:
        raise
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise
        raise ConfigError(f"importing {name} failed:\n{_end_of_traceback(error)}") from error


def _end_of_traceback(error: BaseException) -> str:
    """The user's part of a traceback: without our frames and the import system's."""
    own = (str(Path(__file__).parents[1]), "<frozen importlib")
    machinery = str(Path(importlib.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith((*own, machinery))] or list(frames)
    lines = [*traceback.format_list(users), *traceback.format_exception_only(error)]
    return "\n".join("".join(lines).splitlines()[-TRACEBACK_LINES:])


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are: {', '.join(sorted(known)[:10])}" if known else ""


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
