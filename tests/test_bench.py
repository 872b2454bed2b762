"""``dray bench`` on small numbers with real workers, and what it counts and computes with."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import tables
from benchmarks.contests import CONTESTS, DEEP, REACHES, REDIS_DRAIN, REDIS_LATENCY, SHALLOW
from dray.cli import bench, bench_processes, bench_rig, cli
from dray.cli.bench_progress import Counter, Reader


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *words])


def measured(*words: str) -> dict[str, Any]:
    result = run(*words, "--repeats", "1", "--json", "-")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return {name: figures["median"] for name, figures in found["measures"].items()}


def plausible(rate: float) -> bool:
    return 10 < rate < 5_000_000


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["sqlite", "filesystem"])
def test_a_queue_is_filled_and_drained(transport: str) -> None:
    found = measured("drain", "--tasks", "300", "--transport", transport, "--size", "2")["drain"]
    assert plausible(found["per_s"])
    assert found["start_s"] > 0
    assert found["left"] == 0


def test_callers_are_measured_alone() -> None:
    found = measured("send", "--tasks", "300", "--threads", "4")["send"]
    assert all(plausible(found[name]) for name in ("delay_per_s", "delay_threads_per_s", "send_many_per_s"))
    assert found["left"] == 3 * 300


def test_a_caller_and_a_worker_at_the_same_time() -> None:
    found = measured("live", "--tasks", "300", "--batch", "50", "--size", "1")["live"]
    assert plausible(found["per_s"])
    assert plausible(found["send_per_s"])
    assert found["left"] == 0


def test_round_trips_need_no_back_end_to_be_named() -> None:
    found = measured("latency", "--tasks", "20", "--size", "1")["latency"]
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["slowest_ms"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_of_the_whole_worker() -> None:
    found = measured("memory", "--tasks", "200", "--size", "2")["memory"]
    assert 5 < found["idle_mb"] <= found["warm_mb"] + 5
    assert abs(found["growth_mb"]) < 50
    assert found["delayed"] == 200
    assert found["left"] == 0


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_transport_that_lives_in_one_process(pool: str) -> None:
    found = measured("--tasks", "200", "--transport", "memory", "--pool", pool)
    assert list(found) == ["send", "drain", "latency"]
    assert plausible(found["drain"]["per_s"])
    assert found["latency"]["p50_ms"] > 0


def test_people_see_a_table_of_medians(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = run("drain", "--tasks", "100", "--repeats", "2", "--size", "1", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "drain: tasks a second" in result.stdout
    found = json.loads(file.read_text())
    runs = [figures["per_s"] for figures in found["measures"]["drain"]["runs"]]
    assert found["measures"]["drain"]["median"]["per_s"] == pytest.approx(sum(runs) / 2)
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["versions"]["dray"]
    assert "ruff" not in found["versions"]


def test_options_of_a_plugin_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    measured("drain", "--tasks", "50", "--size", "1", "--transport", f"{{use: sqlite, path: {path}}}")
    assert path.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("live", "--transport", "memory"), "this transport lives in one"),
        (("nothing",), "'nothing' is not one of"),
        (("drain", "--transport", "{use: sqlite"), "nor YAML"),
        (("drain", "--transport", "nats://me:hidden@localhost/"), "no plugin 'nats'"),
        (("latency", "--backend", "null", "--tasks", "10", "--size", "1"), "no result back end is configured"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], expected: str) -> None:
    result = run(*words)
    assert result.exit_code != 0
    assert expected in result.output
    assert "hidden" not in result.output


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rig, "TARGET", "dray.cli.bench_tasks:absent")
    result = run("drain", "--tasks", "10")
    assert result.exit_code == 1
    assert "the worker ended with code 2" in result.output


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_TRANSPORT", "memory")
    assert measured("drain", "--tasks", "50", "--size", "1")["drain"]["left"] == 0


def test_a_median_with_a_figure_missing_is_missing() -> None:
    assert bench.medians([{"a": 1.0, "b": 4.0}, {"a": 9.0, "b": None}, {"a": 2.0, "b": 5.0}]) == {"a": 2.0, "b": None}


def test_passwords_stay_out_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dray", "bench", "--transport", "amqp://me:hidden@host/"])
    assert "hidden" not in json.dumps(bench.surroundings())


# --- counting ----------------------------------------------------------------------------------------------


def test_processes_count_together(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "ran")
    counter = Counter(tmp_path / "ran")
    counter.tick()  # what a child inherits is not what it writes to
    children = [multiprocessing.get_context("fork").Process(target=_ticks, args=(counter, 500)) for _ in range(3)]
    for child in children:
        child.start()
    counter.tick(7)
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert reader.total() == 1 + 7 + 3 * 500


def test_threads_count_together(tmp_path: Path) -> None:
    reader, counter = Reader(tmp_path / "ran"), Counter(tmp_path / "ran")
    threads = [threading.Thread(target=_ticks, args=(counter, 20_000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.total() == 80_000


def _ticks(counter: Counter, count: int) -> None:
    for _ in range(count):
        counter.tick()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_processes_use() -> None:
    command = [sys.executable, "-c", "import sys; [i * i for i in range(2_000_000)]; print(1, flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    assert child.pid in bench_processes.tree(os.getpid())
    used = bench_processes.cpu_s([child.pid])
    assert used is not None
    assert 0.01 < used < 60
    size = bench_processes.pss_mb([child.pid])
    assert size is not None
    assert 1 < size < 500
    before = bench_processes.cpu_s([os.getpid()]) or 0.0
    child.communicate(b"\n")
    after = bench_processes.cpu_s([os.getpid()]) or 0.0
    assert after - before >= used - 0.02, "children that have ended count with their parent"
    assert bench_processes.cpu_s([child.pid]) is None
    assert bench_processes.pss_mb([child.pid]) is None


# --- what the project's own benchmarks compute -------------------------------------------------------------


def _report(**rates: list[float]) -> dict[str, Any]:
    return {
        "runs": [
            {"who": who, "contest": REDIS_DRAIN.key, "measure": "drain", "round": at, "per_s": rate}
            for who, found in rates.items()
            for at, rate in enumerate(found)
        ]
    }


def test_goals_are_met_by_the_median() -> None:
    (row,) = tables.goal_rows(_report(dray=[59_000.0, 61_000.0, 90_000.0]))
    assert row == ("Redis, drain", ">= 60,000", "61,000", "59,000", "90,000", "met")
    (row,) = tables.goal_rows(_report(dray=[59_000.0, 58_000.0, 90_000.0]))
    assert row[-1] == "missed"


def test_a_deep_queue_is_set_against_the_better_of_the_others() -> None:
    report = _report(dray=[100_000.0])
    report["runs"] += [
        {"who": "dray", "contest": contest["redis"].key, "round": 0, "per_s": rate}
        for contest, rate in ((SHALLOW, 50_000.0), (DEEP, 80_000.0))
    ]
    assert list(tables.goal_rows(report))[-1][2:] == ("0.80", "", "", "missed")


def test_ratios_are_those_of_the_rounds() -> None:
    report = _report(dray=[100.0, 200.0, 300.0], huey=[10.0, 50.0, 20.0], saq=[150.0])
    rows = list(tables.peer_rows(report, REDIS_DRAIN))
    assert [row[0] for row in rows] == ["dray", "saq", "huey"]
    assert rows[2][-1] == "10.0 x (4.0 to 15.0)"
    assert rows[1][-1] == "0.7 x (0.7 to 0.7)", "the rounds that both took part in"
    assert tables.ratios({0: 2.0}, {0: 6.0}, rates=False) == [3.0], "of milliseconds less is better"


def test_every_goal_is_of_a_contest_that_runs() -> None:
    assert {reach.contest.key for reach in REACHES} <= {contest.key for contest in CONTESTS}
    assert len({contest.key for contest in CONTESTS}) == len(CONTESTS)
    assert REDIS_LATENCY.results
