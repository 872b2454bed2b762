"""Writes docs/reference/configuration.md from the dataclasses that the configuration is checked against.

``--check`` writes nothing and fails when the committed page is stale. The text of an option is the string under its
field in the source; an option without one fails, so that no option stays unexplained.
"""

# ruff: noqa: T201
from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from dray.core.config import Config, load, settings
from dray.core.options import Min
from dray.core.plugins import KINDS, PluginChoice
from dray.core.schema import docs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"
HEAD = """\
<!-- Written by scripts/generate_docs.py from the source: change the option's docstring, then `make docs-generate`. -->

# Configuration reference

A *duration* is `30`, `"30s"`, `"500ms"`, `"5m"`, `"1h30m"` or `"7d"`; a *size* is `4096`, `"8KiB"` or `"1MB"`.
A *plugin* is a name (`sqlite`), a URL whose scheme is the name, or a mapping with `use:` and the plugin's own options.
Any other key, or a value of another type, is an error that names the file, the line and the nearest right key.
"""
# Only our own plugins: what else is installed must not change the page.
ENTRIES = metadata.distribution("dray").entry_points
MARKS = {"seconds": "duration", "size": "size", "secret": "text (secret)"}
DURATIONS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"), (0.001, "ms"))
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "anything"}


def main() -> int:
    text = "\n".join(page()).rstrip() + "\n"
    if "--check" not in sys.argv:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is stale: run `make docs-generate` and commit the result", file=sys.stderr)
        return 1
    return 0


def page() -> Iterator[str]:
    yield HEAD
    yield "## Settings\n"
    for cls in nested(Config):
        if cls is not Config:
            yield f"### {spaced(cls.__name__)}\n"
        yield from section(cls)
    for kind in KINDS:
        ours = sorted((entry.name, entry) for entry in ENTRIES if entry.group == f"dray.{kind}")
        if ours:
            yield f"## {kind.capitalize()}\n"
        for name, entry in ours:
            others = [other for other, same in ours if same.value == entry.value and other != name]
            if others and name != entry.module.rpartition(".")[2]:
                continue  # another name of a plugin that has its section
            plugin = entry.load()
            options = getattr(plugin, "Options", None)
            yield f"### {kind}: {name}\n"
            yield f"{summary(plugin)}\n"
            if others:
                yield f"Also chosen by: {', '.join(f'`{other}`' for other in others)}.\n"
            yield from section(options) if options and dataclasses.fields(options) else ["It has no options.\n"]


def section(cls: type) -> Iterator[str]:
    """A table of the options of one dataclass."""
    if cls is not Config and not summary(cls).startswith(f"{cls.__name__}("):  # the text that dataclass makes up
        yield f"{summary(cls)}\n"
    said = docstrings(cls)
    kinds = typing.get_type_hints(cls, include_extras=True)
    # In these classes some fields are not written in the file.
    keys = settings() if cls is Config else getattr(cls, "KEYS", kinds)
    yield "| option | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        name, kind = field.name, kinds[field.name]
        if name not in keys:
            continue
        if name not in said:
            raise SystemExit(f"{cls.__module__}.{cls.__name__}.{name} has no docstring under it")
        default = filled_in(name, kind) if cls is Config else default_text(field, kind)
        cells = (f"`{name}`", kind_text(kind), default, said[name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def nested(cls: type, seen: list[type] | None = None) -> list[type]:
    """The dataclass and those that its fields hold, in the order of the fields."""
    seen = [] if seen is None else seen
    seen.append(cls)
    for kind in typing.get_type_hints(cls, include_extras=True).values():
        for part in parts(kind):
            if isinstance(part, type) and dataclasses.is_dataclass(part) and part not in (PluginChoice, *seen):
                nested(part, seen)
    return seen


def parts(kind: Any) -> Iterator[Any]:
    yield kind
    for argument in get_args(kind):
        yield from parts(argument)


def docstrings(cls: type) -> dict[str, str]:
    """The string under each field, those of the bases included, on one line and as Markdown."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: markdown(text) for base in bases for name, text in docs(base).items()}


def markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def summary(cls: type) -> str:
    return markdown((inspect.getdoc(cls) or "").partition("\n\n")[0])


def spaced(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()


def kind_text(kind: Any) -> str:
    """A type in the words of the page's head."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return marked_text(*arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_text(part) for part in arguments if part is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {kind_text(arguments[0])} to {kind_text(arguments[1])}"
    if isinstance(origin, type):
        return f"list of {kind_text(arguments[0])}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{name}`" for name in kind.__members__)
    if dataclasses.is_dataclass(kind):
        name = spaced(typing.cast(type, kind).__name__)
        return f"[{name.lower()}](#{name.lower().replace(' ', '-')})"
    return WORDS.get(kind) or str(getattr(kind, "__name__", kind)).lower()


def marked_text(base: Any, *marks: Any) -> str:
    for mark in marks:
        if mark in KINDS:
            return f"[plugin](#{mark})" if any(entry.group == f"dray.{mark}" for entry in ENTRIES) else "plugin"
        if mark in MARKS:
            return MARKS[mark]
        if isinstance(mark, Min):
            return f"{kind_text(base)} from {mark.value}"
    return kind_text(base)


def filled_in(name: str, kind: Any) -> str:
    """The default of a setting as the loader fills it in: some depend on whether there is a file."""
    with tempfile.TemporaryDirectory() as empty:
        without_file = value_text(getattr(load(environ={}, cwd=Path(empty)), name), kind)
    with_file = value_text(getattr(load(source={}, environ={}), name), kind)
    return with_file if with_file == without_file else f"{with_file}; without a file {without_file}"


def default_text(field: dataclasses.Field[Any], kind: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return value_text(field.default_factory(), kind)
    return "**required**" if field.default is dataclasses.MISSING else value_text(field.default, kind)


def value_text(value: Any, kind: Any) -> str:
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, PluginChoice):
        return f"`{value.use}`"
    if isinstance(value, enum.Enum):
        return f"`{value.name}`"
    if isinstance(value, Mapping | tuple):
        return ", ".join(f"`{item}`" for item in value)
    if dataclasses.is_dataclass(value):
        return "see below"
    return f"`{measure_text(value, kind)}`"


def measure_text(value: Any, kind: Any) -> str:
    """A number with the unit that one would write."""
    units = DURATIONS if "seconds" in parts(kind) else SIZES if "size" in parts(kind) else ()
    for factor, unit in units:
        if value >= factor and value % factor == 0:
            return f"{value / factor:g}{unit}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
