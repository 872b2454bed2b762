"""``dray new``: the start of a task module, or of a plugin with its tests."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

import click

from dray.cli import Failure, Mistake

KINDS = ("transport", "backend", "serializer", "compressor", "pool")
PLUGIN_NAME = re.compile(r"[a-z][a-z0-9_-]{0,15}")
"""A serializer's or a compressor's name travels with each message, so that it is short."""


@click.group("new")
def new_command() -> None:
    """Write the start of a task module or of a plugin. Never overwrites a file."""


@new_command.command("task-module")
@click.argument("name", default="tasks")
def new_task_module(name: str) -> None:
    """Write NAME.py with two tasks, and dray.yaml, into the working directory."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise Mistake(f"{name!r} cannot be a module's name; use letters, digits and '_'")
    if name in sys.stdlib_module_names or name == "dray":
        raise Mistake(f"a module {name!r} would hide the one that exists; take another name")
    values = {"module": name}
    _write(
        {
            Path(f"{name}.py"): _filled("task_module.py", values),
            Path("dray.yaml"): _filled("dray.yaml", values),
        }
    )
    click.echo("run: dray worker          and, in another terminal: dray call add 2 3 --wait")


@new_command.command("plugin")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
def new_plugin(kind: str, name: str) -> None:
    """Write a distribution dray-NAME with a plugin that works and passes dray's conformance kit."""
    if not PLUGIN_NAME.fullmatch(name):
        raise Mistake(f"{name!r} cannot be a plugin's name; up to 16 of a-z, 0-9, '-' and '_', a letter first")
    values = plugin_values(kind, name)
    folder = Path(values["distribution"])
    if folder.exists():
        raise Mistake(f"{folder} is there already; take another name, or remove it")
    module = values["module"]
    _write(
        {
            folder / "pyproject.toml": _filled("pyproject.toml", values),
            folder / "README.md": _filled("README.md", values),
            folder / f"{module}.py": _filled(f"{kind}.py", values),
            folder / "tests" / f"test_{module}.py": _filled(f"{kind}_test.py", values),
        }
    )
    click.echo(f'run: cd {folder} && pip install -e ".[test]" && pytest')


def plugin_values(kind: str, name: str) -> Mapping[str, str]:
    """What a plugin's templates are filled with."""
    words = re.split(r"[-_]+", name.strip("-_"))
    prefix = "".join(word.capitalize() for word in words)
    return {
        "kind": kind,
        "name": name,
        "distribution": f"dray-{'-'.join(words)}",
        "module": f"dray_{'_'.join(words)}",
        "prefix": prefix,
        "class_name": f"{prefix}{kind.capitalize()}",
    }


def _filled(name: str, values: Mapping[str, str]) -> str:
    text = files("dray.cli").joinpath("templates", f"{name}.tmpl").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _write(texts: Mapping[Path, str]) -> None:
    """Write all of them, or, when one is there already, none."""
    there = [str(path) for path in texts if path.exists()]
    if there:
        raise Mistake(f"{', '.join(there)}: there already, and nothing is overwritten")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            click.echo(f"wrote {path}")
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}") from error
