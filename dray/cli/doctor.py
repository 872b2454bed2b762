"""``dray doctor``: each configured plugin is loaded and used once, on names of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from dray.cli.apps import app_options, find_app
from dray.cli.output import as_json, table
from dray.core import plugins
from dray.core.config import choices
from dray.core.contracts import Consumer
from dray.core.errors import DrayError
from dray.core.message import Action, Delivery, Outgoing, Settlement, State, StoredResult

if TYPE_CHECKING:
    from dray.core.app import Dray
    from dray.core.config import WorkerConfig

QUEUE = "dray-doctor"
ROUND_TRIP_S = 10.0
KEEP_S = 60.0


class Finding(NamedTuple):
    """One thing that was looked at."""

    check: str
    ok: bool
    detail: str


@click.command("doctor")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@app_options
def doctor_command(json_: bool, target: str | None, config: str | None) -> None:
    """Prove that the configured plugins work, by using them.

    A message goes through the transport on a queue of its own, a result through the back end under an id of its own;
    both are removed. The exit code is 1 when something fails.
    """
    findings = list(_examine(target, config))
    if json_:
        as_json([finding._asdict() for finding in findings])
    else:
        table(("", "check", "finding"), (("ok" if f.ok else "FAILED", f.check, f.detail) for f in findings))
    failed = sum(not finding.ok for finding in findings)
    if failed:
        click.echo(f"dray: {failed} of {len(findings)} checks failed", err=True)
        raise click.exceptions.Exit(1)


def _examine(target: str | None, config: str | None) -> Iterator[Finding]:
    try:
        app = find_app(target, config, tasks=False)
        found = app.config
        yield Finding("configuration", True, str(found.path or "no file: the defaults"))
    except DrayError as error:
        yield Finding("configuration", False, str(error))
        return
    if target is not None or found.imports:
        try:
            app = find_app(target, config)
            yield Finding("tasks", True, f"{len(app.registry)} registered")
        except DrayError as error:
            yield Finding("tasks", False, str(error))
    yield from _plugins(app)
    with app:
        yield _attempt("transport", lambda: _transport(app))
        yield _attempt("results", lambda: _backend(app))
        yield _attempt("durability", lambda: _durability(app))
    for name, entry in app.config.workers.items():
        yield _attempt(f"worker {name}", functools.partial(_worker, app, entry))


def _plugins(app: Dray) -> Iterator[Finding]:
    for kind, path, choice in choices(app.config):
        try:
            plugins.configure(kind, choice, app.config.plugins.allow)
            yield Finding(f"{kind.removesuffix('s')} {choice.use}", True, f"loaded, its options are right ({path})")
        except DrayError as error:
            yield Finding(f"{kind.removesuffix('s')} {choice.use}", False, str(error))


def _attempt(check: str, act: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, act())
    except DrayError as error:
        return Finding(check, False, f"{type(error).__name__}: {error}")


def _transport(app: Dray) -> str:
    """A message there and back."""
    transport, task_id, now = app.transport, app.ids.new(), app.clock.time()
    began = time.perf_counter()
    headers, body = app.codec.encode_call({"task": "dray.doctor", "type": app.codec.type}, QUEUE, task_id, ((now,), {}))
    transport.declare([QUEUE])
    consumer = transport.consumer([QUEUE], 1)
    try:
        transport.send([Outgoing(QUEUE, task_id, body, headers)])
        delivery = _receive(app, consumer, task_id)
        if app.codec.decode_call(delivery) != ([now], {}):
            raise DrayError("the message came back changed")
        if transport.settle([Settlement(delivery, Action.ACK)]):
            raise DrayError("the message could not be acknowledged: it was no longer ours")
    finally:
        consumer.close()
    ms = (time.perf_counter() - began) * 1000
    scope = "" if transport.features.shared else "; only this process reaches its queues"
    return f"{transport.context.name}: a message went through in {ms:.1f} ms{scope}"


def _receive(app: Dray, consumer: Consumer, task_id: str) -> Delivery:
    """Our message. Those of a doctor that died are removed, one that works beside us gets its own back."""
    deadline = time.monotonic() + ROUND_TRIP_S
    while (left_s := deadline - time.monotonic()) > 0:
        for delivery in consumer.receive(1, left_s):
            if delivery.id == task_id:
                return delivery
            (sent_at, *_), _ = app.codec.decode_call(delivery)
            stale = app.clock.time() - sent_at > ROUND_TRIP_S
            app.transport.settle([Settlement(delivery, Action.ACK if stale else Action.RELEASE)])
    raise DrayError(f"the message did not come back within {ROUND_TRIP_S:.0f} s")


def _backend(app: Dray) -> str:
    """A result stored, fetched and deleted."""
    backend, task_id = app.backend, app.ids.new()
    if not backend.features.keeps:
        return "none are kept: result.get() raises NoResults; 'backend: sqlite' (or another) keeps them"
    began = time.perf_counter()
    try:
        body = app.codec.encode_result(task_id, {"doctor": 1})
        backend.store([StoredResult(task_id, State.SUCCESS, body, app.clock.time() + KEEP_S)])
        stored = backend.fetch([task_id]).get(task_id)
        if stored is None:
            raise DrayError("a result that was stored is not there")
        if app.codec.decode_result(stored) != {"doctor": 1}:
            raise DrayError("a result came back changed")
    finally:
        backend.delete([task_id])
    ms = (time.perf_counter() - began) * 1000
    scope = "" if backend.features.shared else "; only this process sees its results"
    kept = f"kept for {app.config.result_expires:g} s"
    return f"{backend.context.name}: stored, fetched, deleted in {ms:.1f} ms; {kept}{scope}"


def _durability(app: Dray) -> str:
    from dray.cli.worker import SURVIVES

    has, required = app.transport.features.durability, app.config.require_durability
    if required is not None and has < required:
        raise DrayError(f"require_durability is {required.name}, the transport keeps {has.name}: {SURVIVES[has]}")
    return f"{has.name}: {SURVIVES[has]}"


def _worker(app: Dray, entry: WorkerConfig) -> str:
    app.worker(entry)
    return f"takes {', '.join(entry.queues)} with {entry.pool.use}"
