"""The simulator itself, and the histories that are run on every change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dray.testing.sim_kernel import Kernel
from dray.testing.sim_threading import SimEvent, SimLock
from dray.testing.simulation import main, simulate
from tests.sim_mutants import MUTANTS, mutated

SEEDS, CHUNKS = 300, 12
FROZEN = [
    line.split(maxsplit=1)
    for line in (Path(__file__).parent / "simulation_seeds.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_promise_is_broken(chunk: int) -> None:
    faults: Counter[str] = Counter()
    for seed in range(chunk, SEEDS, CHUNKS):
        report = simulate(seed)
        assert not report.violations, f"python -m dray.testing.simulation --replay {seed}: {report.violations}"
        faults += report.faults
    for kind in (
        "refused",
        "lost",
        "slow",
        "kill",
        "pause",
        "crash",
        "stop",
        "stop-cold",
        "outage",
        "raised",
        "replay",
    ):
        assert faults[kind], f"no {kind} in {faults}"


@pytest.mark.parametrize(("seed", "why"), FROZEN, ids=[seed for seed, _ in FROZEN])
def test_frozen_seed(seed: str, why: str) -> None:
    report = simulate(int(seed))
    assert not report.violations, f"{why}: {report.violations}"


@pytest.mark.parametrize("seed", [3, 7, 1001])
def test_a_seed_replays_bit_for_bit(seed: int) -> None:
    first, second = simulate(seed, keep_trace=True), simulate(seed, keep_trace=True)
    assert first.trace == second.trace
    assert first == second


def test_a_seed_replays_in_another_process_with_other_hashes() -> None:
    code = "from dray.testing.simulation import simulate; print(*[simulate(seed).digest for seed in (3, 7, 16)])"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [simulate(seed).digest for seed in (3, 7, 16)], done.stderr


def test_different_seeds_are_different_histories() -> None:
    assert len({simulate(seed).digest for seed in range(5)}) == 5


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_core_is_noticed(name: str) -> None:
    with mutated(name):
        caught = next((seed for seed in range(100) if simulate(seed).violations), None)
    assert caught is not None, f"100 histories of a worker that {name}, and nothing was noticed"


def test_the_command_counts_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--jobs", "1"]) == 0
    assert "3 seeds in" in capsys.readouterr().out


def test_the_command_shows_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", "7"]) == 0
    shown = capsys.readouterr().out
    assert "claimed [" in shown
    assert simulate(7).digest in shown


def test_the_command_tells_what_broke(capsys: pytest.CaptureFixture[str]) -> None:
    with mutated("acknowledges before the result is stored"):
        assert main(["--replay", "0"]) == 1
    assert "BROKEN G3" in capsys.readouterr().out


def test_a_lock_is_held_over_a_switch_and_an_event_wakes() -> None:
    kernel = Kernel(1)
    lock, event, order = SimLock(kernel), SimEvent(kernel), list[str]()
    process = kernel.process("p")

    def first() -> None:
        with lock:
            order.append("first in")
            kernel.sleep(5)
            order.append("first out")
        event.set()

    def second() -> None:
        kernel.sleep(1)
        with lock:
            order.append("second in")

    kernel.spawn(process, "first", first)
    kernel.spawn(process, "second", second)
    try:
        assert not event.wait(4.0)
        assert event.wait(4.0)
        kernel.sleep(1)
        assert order == ["first in", "first out", "second in"]
        assert kernel.now == pytest.approx(6.0)
    finally:
        kernel.close()


def test_the_dead_take_no_further_step() -> None:
    kernel = Kernel(1)
    process, steps = kernel.process("p"), list[int]()

    def run() -> None:
        while True:
            kernel.sleep(1)
            steps.append(int(kernel.now))

    kernel.spawn(process, "main", run)
    kernel.sleep(2.5)
    kernel.kill(process)
    kernel.sleep(5)
    kernel.close()
    assert steps == [1, 2]


def test_a_paused_process_goes_on_where_it_was() -> None:
    kernel = Kernel(1)
    process, moments = kernel.process("p"), list[float]()
    kernel.spawn(process, "main", lambda: (kernel.sleep(1), moments.append(kernel.now)))
    process.paused_until = 10.0
    kernel.sleep(12)
    kernel.close()
    assert moments == [pytest.approx(11.0)]
