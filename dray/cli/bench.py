"""``dray bench``: what this machine does with tasks that do nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import yaml

from dray.cli.bench_load import Figures
from dray.cli.bench_measures import MEASURES, SEVERAL_PROCESSES, WITH_RESULTS
from dray.cli.bench_processes import processor
from dray.cli.bench_rig import InProcessRig, Rig, Setup, Tell
from dray.cli.local import caller, configured
from dray.cli.output import as_json, console, table
from dray.cli.params import COUNT
from dray.core.errors import ConfigError
from dray.core.masking import masked

QUICK = ("send", "drain", "latency")
REFRESH_S = 0.5
DEVELOPMENT = re.compile(r"extra *== *.(dev|docs|testing)\b")
"""Requirements that no measurement uses."""
LABELS = {
    "delay_per_s": "delay(), one at a time",
    "delay_threads_per_s": "delay() from several threads",
    "send_many_per_s": "send_many()",
    "per_s": "tasks a second",
    "p50_ms": "round trip, median",
    "p99_ms": "round trip, slowest of 100",
    "worker_cpu_us": "processor time of the worker, a task",
    "broker_cpu_us": "processor time of the broker, a task",
    "idle_mb": "worker, idle",
    "warm_mb": "worker, warm",
    "growth_mb": "growth from there",
    "delayed_mb": "growth by tasks that are due in an hour",
    "left": "still queued at the end",
}
UNITS = {"_per_s": "{:,.0f}/s", "per_s": "{:,.0f}/s", "_ms": "{:.2f} ms", "_us": "{:.1f} µs", "_mb": "{:.1f} MB"}


@click.command("bench")
@click.argument("measures", nargs=-1, type=click.Choice(list(MEASURES)), metavar="[MEASURE]...")
@click.option("--tasks", type=COUNT, default=20_000, show_default=True, help="How many to queue.")
@click.option("--transport", default="sqlite", show_default=True, help="A name, a URL, or {use: ...} as in YAML.")
@click.option("--backend", help="The same for results; default: none are kept, except for latency.")
@click.option("--pool", default="prefork", show_default=True, help="What runs the tasks.")
@click.option("--size", type=COUNT, help="How many at a time; default: the pool's own.")
@click.option("--batch", type=COUNT, default=10_000, show_default=True, help="Calls in one send_many(); 1: delay().")
@click.option("--threads", type=COUNT, default=16, show_default=True, help="Threads that call delay(), for send.")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="The medians are shown.")
@click.option("--broker-pid", type=COUNT, help="Also tell the processor time of this process.")
@click.option("--json", "json_", metavar="FILE", help="Write all figures to a file; - prints them instead of tables.")
def bench_command(measures: tuple[str, ...], tasks: int, repeats: int, json_: str | None, **options: Any) -> None:
    """Measure this machine with tasks that do nothing.

    \b
    send     calls, while nobody takes the tasks
    drain    the tasks are queued first, then a worker runs them
    live     a caller and a worker at the same time
    latency  one task at a time, from the call to its result
    memory   of the worker and its children; its growth

    Default: send, drain and latency. What is measured is the queue's own cost, the least that a task can take: real
    tasks are slower by what they do. The queue is 'dray-bench': it is emptied before and after each measurement.
    """
    transport, backend, pool = (options[name] for name in ("transport", "backend", "pool"))
    plugins = {"transport": _plugin(transport), "backend": _plugin(backend or "null"), "pool": _plugin(pool)}
    setup = Setup(**{**options, **plugins})
    found: dict[str, Any] = {}
    with _progress(quiet=json_ == "-") as tell:
        for name in measures or QUICK:
            own = setup if backend or name not in WITH_RESULTS else _with_results(setup)
            runs = [_run(name, own, tasks, _named(tell, name, at, repeats)) for at in range(repeats)]
            found[name] = {"median": medians(runs), "runs": runs}
    report = {**surroundings(), **_described(setup), "tasks": tasks, "repeats": repeats, "measures": found}
    if json_ and json_ != "-":
        Path(json_).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if json_ == "-":
        as_json(report)
        return
    table(("no-op tasks", f"{masked(transport)}, {pool}"), list(_rows(found)))


def _plugin(text: str) -> object:
    """What the option says, as a configuration would."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{masked(text)!r} is neither a name, nor a URL, nor YAML: {error}") from error


def _with_results(setup: Setup) -> Setup:
    """Results are kept where the messages are: of its options only the URL, if it has one, fits the back end."""
    choice = setup.transport
    if isinstance(choice, Mapping):
        choice = choice.get("url") or choice.get("use")
    return dataclasses.replace(setup, backend=choice)


def _run(name: str, setup: Setup, tasks: int, tell: Tell) -> Figures:
    """One measurement, in a folder of its own."""
    with configured(setup.config()) as folder:
        with caller(folder) as app:
            shared = app.transport.features.shared
        if not shared and name in SEVERAL_PROCESSES:
            raise ConfigError(f"{name} needs processes of their own, and this transport lives in one; leave it out")
        rig = (Rig if shared else InProcessRig)(folder, setup, tell)
        return rig.run(lambda rig: MEASURES[name](rig, tasks))


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of each figure; None where a run has none."""
    found: Figures = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = None if None in values else statistics.median(values)
    return found


def surroundings(program: str = "dray") -> dict[str, Any]:
    """The machine, the versions and the command: what figures mean nothing without."""
    versions = {"python": platform.python_version(), "dray": metadata.version("dray")}
    for line in metadata.requires("dray") or ():
        if DEVELOPMENT.search(line):
            continue
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    command = [program, *(str(masked(word)) for word in sys.argv[1:])]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"at": at, "command": command, "machine": machine, "versions": versions}


def _described(setup: Setup) -> dict[str, Any]:
    plugins = {"transport": setup.transport, "backend": setup.backend, "pool": setup.pool}
    return {**{name: masked(value) for name, value in plugins.items()}, "size": setup.size, "batch": setup.batch}


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Tell]:
    """Live progress on stderr, drawn twice a second: drawing takes processor time that would be missed elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), auto_refresh=False, disable=quiet, transient=True) as bar:
        line, shown = bar.add_task(""), 0.0

        def tell(what: str, done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= REFRESH_S:
                shown = now
                bar.update(line, description=what, completed=done, total=total, refresh=True)

        yield tell


def _named(tell: Tell, name: str, at: int, repeats: int) -> Tell:
    return lambda what, done, total: tell(f"{name} {at + 1}/{repeats}, {what}", done, total)


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for measure, figures in found.items():
        for name, value in figures["median"].items():
            if name in LABELS and value is not None and (name != "left" or (value and measure != "send")):
                yield f"{measure}: {LABELS[name]}", _shown(name, value)


def _shown(name: str, value: float) -> str:
    form = next((form for end, form in UNITS.items() if name.endswith(end)), "{:,.0f}")
    return form.format(value)
