"""Promises G1 to G4 under fire: every failpoint x what can happen there x pools x stores, with real processes, audited.

Each case: a producer sends a mix of tasks and keeps a ledger, a worker is armed to fail at one point, whoever died is
replaced by an unarmed one; when nothing waits any more the auditor compares the ledger, the tasks' run log and the
stores. ``bound`` states for each case how many extra runs the fault may be charged with, and why.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from dray.core.faults import POINTS
from tests.produce import COUNT, kind, send_one
from tests.stage import POOLS, TABLE, Case, Resources, Stage, group_lives, is_fifo

# --- the table ---------------------------------------------------------------------------------------------

TRANSPORTS = ("sqlite", "filesystem")
ATOMIC = ("sqlite",)
"""Transports that publish follow-ups and remove their cause in one transaction: nothing can happen in between."""
ACTIONS = ("kill", "stop", "raise", "exit")
SETTLING = ("stored", "follow_ups_sent", "acknowledged")


class Bound(NamedTuple):
    """Extra runs that a fault may be charged with: the sum of what is set."""

    why: str
    per_fault: int = 0
    unsettled: bool = False
    """Tasks that had begun when the process ended, and whose message was still in the store."""
    held: bool = False
    """Deliveries that the stopped worker held: another ran them, and it may run them too when it wakes."""


def bound(case: Case) -> Bound:
    """What G4 allows in this case."""
    point, action, hits = case.point, case.action, case.hits
    if point == "before_publish":
        return Bound("nothing was sent: sending again sends it once")
    if point == "confirmed":
        if action == "stop":
            return Bound("the producer only pauses")
        return Bound("it was stored, nobody learned so, and it is sent again under its id", per_fault=1)
    if hits == "child":
        if point == "encoded" and action in ("kill", "exit"):
            return Bound("exactly the run whose child died after the function", per_fault=1)
        return Bound("the function had not begun, or the parent keeps the lease, or it is the task's own failure")
    twice = point == "follow_ups_sent"  # published, and what caused it is still there: it will be published once more
    if action == "stop":
        return Bound("its leases ran out, others ran what it held", per_fault=int(twice), held=True)
    if action in ("kill", "exit"):
        return Bound("what it had begun and not settled", per_fault=int(twice), unsettled=True)
    if point == "draining":
        return Bound("a shutdown that fails is a worker that dies: exit code 1", unsettled=True)
    return Bound(
        {
            "received": "not begun; handed out again when the lease has ended",
            "handed_over": "the receiving loop connects again; what was handed over runs and is settled",
            "running": "the task's own failure: its retry policy decides; without one it is dead with this reason",
            "encoded": "as in running: an error of the run, whatever the function did before",
        }.get(point, "the batch is settled again, and what is settled stays so")
    )


def cases() -> Iterator[Case]:
    for point, action, pool, transport in itertools.product(TABLE, ACTIONS, POOLS, TRANSPORTS):
        if point == "follow_ups_sent" and transport in ATOMIC:
            continue
        if TABLE[point].process == "producer" and pool != "threads":
            continue  # a producer has no pool
        # After the confirmation "certainly not stored", which raise says, would be a lie.
        yield Case(point, "uncertain" if (point, action) == ("confirmed", "raise") else action, pool, transport)
    for point, transport in itertools.product(SETTLING, TRANSPORTS):
        if point != "follow_ups_sent" or transport not in ATOMIC:
            yield Case(point, "uncertain", "threads", transport)


# --- one case ----------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path, request.param)
    yield made
    made.close()


def parameters(hits: str) -> pytest.MarkDecorator:
    found = [case for case in cases() if (case.hits == "producer") is (hits == "producer")]
    return pytest.mark.parametrize("stage", found, ids=["-".join(case) for case in found], indirect=True)


def test_the_table_knows_every_failpoint() -> None:
    assert set(TABLE) == set(POINTS)


def stopped(pid: int) -> bool:
    """Not "the fault was logged": a SIGCONT that comes before the SIGSTOP is lost."""
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@parameters("producer")
def test_a_fault_in_the_producer(stage: Stage) -> None:
    stage.worker()
    producer = stage.produce(**stage.arms)
    if stage.case.action == "stop":
        stage.until(lambda: stopped(producer.pid), "the fault")
        os.kill(producer.pid, signal.SIGCONT)
    code = producer.wait(20)
    assert code == {"kill": -signal.SIGKILL, "exit": 70, "stop": 0}.get(stage.case.action, 1), stage.project.log()
    again = stage.produce()
    assert again.wait(20) == 0, stage.project.log()
    stage.until(lambda: stage.in_store() == 0, "an empty store")
    stage.end_workers()
    check(stage)


@parameters("worker")
def test_a_fault_in_the_worker(stage: Stage) -> None:
    case = stage.case
    worker = stage.worker(**stage.arms)
    for n in (-1, -2):
        send_one(stage.app, stage.ledger, 6 * n, {})
    stage.until(lambda: stage.ran(2) and stage.in_store() == 0, "the first tasks")
    stage.until_ready(worker)  # the first tasks may have been run before its last thread was started
    stage.until(lambda: Resources.of(worker.pid, case).descriptors["fifo"] >= 2, "a worker that waits for more")
    before = Resources.of(worker.pid, case)
    stage.send_all()
    if case.point == "draining":
        stage.until(lambda: stage.ran(COUNT // 3), "a third of the tasks")
        worker.send_signal(signal.SIGTERM)
    stage.until(lambda: stage.note_leased() and bool(stage.fired()), "the fault")
    if case.hits == "worker" and (case.action in ("kill", "exit") or case[:2] == ("draining", "raise")):
        stage.replace_dead(worker)
    elif case.hits == "worker" and case.action == "stop":
        stage.charged = stage.leased_most  # not what is leased now: leases may have ended since
        stage.worker()
    stage.finish()
    if not stage.killed and case.point != "draining":
        stage.until_given_back(worker, before)
    stage.end_workers()
    check(stage)


def check(stage: Stage) -> None:
    """The invariants."""
    case, report, log = stage.case, stage.audit(), stage.project.log()
    faults = stage.fired()
    assert faults, "the fault never fired: the case shows nothing"
    assert report.sent["confirmed"] >= COUNT
    assert report.lost == report.unexpected == report.without_result == [], (report, log)
    assert report.waiting == report.undecided == 0
    allowed = bound(case)
    most = allowed.per_fault * len(faults) + stage.charged * (allowed.unsettled or allowed.held)
    assert report.extra_runs <= most, (most, report, log)
    if not allowed.held and case.hits != "producer":
        assert report.overlapping == []
        assert "was lost" not in log, log
    own = {f"{kind(n)}-{n}" for n in range(COUNT) if kind(n) == "failing"}
    assert own <= set(report.dead)
    fails_tasks = case.action == "raise" and case.point in ("running", "encoded")
    assert len(set(report.dead) - own) <= fails_tasks * len(faults), report
    check_nothing_left(stage)


def check_nothing_left(stage: Stage) -> None:
    for worker in stage.workers:
        assert not group_lives(worker.pid), "processes outlived their worker"
    stage.app.close()
    fifos = [path for path in stage.project.folder.rglob("*") if is_fifo(path)]
    # A killed worker's two bells, its own and its consumer's, may be left until one that starts a minute later sweeps.
    assert len(fifos) <= 2 * stage.killed, fifos
