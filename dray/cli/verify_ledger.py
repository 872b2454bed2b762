"""``dray verify-ledger``: what was sent, what ran and what the stores say, compared."""

from __future__ import annotations

import click

from dray.cli.apps import find_app
from dray.cli.output import as_json, table
from dray.testing.ledger import Report, audit

SHOWN = 10


@click.command("verify-ledger")
@click.argument("ledger", type=click.Path(exists=True, dir_okay=False))
@click.argument("runs", type=click.Path(dir_okay=False))
@click.argument("target", metavar="[MODULE:APP]", required=False)
@click.option("--config", metavar="FILE", help="The configuration: a YAML file, or a module's name.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@click.option("--extra-runs", type=click.IntRange(min=0), metavar="N", help="Fail when more runs were extra.")
@click.pass_context
def verify_ledger_command(
    ctx: click.Context,
    ledger: str,
    runs: str,
    target: str | None,
    config: str | None,
    json_: bool,
    extra_runs: int | None,
) -> None:
    """Audit what was sent, what ran and what the stores say.

    LEDGER, JSON lines {"id", "state", "time"}: "sending" before a call, then "confirmed", "uncertain" or "failed".
    RUNS, JSON lines {"id", "attempt", "event", "time", "pid"}: "start", then "end" or "error".
    dray.testing.ledger has writers for both: Ledger for producers, RunLog for tasks.

    The application (or --config, or dray.yaml) says which stores to look into. The exit code is 1 when a confirmed task
    is lost, when one ran that was not sent, or when more than --extra-runs were extra.
    """
    with find_app(target, config, tasks=target is not None) as app:
        report = audit(ledger, runs, app.transport, app.backend, extra_runs=extra_runs)
    if json_:
        as_json(report.as_dict())
    else:
        _show(report)
    ctx.exit(0 if report.ok else 1)


def _show(report: Report) -> None:
    rows: list[tuple[str, int | None, str]] = [
        ("confirmed", report.sent["confirmed"], "the transport said that it has them"),
        ("uncertain", report.sent["uncertain"], "the answer was lost, or the producer"),
        ("failed", report.sent["failed"], "certainly not sent"),
        ("runs", report.runs, "in the run log"),
        ("lost", len(report.lost), _ids(report.lost, "confirmed, and nowhere any more")),
        ("unexpected", len(report.unexpected), _ids(report.unexpected, "ran, and were not sent or failed")),
        ("extra runs", report.extra_runs, _ids(report.duplicated, "beyond what retries explain")),
        ("overlapping", len(report.overlapping), _ids(report.overlapping, "two runs at the same time")),
        ("recovered", len(report.recovered), "uncertain, and they had been sent"),
        ("dead", len(report.dead), _ids(report.dead, "among the dead letters: see 'dray dead'")),
        ("without result", len(report.without_result), "ran; the result is not kept, or expired"),
        ("waiting", report.waiting, "queued, or with a worker"),
        ("undecided", report.undecided, "may be with a worker: audit again when it has ended"),
    ]
    table(("what", "tasks", "which"), rows)
    click.echo("nothing is lost" if report.ok else "NOT in order: see the rows lost, unexpected and extra runs")


def _ids(ids: list[str] | dict[str, int], what: str) -> str:
    shown = list(ids)[:SHOWN]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{what}: {', '.join(shown)}{more}" if ids else what
