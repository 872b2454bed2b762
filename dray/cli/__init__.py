"""The command line: ``dray``. Each command's module is imported when the command is used, not before."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from dray import __version__
from dray.core.errors import (
    ConfigError,
    DrayError,
    EncodeError,
    InvalidArguments,
    InvalidName,
    UnknownTask,
)

COMMANDS = {
    "worker": ("worker", "Run tasks until stopped."),
    "call": ("call", "Queue a task; print its id, or wait for its result."),
    "result": ("result", "Show what became of a task."),
    "revoke": ("result", "Cancel tasks: what has not started never starts."),
    "queues": ("queues", "Show how full the queues are."),
    "purge": ("queues", "Delete all that waits in a queue."),
    "dead": ("dead", "List, show, requeue or purge dead letters."),
    "plugins": ("plugins", "List the installed plugins."),
    "doctor": ("doctor", "Prove that the configured plugins work, by using them."),
    "config": ("config", "Show or check the configuration; print its JSON Schema."),
    "bench": ("bench", "Measure this machine with tasks that do nothing."),
    "demo": ("demo", "Watch dray at work on real files."),
    "verify-ledger": ("verify_ledger", "Audit what was sent, what ran and what the stores say."),
    "new": ("new", "Write the start of a task module or of a plugin."),
}
"""Each command: the module under ``dray.cli`` that holds ``<name>_command``, and its line in ``dray --help``."""

USAGE_ERRORS = (ConfigError, EncodeError, InvalidArguments, InvalidName, UnknownTask)


class Failure(click.ClickException):
    """An error that people see: its text on stderr, no traceback."""

    def show(self, file: Any = None) -> None:
        click.echo(f"dray: {self.message}", file=file or sys.stderr)


class Mistake(Failure):
    """The same where the command line or the configuration is wrong: doing it again would not help."""

    exit_code = 2


class Commands(click.Group):
    """The group of all commands: knows their names, imports the one that is used, turns dray's errors into text."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dray.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DrayError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            kind = Mistake if isinstance(error, USAGE_ERRORS) else Failure
            raise kind(str(error) or type(error).__name__) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dray", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="DRAY_DEBUG", help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """dray runs background tasks for Python programs. Start with: dray demo"""
    del debug


def main() -> None:
    """The entry point."""
    cli.main(prog_name="dray")
