"""The auditor: each kind of disorder is found, and order is not called disorder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dray import Dray, PublishUncertain, SendError, Unavailable
from dray.cli import cli
from dray.core.errors import ConfigError
from dray.core.message import Outgoing, State, StoredResult
from dray.testing.ledger import Ledger, Report, RunLog, audit, read_ledger, read_runs


class Books:
    """A ledger and a run log, written line by line."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.runs = folder / "ledger.jsonl", folder / "runs.jsonl"
        self.ledger.touch()
        self.writer = Ledger(self.ledger)

    def run(
        self, task_id: str, start: float, end: float | None, *, attempt: int = 0, pid: int = 1, how: str = "end"
    ) -> None:
        line = {"id": task_id, "attempt": attempt, "pid": pid}
        lines = [{**line, "event": "start", "time": start}]
        lines += [{**line, "event": how, "time": end}] if end is not None else []
        with open(self.runs, "a") as file:
            file.writelines(json.dumps(each) + "\n" for each in lines)

    def audit(self, app: Dray | None = None, **options: Any) -> Report:
        stores = (app.transport, app.backend) if app is not None else (None, None)
        return audit(self.ledger, self.runs, *stores, **options)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


@pytest.fixture
def app() -> Any:
    with Dray(config={}, transport="memory", backend="memory") as made:
        yield made


def test_what_was_sent_and_ran_once_is_in_order(books: Books) -> None:
    books.writer.note("confirmed", ["a", "b"])
    books.run("a", 1.0, 2.0, how="error")
    books.run("a", 3.0, 4.0, attempt=1)
    books.run("b", 1.0, 2.0, pid=2)
    report = books.audit(extra_runs=0)
    assert report.ok
    assert (report.sent["confirmed"], report.runs, report.extra_runs, report.overlapping) == (2, 3, 0, [])


def test_a_confirmed_task_that_is_nowhere_is_lost(books: Books) -> None:
    books.writer.note("confirmed", ["never-ran", "cut", "failed", "ran"])
    books.run("ran", 1.0, 2.0)
    books.run("cut", 1.0, None)
    books.run("failed", 1.0, 2.0, how="error")
    report = books.audit()
    assert report.lost == ["cut", "failed", "never-ran"]
    assert not report.ok


def test_runs_of_what_was_not_sent_are_unexpected(books: Books) -> None:
    books.writer.note("failed", ["refused"])
    books.run("refused", 1.0, 2.0)
    books.run("stranger", 1.0, 2.0)
    report = books.audit()
    assert report.unexpected == ["refused", "stranger"]
    assert not report.ok


def test_an_attempt_that_ran_twice_is_an_extra_run(books: Books) -> None:
    books.writer.note("confirmed", ["a", "b"])
    for start in (1.0, 2.0, 3.0):
        books.run("a", start, start + 0.5)
    books.run("b", 1.0, 2.0)
    assert books.audit().duplicated == {"a": 2}
    assert books.audit().ok, "how many are too many is the caller's to say"
    assert books.audit(extra_runs=2).ok
    assert not books.audit(extra_runs=1).ok


@pytest.mark.parametrize(
    ("runs", "overlap"),
    [
        ([(1.0, 2.0, 1), (2.0, 3.0, 2)], False),
        ([(1.0, 2.0, 1), (1.9, 3.0, 2)], True),
        ([(1.0, 9.0, 1), (2.0, 3.0, 2), (8.0, 8.5, 3)], True),
        ([(1.0, None, 1), (1.5, 3.0, 2)], False),
    ],
    ids=["one-after-the-other", "together", "inside-a-long-one", "cut-short-before"],
)
def test_overlaps(books: Books, runs: list[tuple[float, float | None, int]], overlap: bool) -> None:
    books.writer.note("confirmed", ["a"])
    for start, end, pid in runs:
        books.run("a", start, end, pid=pid)
    assert books.audit().overlapping == (["a"] if overlap else [])


def test_a_run_that_was_cut_short_lasts_as_long_as_its_process_showed_life(books: Books) -> None:
    books.writer.note("confirmed", ["a", "b"])
    books.run("a", 1.0, None, pid=1)
    books.run("b", 1.5, 4.0, pid=1)
    books.run("a", 3.0, 5.0, pid=2)
    assert books.audit().overlapping == ["a"]


def test_uncertain_ones_may_or_may_not_have_been_sent(books: Books) -> None:
    books.writer.note("uncertain", ["ran", "did-not"])
    books.writer.note("sending", ["its-producer-died"])
    books.run("ran", 1.0, 2.0)
    books.run("its-producer-died", 1.0, 2.0)
    report = books.audit()
    assert report.ok
    assert report.recovered == ["its-producer-died", "ran"]
    assert report.sent == {"confirmed": 0, "uncertain": 3, "failed": 0}


def test_the_stores_are_asked(books: Books, app: Dray) -> None:
    books.writer.note("confirmed", ["waits", "held", "dead", "ended", "no-result"])
    for task_id in ("held", "waits"):
        app.transport.send([Outgoing("default", task_id, b"", {})])
    held = app.transport.consumer(["default"], 1).receive(1, 0)
    app.backend.store([StoredResult("ended", State.SUCCESS, b"", None), StoredResult("waits", State.RETRY, b"", None)])
    books.run("no-result", 1.0, 2.0)
    report = books.audit(app)
    assert [delivery.id for delivery in held] == ["held"]
    assert (report.waiting, report.undecided, report.lost) == (2, 0, ["dead", "held"]), "one is held, two are missing"
    assert report.without_result == ["no-result"]


def test_what_a_worker_may_hold_is_undecided(books: Books, app: Dray) -> None:
    books.writer.note("confirmed", ["held"])
    app.transport.send([Outgoing("default", "held", b"", {})])
    app.transport.consumer(["default"], 1).receive(1, 0)
    report = books.audit(app)
    assert (report.undecided, report.lost, report.ok) == (1, [], True)


@pytest.mark.parametrize(
    ("error", "states"),
    [
        (Unavailable("down"), {"a": "failed", "b": "failed"}),
        (PublishUncertain("no answer", "a"), {"a": "uncertain", "b": "uncertain"}),
        (SendError("half", [Outgoing("q", "b", b"", {})]), {"a": "uncertain", "b": "failed"}),
        (KeyboardInterrupt(), {"a": "uncertain", "b": "uncertain"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_producer_writes_down_what_it_knows(books: Books, error: BaseException, states: dict[str, str]) -> None:
    with pytest.raises(type(error)), books.writer.sending("a", "b"):
        assert read_ledger(books.ledger) == {"a": "uncertain", "b": "uncertain"}, "what a killed producer leaves"
        raise error
    assert read_ledger(books.ledger) == states
    with books.writer.sending("a"):
        pass
    assert read_ledger(books.ledger)["a"] == "confirmed", "the second time it was sent"


def test_tasks_log_their_runs(tmp_path: Path) -> None:
    runs = RunLog(tmp_path / "runs.jsonl")
    app = Dray(config={}, transport="memory", backend="memory", workers={"default": {"pool": "threads"}})

    @app.task(name="good")
    def good() -> None:
        with runs.run():
            pass

    @app.task(name="bad")
    def bad() -> None:
        with runs.run():
            raise ValueError

    with app:
        worker = app.worker()
        thread = threading.Thread(target=worker.run)
        thread.start()
        result = good.apply_async((), task_id="good-1")
        with pytest.raises(Exception, match="ValueError"):
            bad.apply_async((), task_id="bad-1").get(10)
        result.get(10)
        worker.stop()
        thread.join(20)
    found = {run.id: (run.attempt, run.how) for run in read_runs(runs.path)}
    assert found == {"good-1": (0, "end"), "bad-1": (0, "error")}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("nonsense\n", read_ledger),
        ("[1]\n", read_ledger),
        ('{"id": "a", "state": "sent"}\n', read_ledger),
        ('{"id": "a", "attempt": 0, "event": "start", "time": 1}\n', read_runs),
        ('{"id": "a", "attempt": 0, "event": "end", "time": 1, "pid": 1}\n', read_runs),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, text: str, read: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match="file"):
        read(tmp_path / "file")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dray.yaml").write_text("transport: sqlite\nbackend: sqlite\n")

    def invoke(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["verify-ledger", "ledger.jsonl", "runs.jsonl", *arguments])
        return result.exit_code, result.output

    def test_in_order(self, books: Books) -> None:
        books.writer.note("confirmed", ["a"])
        books.run("a", 1.0, 2.0)
        code, output = self.invoke()
        assert (code, "nothing is lost" in output) == (0, True), output

    def test_lost(self, books: Books) -> None:
        books.writer.note("confirmed", ["gone-1"])
        code, output = self.invoke()
        assert (code, "gone-1" in output) == (1, True), output

    def test_extra_runs_as_json(self, books: Books) -> None:
        books.writer.note("confirmed", ["a"])
        books.run("a", 1.0, 2.0)
        books.run("a", 3.0, 4.0)
        assert self.invoke("--extra-runs", "1")[0] == 0
        code, output = self.invoke("--extra-runs", "0", "--json")
        found = json.loads(output)
        assert (code, found["ok"], found["duplicated"]) == (1, False, {"a": 1})

    def test_waiting_messages_are_not_lost(self, books: Books) -> None:
        with Dray() as app, books.writer.sending("a"):
            app.send_task("tasks.later", task_id="a")
        code, output = self.invoke("--json")
        assert (code, json.loads(output)["waiting"]) == (0, 1)
