"""The auditor: what was sent, what ran and what the stores say must agree.

Two append-only files of JSON lines, each line one ``write``, so that a killed process leaves whole lines only:

- the producer's **ledger**: ``{"id", "state", "time"}``. ``sending`` is written before a call is sent, then
  ``confirmed``, ``uncertain`` or ``failed``. A ``sending`` that nothing followed (its producer died) counts as
  uncertain; where an id was sent more than once, the best counts: confirmed, uncertain, failed.
- the tasks' **run log**: ``{"id", "attempt", "event", "time", "pid"}``, event ``start``, ``end`` or ``error``. A run
  without an end was cut short.

Times are monotonic seconds, which processes of one machine share; overlaps can be told on one machine only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dray.core.contracts import DeadLetters, Inspectable, ResultBackend, Transport
from dray.core.errors import ConfigError, DrayError, SendError, Uncertain
from dray.core.message import TERMINAL
from dray.core.request import current

LEDGER_STATES = ("sending", "confirmed", "uncertain", "failed")
RUN_EVENTS = ("start", "end", "error")
SLICE = 1000
DEAD_MAX = 1_000_000
WAITING_MAX = 1_000_000


# --- writing -----------------------------------------------------------------------------------------------


class Ledger:
    """What a producer writes down about its calls. Any thread, any number of processes.

    ::

        ledger = Ledger("ledger.jsonl")
        task_id = app.ids.new()
        with ledger.sending(task_id):
            add.apply_async((2, 3), task_id=task_id)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def sending(self, *ids: str) -> Iterator[None]:
        """Around the sending of these ids, chosen by the caller: writes down that it began, and how it ended."""
        self.note("sending", ids)
        try:
            yield
        except SendError as error:
            unsent = {message.id for message in error.unsent}
            self.note("failed", [each for each in ids if each in unsent])
            self.note("uncertain", [each for each in ids if each not in unsent])
            raise
        except BaseException as error:
            certain = isinstance(error, DrayError) and not isinstance(error, Uncertain)
            self.note("failed" if certain else "uncertain", ids)
            raise
        self.note("confirmed", ids)

    def note(self, state: str, ids: Iterable[str]) -> None:
        """Write one of ``LEDGER_STATES`` down for each id."""
        now = time.monotonic()
        _append(self.path, [{"id": each, "state": state, "time": now} for each in ids])


class RunLog:
    """What a task writes down about its runs. Any thread, any process, before and after a fork.

    ::

        runs = RunLog("runs.jsonl")

        @app.task
        def add(x, y):
            with runs.run():
                return x + y
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around a task's body: its start, then its end or the error that left it. Only inside a task."""
        request = current()
        line = {"id": request.id, "attempt": request.attempt, "pid": os.getpid()}
        self._note(line, "start")
        try:
            yield
        except BaseException:
            self._note(line, "error")
            raise
        self._note(line, "end")

    def _note(self, line: dict[str, Any], event: str) -> None:
        _append(self.path, [{**line, "event": event, "time": time.monotonic()}])


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if data:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """One run of a task: from its start to its end, or to the last sign of life of the process that was cut short."""

    id: str
    attempt: int
    pid: int
    start: float
    end: float
    how: str = "cut short"
    """``end``, ``error`` or ``cut short``."""


def read_ledger(path: str | Path) -> dict[str, str]:
    """Each id's state: confirmed, uncertain or failed. Raises ``ConfigError`` for a file that is no ledger."""
    notes: dict[str, Counter[str]] = defaultdict(Counter)
    for where, line in _lines(path):
        task_id, state = line.get("id"), line.get("state")
        if not isinstance(task_id, str) or state not in LEDGER_STATES:
            raise ConfigError(f"{where}: a ledger's line has an id and a state of {', '.join(LEDGER_STATES)}")
        notes[task_id][state] += 1
    return {task_id: _state(noted) for task_id, noted in notes.items()}


def _state(noted: Counter[str]) -> str:
    if noted["confirmed"]:
        return "confirmed"
    return "uncertain" if noted["uncertain"] or noted["sending"] > noted["failed"] else "failed"


def read_runs(path: str | Path) -> list[Run]:
    """All runs, by their start; none when no task has run yet. Raises ``ConfigError`` for a file that is no run log."""
    runs: list[Run] = []
    begun: dict[tuple[str, int, int], list[Run]] = defaultdict(list)
    last: dict[int, float] = {}
    for where, line in _lines(path) if Path(path).exists() else ():
        try:
            key = (str(line["id"]), int(line["attempt"]), int(line["pid"]))
            event, at = RUN_EVENTS.index(line["event"]), float(line["time"])
        except (KeyError, ValueError, TypeError):
            wanted = "an id, an attempt, a pid, a time and an event of " + ", ".join(RUN_EVENTS)
            raise ConfigError(f"{where}: a run log's line has {wanted}") from None
        last[key[2]] = max(at, last.get(key[2], at))
        if event == 0:
            begun[key].append(Run(*key, at, at))
            runs.append(begun[key][-1])
        elif begun[key]:
            run = begun[key].pop(0)
            run.end, run.how = at, line["event"]
        else:
            raise ConfigError(f"{where}: the run of {key[0]} ends here and began nowhere")
    for run in runs:
        if run.how == "cut short":
            run.end = last[run.pid]
    return sorted(runs, key=lambda run: run.start)


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ConfigError(f"{path}:{number}: not a JSON object")
                yield f"{path}:{number}", line
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a file of JSON lines: {error}") from error


# --- the audit ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What the auditor found. Each id is in ``sent`` once; the other lists may share ids."""

    sent: dict[str, int] = field(default_factory=dict)
    """How many ids the ledger calls confirmed, uncertain and failed."""
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    """Confirmed, and neither ended, nor dead, nor waiting."""
    unexpected: list[str] = field(default_factory=list)
    """Ran, though the ledger does not know them or calls them failed."""
    duplicated: dict[str, int] = field(default_factory=dict)
    """Ran more often than their retries explain: the number of extra runs."""
    overlapping: list[str] = field(default_factory=list)
    """Two runs of it went on at the same time."""
    recovered: list[str] = field(default_factory=list)
    """Uncertain, and it turned out that they had been sent."""
    dead: list[str] = field(default_factory=list)
    """Of the ledger's ids, those among the dead letters."""
    without_result: list[str] = field(default_factory=list)
    """Ran to the end, and no result is there: it was not to be kept, or it expired."""
    waiting: int | None = None
    """Messages that are queued or with a worker, of whatever id; None: the transport cannot tell."""
    undecided: int = 0
    """Confirmed, not ended, and with a worker perhaps: audit again when no worker holds anything."""
    extra_runs_max: int | None = None

    @property
    def extra_runs(self) -> int:
        """All runs beyond those that retries explain."""
        return sum(self.duplicated.values())

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing unexpected, and no more extra runs than were allowed."""
        few = self.extra_runs_max is None or self.extra_runs <= self.extra_runs_max
        return not self.lost and not self.unexpected and few

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ok": self.ok, "extra_runs": self.extra_runs, **asdict(self)}


def audit(
    ledger: str | Path,
    runs: str | Path,
    transport: Transport | None = None,
    backend: ResultBackend | None = None,
    *,
    extra_runs: int | None = None,
) -> Report:
    """Compare the ledger, the run log and, where given, the open stores. ``extra_runs``: how many are acceptable.

    Producers should have ended. Without stores a task that was confirmed and has not run to its end counts as lost. So
    does one that is delayed, or with a worker, where the transport cannot count these: audit when neither is the case.
    """
    states, ran = read_ledger(ledger), read_runs(runs)
    report = Report(sent=dict.fromkeys(("confirmed", "uncertain", "failed"), 0), runs=len(ran))
    report.sent.update(Counter(states.values()))
    report.extra_runs_max = extra_runs
    ids = set(states)
    dead = _dead(transport, ids)
    waiting, leased = _waiting(transport, report)
    results = _terminal(backend, ids)
    ended = {run.id for run in ran if run.how == "end"}
    begun = {run.id for run in ran}
    _judge_runs(report, ran)
    known = {task_id for task_id, state in states.items() if state != "failed"}
    confirmed = {task_id for task_id, state in states.items() if state == "confirmed"}
    report.unexpected = sorted(begun - known)
    report.recovered = sorted((known - confirmed) & (begun | dead | waiting | (results or set())))
    report.dead = sorted(dead)
    if results is not None:
        report.without_result = sorted((ended & known) - results - dead - waiting)
    missing = confirmed - dead - waiting - ended - (results or set())
    if leased and len(missing) <= leased:
        report.undecided = len(missing)
    else:
        report.lost = sorted(missing)
    return report


def _judge_runs(report: Report, ran: Sequence[Run]) -> None:
    """Extra runs are those of one attempt beyond its first; runs overlap when one starts before another ends."""
    busy_until: dict[str, float] = {}
    overlapping = set()
    for run in ran:
        if run.start < busy_until.get(run.id, run.start):
            overlapping.add(run.id)
        busy_until[run.id] = max(run.end, busy_until.get(run.id, run.end))
    extra: Counter[str] = Counter()
    for (task_id, _), count in Counter((run.id, run.attempt) for run in ran).items():
        if count > 1:
            extra[task_id] += count - 1
    report.duplicated = dict(sorted(extra.items()))
    report.overlapping = sorted(overlapping)


def _dead(transport: Transport | None, ids: set[str]) -> set[str]:
    if not isinstance(transport, DeadLetters):
        return set()
    return {letter.id for letter in transport.dead_list(None, DEAD_MAX)} & ids


def _waiting(transport: Transport | None, report: Report) -> tuple[set[str], int]:
    """The ids that are queued, and how many messages workers hold: a transport does not tell which."""
    if not isinstance(transport, Inspectable):
        return set(), 0
    names = transport.queues()
    stats = transport.stats(names).values()
    leased = sum(each.leased or 0 for each in stats)
    if not any(None in (each.leased, each.delayed) for each in stats):
        report.waiting = leased + sum(each.ready + (each.delayed or 0) for each in stats)
    return {message.id for name in names for message in transport.peek(name, WAITING_MAX)}, leased


def _terminal(backend: ResultBackend | None, ids: set[str]) -> set[str] | None:
    """Those of the ids that have ended by their result; None: no results are kept."""
    if backend is None or not backend.features.keeps:
        return None
    found, all_ids = set(), sorted(ids)
    for at in range(0, len(all_ids), SLICE):
        fetched = backend.fetch(all_ids[at : at + SLICE])
        found |= {task_id for task_id, result in fetched.items() if result.state in TERMINAL}
    return found
