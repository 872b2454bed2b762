"""``dray result`` and ``dray revoke``: what became of a task, and that nothing shall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dray.cli.apps import app_options, find_app
from dray.cli.output import as_json, plain
from dray.cli.params import SECONDS
from dray.core.errors import NoResults, ResultTimeout
from dray.core.message import State
from dray.core.task import check_id

if TYPE_CHECKING:
    from dray.core.result import AsyncResult


@click.command("result")
@click.argument("task_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until the task has ended.")
@click.option("--timeout", type=SECONDS, help="Wait this long at most.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@app_options
def result_command(
    task_id: str, wait: bool, timeout: float | None, json_: bool, target: str | None, config: str | None
) -> None:
    """Show what became of a task.

    PENDING also stands for an id that nobody knows. The exit code is 1 when the task did not succeed.
    """
    with find_app(target, config, tasks=target is not None) as app:
        result = app.result(task_id)
        if not app.backend.features.keeps:
            raise NoResults("no results are kept; add 'backend: sqlite' (or another) to the configuration")
        if wait or timeout is not None or result.ready():
            show_end(result, timeout, json_=json_)
            return
        state, info = result.state, result.info
        if json_:
            as_json({"id": task_id, "state": state, "info": None if isinstance(info, BaseException) else info})
        else:
            click.echo(str(state) if info is None else f"{state} {_info(info)}")


@click.command("revoke")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--terminate", is_flag=True, help="Also end those that run, on pools that can.")
@app_options
def revoke_command(task_ids: tuple[str, ...], terminate: bool, target: str | None, config: str | None) -> None:
    """Cancel tasks: what has not started never starts, also after every worker restarted."""
    for task_id in task_ids:
        check_id(task_id)
    with find_app(target, config, tasks=target is not None) as app:
        app.revoke(*task_ids, terminate=terminate)
    ended = "; workers end those that run" if terminate else ""
    click.echo(f"revoked: {', '.join(task_ids)}{ended}")


def show_end(result: AsyncResult[Any], timeout: float | None, *, json_: bool) -> None:
    """Wait for the end and print it; exits with 1 when the task did not succeed."""
    try:
        value = result.get(timeout)
    except (ResultTimeout, NoResults):
        raise
    except Exception as error:  # the task's own
        _show_failure(result, error, json_=json_)
        raise click.exceptions.Exit(1) from error
    if json_:
        as_json({"id": result.id, "state": State.SUCCESS, "value": value})
    else:
        click.echo(plain(value))


def _show_failure(result: AsyncResult[Any], error: Exception, *, json_: bool) -> None:
    state, remote = result.state, result.traceback
    if json_:
        as_json({"id": result.id, "state": state, "error": _info(error), "traceback": remote})
        return
    if remote:
        click.echo(remote.rstrip(), err=True)
    click.echo(f"dray: task {result.id}: {state}: {_info(error)}", err=True)


def _info(info: object) -> str:
    if isinstance(info, BaseException):
        kind = getattr(info, "error_type", type(info).__name__)
        text = getattr(info, "message", None) or str(info)
        return f"{kind}: {text}" if text else str(kind)
    return plain(info)
