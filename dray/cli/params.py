"""Types of command line values: lengths of time, counts, JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from dray.core.errors import ConfigError
from dray.core.options import parse_seconds

NEGATIVE = re.compile(r"-(\d|\.\d)")


class SecondsType(click.ParamType[float]):
    """``30``, ``500ms``, ``5m``, ``1h30m``: seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_seconds(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class ObjectType(click.ParamType[dict[str, Any]]):
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
            name for param in self.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts
        }
        for at, word in enumerate(args):
            if word == "--":
                break
            if NEGATIVE.match(word) and (at == 0 or args[at - 1] not in takes_value):
                # What follows the first negative number may hold options still: they are moved in front of it.
                options, rest = _split(args[at:], takes_value)
                args = [*args[:at], *options, "--", *rest]
                break
        return super().parse_args(ctx, args)


def _split(words: list[str], takes_value: set[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and arguments."""
    options: list[str] = []
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            return options, rest + words
        if not word.startswith("-") or NEGATIVE.match(word):
            rest.append(word)
        else:
            options.append(word)
            if word in takes_value and words:
                options.append(words.pop(0))
    return options, rest
