"""``dray demo``: real files, a real worker, a child that is killed on purpose, and totals that are checked."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dray.cli import Failure, Mistake
from dray.cli.demo_tasks import survey
from dray.cli.local import LocalWorker, caller, folder
from dray.cli.output import as_json, progress, table
from dray.cli.params import COUNT
from dray.core.errors import ResultTimeout
from dray.core.result import GroupResult

if TYPE_CHECKING:
    from dray.core.app import Dray

LOOK_S, PATIENCE_S = 2.0, 60.0
"""How often the worker is looked after; without any result for so long, something is wrong."""
TARGET = "dray.cli.demo_tasks:app"
SKIPPED = ("site-packages", "dist-packages")


@dataclass(slots=True)
class Totals:
    """What the files hold, added up."""

    files: int = 0
    unparsable: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    longest_lines: int = 0
    longest_name: str = ""
    longest_place: str = ""

    def add(self, found: dict[str, Any]) -> None:
        self.files += 1
        self.unparsable += "error" in found
        self.lines += found["lines"]
        self.functions += found["functions"]
        self.classes += found["classes"]
        length, name, line = found.get("longest", (0, "", 0))
        mine = (length, name, f"{found['path']}:{line}")
        if mine > (self.longest_lines, self.longest_name, self.longest_place) and length:
            self.longest_lines, self.longest_name, self.longest_place = mine


@dataclass(slots=True)
class Run:
    """How the tasks went."""

    totals: Totals
    missing: int
    failed: list[str]
    send_s: float
    run_s: float
    killed: int | None
    """The process that was killed on purpose."""


@click.command("demo")
@click.argument("path", required=False, metavar="[FOLDER]")
@click.option("--size", type=COUNT, default=2, show_default=True, help="Child processes that run tasks.")
@click.option("--no-kill", is_flag=True, help="Do not kill a child half-way.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def demo_command(path: str | None, size: int, no_kill: bool, json_: bool) -> None:
    """Watch dray at work on real files.

    One task for each Python file under FOLDER (default: this Python's standard library) parses it and counts lines,
    functions and classes. A worker with prefork children runs them over SQLite in a temporary folder. Half-way one
    child is killed with SIGKILL; nothing is lost. In the end a plain loop over the same files checks the totals; the
    exit code is 1 when they differ.
    """
    files = _python_files(Path(path or sysconfig.get_path("stdlib")))
    say = functools.partial(click.echo, err=True) if not json_ else _silent
    run = _run(files, size, kill=not no_kill, say=say)
    began = time.perf_counter()
    say("checking: the same files in a plain loop")
    plain = _plain(files)
    plain_s = time.perf_counter() - began
    agree = run.totals == plain and not run.missing and not run.failed
    if json_:
        rates = {"send_per_s": len(files) / run.send_s, "run_per_s": len(files) / run.run_s}
        figures = {"send_s": run.send_s, "run_s": run.run_s, "plain_s": plain_s, **rates}
        as_json(
            {"tasks": asdict(run.totals), "plain": asdict(plain), "agree": agree, "killed_pid": run.killed, **figures}
        )
    else:
        _summary(run, plain, plain_s)
    if not agree:
        lost = f"{run.missing} tasks without a result, {len(run.failed)} failed: {run.failed[:3]}"
        raise Failure(f"the totals do not agree; {lost}")
    if not json_:
        click.echo("every task ran; totals agree")


def _python_files(root: Path) -> list[str]:
    if not root.is_dir():
        raise Mistake(f"{root} is no folder")
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths = [os.path.join(place, name) for name in names if name.endswith(".py")]
        files += [path for path in paths if path.isprintable() and os.path.isfile(path)]
    if not files:
        raise Mistake(f"there is no Python file under {root}")
    return sorted(files)


def _run(files: list[str], size: int, *, kill: bool, say: Callable[[str], object]) -> Run:
    """All files through the queue."""
    totals, failed, killed = Totals(), list[str](), None
    with folder("sqlite", "prefork", size) as place, caller(place) as app, LocalWorker(place, TARGET) as worker:
        task = app.task(name=survey.name)(survey.fn)
        say(f"worker: pid {worker.pid}, prefork with {size} children, SQLite under {place}")
        began = time.perf_counter()
        group = app.send_many(task.s(name) for name in files)
        send_s = time.perf_counter() - began
        say(f"{len(files):,} tasks queued in {send_s:.2f} s ({len(files) / send_s:,.0f}/s)")
        with progress() as bar:
            line = bar.add_task("parsing", total=len(files))
            for done, value in enumerate(_as_completed(app, group.ids, worker), 1):
                bar.update(line, completed=done)
                if isinstance(value, BaseException):
                    failed.append(f"{type(value).__name__}: {value}")
                    continue
                totals.add(value)
                if kill and killed is None and done * 2 >= len(files):
                    killed = _kill_child(value["pid"], worker.pid)
                    if killed:
                        bar.console.print(
                            f"half-way: killed child {killed} with SIGKILL on purpose; what it ran runs again"
                        )
        run_s = time.perf_counter() - began
        if kill and killed is None:
            say("no child was there to be killed")
    return Run(totals, len(files) - totals.files - len(failed), failed, send_s, run_s, killed)


def _as_completed(app: Dray, ids: list[str], worker: LocalWorker) -> Iterator[Any]:
    """The value or the exception of each task as it ends. Raises ``Failure`` when the worker is gone or stuck."""
    left, connections, silent_s = dict.fromkeys(ids), app.connect(), 0.0
    while left:
        group: GroupResult[Any] = GroupResult(list(left), connections.results, connections.client)
        try:
            for key, value in group.as_completed(LOOK_S):
                del left[key]
                silent_s = 0.0
                yield value
        except ResultTimeout:
            worker.check()
            silent_s += LOOK_S
            if silent_s > PATIENCE_S:
                raise Failure(f"no task has ended for {PATIENCE_S:.0f} s; the worker says:\n{worker.log()}") from None


def _plain(files: Iterable[str]) -> Totals:
    totals = Totals()
    with progress() as bar:
        for name in bar.track(list(files), description="checking"):
            totals.add(survey(name))
    return totals


def _kill_child(pid: int, worker_pid: int) -> int | None:
    """Kill one of the worker's children, if it is one and still there."""
    if worker_pid not in _ancestors(pid):
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return pid
    return None


def _ancestors(pid: int) -> list[int]:
    """The processes above ``pid``."""
    found: list[int] = []
    while (pid := _parent(pid)) > 1 and pid not in found:
        found.append(pid)
    return found


def _parent(pid: int) -> int:
    """The process that made ``pid``; 0 when that cannot be told."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        return int(stat.read_text().rpartition(")")[2].split()[1])
    command = ["ps", "-o", "ppid=", "-p", str(pid)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return int(answer.stdout or 0)


def _silent(_: str) -> None:
    return


def _summary(run: Run, plain: Totals, plain_s: float) -> None:
    totals, count = run.totals, plain.files
    rows = [
        (name.replace("_", " "), getattr(totals, name), getattr(plain, name))
        for name in ("files", "unparsable", "lines", "functions", "classes", "longest_lines", "longest_name")
    ]
    rows.append(("seconds", f"{run.run_s:.2f}", f"{plain_s:.2f}"))
    rows.append(("files/s", f"{count / run.run_s:,.0f}", f"{count / plain_s:,.0f}"))
    table(("", "tasks", "plain loop"), rows)
    click.echo(f"the longest function: {totals.longest_name}, {totals.longest_lines:,} lines, {totals.longest_place}")
