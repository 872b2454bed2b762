"""``dray call``: queue a task from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dray.cli.apps import app_options, find_app
from dray.cli.output import as_json
from dray.cli.params import OBJECT, SECONDS, NumbersCommand, json_or_text
from dray.cli.result import show_end
from dray.core.errors import NoResults, UnknownTask

if TYPE_CHECKING:
    from dray.core.app import Dray


@click.command("call", cls=NumbersCommand)
@click.argument("words", nargs=-1, required=True, metavar="[MODULE:APP] TASK [ARG]...")
@app_options
@click.option("--kwargs", type=OBJECT, help="Keyword arguments, as a JSON object.")
@click.option("--queue", help="The queue, instead of the task's own.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher first.")
@click.option("--countdown", type=SECONDS, help="Not before this much time has passed: 30, 5m, 2h.")
@click.option("--expires", type=SECONDS, help="Not started after this much time: 30, 5m, 2h.")
@click.option("--id", "task_id", help="The task's id; default: a new one.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout", type=SECONDS, help="Wait this long at most.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def call_command(
    words: tuple[str, ...],
    target: str | None,
    config: str | None,
    kwargs: dict[str, Any] | None,
    wait: bool,
    timeout: float | None,
    json_: bool,
    **options: Any,
) -> None:
    """Queue a task; print its id, or wait for its result.

    TASK is the task's name, or the end of it ('add' for 'tasks.add'). Each ARG is JSON if it can be read as JSON, else
    text: 2, true, '[1, 2]', hello.

    \b
    dray call tasks:app add 2 3 --wait
    """
    rest = list(words)
    if target is None and ":" in rest[0]:
        target = rest.pop(0)
    if not rest:
        raise click.UsageError("which task? its name is missing")
    wait = wait or timeout is not None
    with find_app(target, config) as app:
        name = find_task(app, rest[0])
        if wait and not app.backend.features.keeps:
            raise NoResults(
                "--wait: no results are kept; add 'backend: sqlite' (or another) to the callers' configuration and "
                "the workers'"
            )
        given = {key: value for key, value in options.items() if value is not None}
        result = app.send_task(name, [json_or_text(word) for word in rest[1:]], kwargs or {}, **given)
        if wait:
            show_end(result, timeout, json_=json_)
        elif json_:
            as_json({"id": result.id, "task": name})
        else:
            click.echo(result.id)


def find_task(app: Dray, name: str) -> str:
    """The full name of a task. Raises ``UnknownTask``."""
    if app.registry.get(name) is not None:
        return name
    ends = sorted(task.name for task in app.registry if task.name.endswith(f".{name}"))
    if len(ends) > 1:
        raise UnknownTask(f"several tasks are named {name!r}: {', '.join(ends)}; give one in full")
    if not ends:
        raise UnknownTask(f"no task {name!r} in this application{_near(app, name)}")
    return ends[0]


def _near(app: Dray, name: str) -> str:
    import difflib

    short = {task.name.rpartition(".")[2]: task.name for task in app.registry}
    near = difflib.get_close_matches(name, short, 1)
    return f"; did you mean {near[0]!r} ({short[near[0]]})?" if near else app.registry.hint(name)
