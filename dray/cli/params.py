"""Types of command line values: lengths of time, counts, JSON."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import click

from dray.core.errors import ConfigError
from dray.core.options import parse_seconds

if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
    _ObjectType = click.ParamType[dict[str, Any]]
else:  # click's older releases know no type parameters
    _FloatType = _ObjectType = click.ParamType

NEGATIVE = re.compile(r"-(\d|\.\d)")


class SecondsType(_FloatType):
    """``30``, ``500ms``, ``5m``, ``1h30m``: seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_seconds(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class ObjectType(_ObjectType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            self.fail(f"this is not JSON: {error}; write it as '{{\"name\": 1}}'", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"a JSON object is needed, as '{{\"name\": 1}}', not {value[:60]!r}", param, ctx)
        return found


SECONDS = SecondsType()
OBJECT = ObjectType()
COUNT = click.IntRange(min=1)


def json_or_text(value: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return value


def names(value: str | None) -> tuple[str, ...]:
    """``a,b`` as its parts."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class NumbersCommand(click.Command):
    """A command whose arguments may be negative numbers: ``-1`` is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value = {
            name
            for param in self.params
            if isinstance(param, click.Option) and not param.is_flag
            for name in param.opts
        }
        options: list[str] = []
        arguments: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                arguments.extend(words)
            elif not word.startswith("-") or NEGATIVE.match(word):
                arguments.append(word)
            else:
                options.append(word)
                if word in takes_value:
                    options.extend(itertools.islice(words, 1))
        return super().parse_args(ctx, [*options, "--", *arguments])
