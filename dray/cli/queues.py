"""``dray queues`` and ``dray purge``: how full the queues are, and emptying one."""

from __future__ import annotations

import click

from dray.cli import Mistake
from dray.cli.apps import app_options, find_app
from dray.cli.output import age, as_json, table
from dray.core.contracts import Inspectable, Transport
from dray.core.errors import NotSupported
from dray.core.options import suggest


@click.command("queues")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@app_options
def queues_command(json_: bool, target: str | None, config: str | None) -> None:
    """Show how full the queues are.

    ready: may be taken now; leased: with a worker; delayed: not due yet; dead: set aside (see 'dray dead'); oldest: how
    long the oldest ready message has waited. A dash: the transport cannot tell.
    """
    with find_app(target, config, tasks=target is not None) as app:
        transport = inspectable(app.transport)
        stats = transport.stats(sorted(transport.queues()))
        note_private(app.transport)
    if json_:
        as_json([{"queue": name, **found._asdict()} for name, found in stats.items()])
    elif not stats:
        click.echo("no queues yet")
    else:
        columns = ("queue", "ready", "leased", "delayed", "dead", "oldest")
        rows = [(name, s.ready, s.leased, s.delayed, s.dead, age(s.oldest_age_s)) for name, s in stats.items()]
        table(columns, rows)


@click.command("purge")
@click.argument("queue")
@click.option("--yes", is_flag=True, help="Do not ask.")
@app_options
def purge_command(queue: str, yes: bool, target: str | None, config: str | None) -> None:
    """Delete all that waits in a queue: what is ready or delayed, not what workers hold, nor the dead letters."""
    with find_app(target, config, tasks=target is not None) as app:
        transport = inspectable(app.transport)
        known = transport.queues()
        if queue not in known:
            raise Mistake(f"no queue {queue!r}{suggest(queue, known)}")
        stats = transport.stats([queue])[queue]
        waiting = stats.ready + (stats.delayed or 0)
        if (waiting or stats.delayed is None) and not yes:
            delayed = " and all delayed ones" if stats.delayed is None else ""
            click.confirm(f"Delete {waiting:,} waiting messages{delayed} of {queue!r} for ever?", abort=True, err=True)
        click.echo(f"{transport.purge(queue):,} messages deleted from {queue!r}")


def inspectable(transport: Transport) -> Inspectable:
    """Raises ``NotSupported`` when the transport cannot look into its queues."""
    if not isinstance(transport, Inspectable):
        raise NotSupported(f"the transport {transport.context.name!r} cannot look into its queues; use its own tools")
    return transport


def note_private(transport: Transport) -> None:
    """Say so when there is nothing that another process could see."""
    if not transport.features.shared:
        name = transport.context.name
        click.echo(
            f"dray: the transport {name!r} keeps its queues in each process: these are this command's own", err=True
        )
