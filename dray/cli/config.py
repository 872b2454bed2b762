"""``dray config``: the settings in effect, their check, their schema."""

from __future__ import annotations

import click

from dray.cli import Mistake
from dray.cli.apps import app_options, find_app
from dray.cli.output import as_json, plain, table


@click.group("config")
def config_command() -> None:
    """Show or check the configuration; print its JSON Schema."""


@config_command.command("show")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@click.option("--set", "only_set", is_flag=True, help="Leave the defaults out.")
@app_options
def show_config(json_: bool, only_set: bool, target: str | None, config: str | None) -> None:
    """Show every setting in effect and where it was given. Secrets are masked."""
    from dray.core.show import show

    found = find_app(target, config, tasks=target is not None).config
    rows = [row for row in show(found) if not only_set or row.origin != "default"]
    if json_:
        as_json([{"path": r.path, "value": r.value, "origin": r.origin, "problem": r.problem} for r in rows])
        return
    table(
        ("setting", "value", "given in"),
        [(r.path, plain(r.value) if r.problem is None else f"{plain(r.value)}: {r.problem}", r.origin) for r in rows],
        title=f"configuration: {found.path or 'no file, defaults'}",
    )


@config_command.command("check")
@app_options
def check_config(target: str | None, config: str | None) -> None:
    """Check the configuration: every key, every value, every plugin that it names. Connects to nothing."""
    from dray.core import plugins
    from dray.core.config import choices
    from dray.core.errors import ConfigError

    found = find_app(target, config, tasks=target is not None).config
    problems = []
    for kind, _, choice in choices(found):
        try:
            plugins.configure(kind, choice, found.plugins.allow)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise Mistake("\n      ".join(dict.fromkeys(problems)))
    click.echo(f"{found.path or 'no file, defaults'}: fine")


@config_command.command("schema")
def schema_config() -> None:
    """Print the JSON Schema of dray.yaml, with the options of the plugins that are installed here."""
    from dray.core.schema import json_schema

    as_json(json_schema())
