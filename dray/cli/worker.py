"""``dray worker``: one worker in this process, or several under a supervisor."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from dray.cli.apps import app_options, find_app
from dray.cli.params import COUNT, names
from dray.core import plugins
from dray.core.config import Config, PluginChoice, WorkerConfig, load
from dray.core.contracts import Durability, Pool
from dray.core.errors import ConfigError
from dray.core.options import Where, suggest

if TYPE_CHECKING:
    from dray.core.app import Dray
    from dray.core.worker import Worker

log = logging.getLogger("dray.cli")
LOG_FORMAT = "%(asctime)s %(levelname)-8s %(process)d %(message)s"
LEVELS = ("debug", "info", "warning", "error", "critical")
SURVIVES: Mapping[Durability, str] = {
    Durability.D0: "queued tasks are lost with their process",
    Durability.D1: "queued tasks survive the end of dray's processes",
    Durability.D2: "queued tasks survive kill -9",
    Durability.D3: "queued tasks survive power loss",
    Durability.D4: "queued tasks survive the loss of a broker's node",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead of the entries under ``workers``."""

    pool: str | None = None
    size: int | None = None
    queues: tuple[str, ...] = ()

    def apply(self, entry: WorkerConfig) -> WorkerConfig:
        """The entry with these over it."""
        choice = entry.pool
        if self.pool is not None and self.pool != choice.use:  # the options of another plugin do not fit
            choice = PluginChoice(self.pool, {}, Where("--pool"))
        if self.size is not None:
            where = choice.where.child("size")
            origins = {**choice.where.origins, where.path: "--size"}
            choice = PluginChoice(choice.use, {**choice.options, "size": self.size}, Where(choice.where.path, origins))
        return WorkerConfig(entry.name, self.queues or entry.queues, choice)

    def arguments(self) -> list[str]:
        """The same as command line arguments."""
        given = {"--pool": self.pool, "--size": self.size, "--queues": ",".join(self.queues)}
        return [word for name, value in given.items() if value for word in (name, str(value))]


@click.command("worker")
@click.argument("words", nargs=-1, metavar="[MODULE:APP] [NAME]...")
@app_options
@click.option("--pool", metavar="NAME", help="What runs the tasks, instead of the configuration's choice.")
@click.option("--size", type=COUNT, help="How many tasks run at a time.")
@click.option("--queues", metavar="A,B", help="Which queues to take from, the preferred one first.")
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    envvar="DRAY_LOG_LEVEL",
    show_default=True,
    show_envvar=True,
)
def worker_command(
    words: tuple[str, ...],
    target: str | None,
    config: str | None,
    pool: str | None,
    size: int | None,
    queues: str | None,
    log_level: str,
) -> None:
    """Run tasks until stopped.

    NAMEs are entries under 'workers' in the configuration, each a process of its own; default: all of them.

    The first TERM or INT stops warm: running tasks finish, the others are given back. The second stops cold: running
    tasks are ended and given back.

    Exit codes: 0 stopped warm, 1 the worker failed, 2 the command line or the configuration is wrong, 3 stopped cold.
    """
    logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    overrides = Overrides(pool, size, names(queues))
    prepared = _prepare(config, words, pool)
    chosen = list(words)
    if chosen and target is None and (":" in chosen[0] or chosen[0] not in prepared.config.workers):
        target = chosen.pop(0)
    try:
        app = find_app(target, config)
    except ConfigError as error:
        if target is None or ":" in target or target not in words:
            raise
        raise ConfigError(f"{error}; nor is there a worker {target!r} under 'workers'") from error
    entries = _entries(app.config, chosen)
    if len(entries) == 1:
        sys.exit(_run(app, overrides.apply(entries[0]), prepared))
    from dray.core.supervisor import Supervisor

    options = {"--app": target, "--config": config, "--log-level": log_level}
    shared = [word for name, value in options.items() if value for word in (name, value)] + overrides.arguments()
    click.echo(
        f"dray: {len(entries)} workers: {', '.join(entry.name for entry in entries)}; pid {os.getpid()}", err=True
    )
    python = [sys.executable, "-m", "dray", "worker"]
    sys.exit(Supervisor({entry.name: [*python, *shared, entry.name] for entry in entries}).run())


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """What was known before the application was imported."""

    config: Config
    pools: frozenset[str]


def _prepare(config: str | None, words: Sequence[str], pool: str | None) -> Prepared:
    """A pool that patches the standard library does so now, before the application is imported."""
    early = load(source=config)
    entries = [early.workers[word] for word in words if word in early.workers] or list(early.workers.values())
    wanted = {pool} if pool is not None else {entry.pool.use for entry in entries}
    if len(wanted) > 1:  # each in a process of its own, which comes by here again
        return Prepared(early, frozenset())
    _pool_class(next(iter(wanted)), early).prepare()
    return Prepared(early, frozenset(wanted))


def _pool_class(name: str, config: Config) -> type[Pool]:
    found: type[Pool] = plugins.load("pools", name, config.plugins.allow)
    return found


def _entries(config: Config, chosen: list[str]) -> list[WorkerConfig]:
    for name in chosen:
        if name not in config.workers:
            raise ConfigError(f"no worker {name!r} under 'workers' in the configuration{suggest(name, config.workers)}")
    return [config.workers[name] for name in dict.fromkeys(chosen)] or list(config.workers.values())


def _run(app: Dray, entry: WorkerConfig, prepared: Prepared) -> int:
    """One worker, in this process."""
    from dray.core.supervisor import run_with_signals, watch_lifeline

    if entry.pool.use not in prepared.pools and _pool_class(entry.pool.use, app.config).features.green:
        raise ConfigError(
            f"the pool {entry.pool.use!r} patches the standard library and has to be known before the application is "
            f"imported: add --pool {entry.pool.use}"
        )

    def ready() -> None:
        watch_lifeline(worker, os.environ)
        durability = worker.parts.transport.features.durability  # known once it is connected
        log.info("worker %s is ready; durability %s: %s", entry.name, durability.name, SURVIVES[durability])

    worker = app.worker(entry, ready)
    click.echo(_banner(app, entry, worker), err=True)
    if not len(app.registry):
        log.warning("no tasks are registered: is the module that defines them listed under 'imports'?")
    if not worker.parts.transport.features.shared:
        log.warning(
            "the transport %s lives in this process: only its own tasks can send here", app.config.transport.use
        )
    with app:  # its connections are closed when the worker has ended
        return run_with_signals(worker)


def _banner(app: Dray, entry: WorkerConfig, worker: Worker) -> str:
    config, parts = app.config, worker.parts
    keeps = parts.backend.features.keeps
    lines = {
        "worker": f"{entry.name}, pid {os.getpid()}",
        "transport": f"{config.transport.use}, files relative to {config.base}",
        "results": config.backend.use if keeps else "none are kept (no back end is configured)",
        "queues": ", ".join(entry.queues),
        "pool": f"{entry.pool.use}, {parts.pool.capacity} at a time",
        "tasks": str(len(app.registry)),
        "config": str(config.path or "none, the defaults"),
    }
    return "\n".join(f"dray  {key:10}{value}" for key, value in lines.items())
