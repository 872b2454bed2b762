"""``dray dead``: the dead letters, messages that were put aside with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import click

from dray.cli import Failure
from dray.cli.apps import app_options, find_app
from dray.cli.output import as_json, plain, progress, table
from dray.cli.params import COUNT
from dray.core.contracts import DeadLetters, Inspectable
from dray.core.errors import DrayError, NotSupported
from dray.core.masking import masked
from dray.core.message import DeadLetter, Delivery

if TYPE_CHECKING:
    from dray.core.app import Dray

PAGE = 500
INTERNAL = ("sig", "issued")
"""Headers that say nothing to people."""


@click.group("dead")
def dead_command() -> None:
    """List, show, requeue or purge dead letters: messages that were put aside with a reason."""


@dead_command.command("list")
@click.option("--queue", help="Only those of this queue.")
@click.option("--limit", type=COUNT, default=50, show_default=True, help="The newest so many.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@app_options
def list_dead(queue: str | None, limit: int, json_: bool, target: str | None, config: str | None) -> None:
    """List dead letters, the newest first."""
    with find_app(target, config, tasks=target is not None) as app:
        letters = _keeper(app).dead_list(queue, limit + 1)
    more, letters = len(letters) > limit, letters[:limit]
    if json_:
        as_json([_summary(letter) for letter in letters])
    elif not letters:
        click.echo("no dead letters")
    else:
        table(("id", "task", "queue", "died", "reason"), ([*_summary(letter).values()][:5] for letter in letters))
        if more:
            click.echo(f"and more: --limit {limit * 10}", err=True)


@dead_command.command("show")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@app_options
def show_dead(ids: tuple[str, ...], json_: bool, target: str | None, config: str | None) -> None:
    """Show dead letters with their arguments."""
    with find_app(target, config, tasks=target is not None) as app:
        letters = _keeper(app).dead_get(ids)
        details = [_details(app, letter) for letter in letters]
    if json_:
        as_json(details)
    else:
        click.echo("\n\n".join(_text(detail) for detail in details))
    _complain(ids, [letter.id for letter in letters])


@dead_command.command("requeue")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All of them.")
@click.option("--queue", help="All of this queue.")
@app_options
def requeue_dead(ids: tuple[str, ...], all_: bool, queue: str | None, target: str | None, config: str | None) -> None:
    """Send dead letters again, as new: name them, or --all, or --queue."""
    _one_way(ids, all_=all_, queue=queue)
    with find_app(target, config, tasks=target is not None) as app:
        done = _each(app, ids, queue, "requeueing", app.requeue_dead)
    click.echo(f"{len(done):,} dead letters are queued again")
    _complain(ids, done)


@dead_command.command("purge")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All of them.")
@click.option("--queue", help="All of this queue.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@app_options
def purge_dead(
    ids: tuple[str, ...], all_: bool, queue: str | None, yes: bool, target: str | None, config: str | None
) -> None:
    """Delete dead letters for ever: name them, or --all, or --queue."""
    _one_way(ids, all_=all_, queue=queue)
    with find_app(target, config, tasks=target is not None) as app:
        keeper, count = _keeper(app), len(ids) or _count(app, queue)
        if count != 0 and not yes:
            many = "all" if count is None else f"{count:,}"
            click.confirm(f"Delete {many} dead letters for ever?", abort=True, err=True)
        done = _each(app, ids, queue, "deleting", keeper.dead_purge)
    click.echo(f"{len(done):,} dead letters deleted")
    _complain(ids, done)


def _keeper(app: Dray) -> DeadLetters:
    transport = app.transport
    if not isinstance(transport, DeadLetters):
        raise NotSupported(f"the transport {transport.context.name!r} keeps no dead letters of its own")
    return transport


def _one_way(ids: Sequence[str], *, all_: bool, queue: str | None) -> None:
    if (bool(ids) + all_ + (queue is not None)) != 1:
        raise click.UsageError("which dead letters? Give ids, or --all, or --queue QUEUE: one of the three")


def _count(app: Dray, queue: str | None) -> int | None:
    """How many there are, if the transport can tell."""
    transport = app.transport
    if not isinstance(transport, Inspectable):
        return None
    stats = transport.stats([queue] if queue is not None else transport.queues())
    counts = [found.dead for found in stats.values()]
    return None if None in counts else sum(count or 0 for count in counts)


def _each(
    app: Dray, ids: Sequence[str], queue: str | None, verb: str, act: Callable[[Sequence[str]], list[str]]
) -> list[str]:
    """Do it to these, or to all of a queue or of all queues, page by page; returns the ids that were there."""
    _keeper(app)
    if ids:
        return act(ids)
    done: list[str] = []
    with progress() as bar:
        line = bar.add_task(verb, total=_count(app, queue))
        for page in _pages(_keeper(app), queue):
            done += act(page)
            bar.update(line, completed=len(done))
    return done


def _pages(keeper: DeadLetters, queue: str | None) -> Iterator[list[str]]:
    """The ids of all dead letters, each once: one that is requeued and dies again meanwhile is left alone."""
    seen: set[str] = set()
    passed = 0
    while True:
        letters = keeper.dead_list(queue, PAGE + passed)
        fresh = [letter.id for letter in letters if letter.id not in seen]
        if not fresh and len(letters) < PAGE + passed:
            return
        passed = len(letters) - len(fresh)
        if fresh:
            seen.update(fresh)
            yield fresh


def _complain(wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [key for key in wanted if key not in set(found)]
    if missing:
        raise Failure(f"no such dead letter: {', '.join(missing)} (`dray dead list` shows them)")


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "task": letter.headers.get("task", "?"),
        "queue": letter.queue,
        "died": datetime.fromtimestamp(letter.died_at, UTC).isoformat(sep=" ", timespec="seconds"),
        "reason": letter.reason,
        "deliveries": letter.delivery_count,
    }


def _details(app: Dray, letter: DeadLetter) -> dict[str, Any]:
    """A dead letter with its arguments, or why they cannot be read; values that are named like a secret are hidden."""
    details = _summary(letter) | {"retries": letter.headers.get("attempt", "0")}
    delivery = Delivery(letter.queue, letter.id, letter.body, letter.headers, None)
    try:
        args, kwargs = app.codec.decode_call(delivery)
        details |= {"args": masked(args), "kwargs": masked(kwargs)}
    except DrayError as error:
        details["unreadable"] = f"{len(letter.body):,} bytes: {error}"
    headers = {key: value for key, value in letter.headers.items() if key not in (*INTERNAL, "task", "attempt")}
    return details | {"headers": cast("dict[str, Any]", masked(headers))}


def _text(details: dict[str, Any]) -> str:
    return "\n".join(f"{key:11}{plain(value)}" for key, value in details.items())
