"""Redis under fire: real servers, real workers, a producer that goes on, and the auditor."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import redis

from dray.testing import ChaosProxy
from dray.testing.ledger import read_runs
from tests.servers import HOST, RedisServer
from tests.siege import LEASE_S, on_redis

DURABLE = {"appendonly": True, "appendfsync": "always"}
HELD = 10
"""Deliveries that a worker of two threads may hold at once when tasks take 3 ms: its look-ahead."""


def test_nothing_confirmed_is_lost_when_the_server_is_killed_under_load(tmp_path: Path) -> None:
    with RedisServer(**DURABLE) as server, on_redis(tmp_path, server.url()) as siege:
        worker = siege.worker("--pool", "prefork", "--size", "2")
        with siege.under_load():
            for _ in range(2):
                server.restart()
                before = len(siege.ended())
                siege.until(lambda: siege.ran(before + 50), "work that goes on")  # noqa: B023
        siege.drained()
        report = siege.end()
        assert worker.returncode == 0
        assert report.without_result == []
        assert siege.errors, "no call met the fault: the test shows nothing"


def test_the_first_call_after_a_restart_is_told_the_truth(tmp_path: Path) -> None:
    """The connection is dead, and nobody has used it since."""
    with RedisServer(**DURABLE) as server, on_redis(tmp_path, server.url()) as siege:
        siege.send("before")
        for number in range(3):
            server.restart()
            siege.send(f"after-{number}")
        assert sum(siege.errors.values()) <= 3
        siege.worker()
        siege.drained()
        siege.end()


def test_five_resets_in_three_seconds_stop_nobody(tmp_path: Path) -> None:
    with (
        RedisServer(**DURABLE) as server,
        ChaosProxy((HOST, server.port)) as proxy,
        on_redis(tmp_path, f"redis://{HOST}:{proxy.port}") as siege,
    ):
        siege.worker()
        with siege.under_load():
            for number in range(5):
                time.sleep(0.5)
                proxy.set(latency=0.005 * number, jitter=0.005 * number)
                proxy.reset_all()
            proxy.heal()
            before = len(siege.ended())
            siege.until(lambda: siege.ran(before + 50), "work that goes on")
        siege.drained()
        siege.end()
        assert siege.errors, "no call met the fault: the test shows nothing"


def test_answers_that_are_lost_under_load_lose_no_task(tmp_path: Path) -> None:
    """Confirmations, deliveries and acknowledgements: whatever was under way down to its client."""
    with (
        RedisServer() as server,
        ChaosProxy((HOST, server.port)) as proxy,
        on_redis(tmp_path, f"redis://{HOST}:{proxy.port}") as siege,
    ):
        siege.worker()
        with siege.under_load():
            for _ in range(2):
                proxy.set(swallow_down=True)
                time.sleep(0.3)
                proxy.heal()
                proxy.reset_all()
                before = len(siege.ended())
                siege.until(lambda: siege.ran(before + 20), "work that goes on")  # noqa: B023
        siege.drained()
        siege.end(extra_runs=2 * HELD)
        assert siege.errors["PublishUncertain"], "no confirmation was lost: the test shows nothing"


def test_a_flushed_server_costs_what_was_in_it_and_nothing_else(tmp_path: Path) -> None:
    """What FLUSHALL deletes is gone (documented); nobody hangs, nobody dies, and all that comes later runs."""
    with RedisServer() as server, on_redis(tmp_path, server.url()) as siege:
        siege.worker()
        with siege.under_load():
            for number in range(20):
                siege.send(f"delayed-{number}", countdown=3600)
            with redis.Redis(port=server.port) as client:
                client.flushall()
            before = len(siege.ended())
            siege.until(lambda: siege.ran(before + 50), "work that goes on")
        siege.send("after")
        siege.until(lambda: "after" in siege.ended(), "the call that came after")
        siege.drained(but=20 + HELD)
        for worker in siege.workers:
            assert worker.poll() is None, siege.project.log()
        lost = siege.audit().lost
        assert {f"delayed-{number}" for number in range(20)} <= set(lost)
        assert len(lost) <= 20 + HELD


def test_a_worker_that_was_stopped_past_its_lease_settles_nothing_of_others(tmp_path: Path) -> None:
    with RedisServer() as server, on_redis(tmp_path, server.url()) as siege:
        paused = siege.worker()
        with siege.under_load():
            siege.until(lambda: siege.ran(20), "twenty tasks")
            os.kill(paused.pid, signal.SIGSTOP)
            siege.worker()
            time.sleep(1.2 * LEASE_S)
            os.kill(paused.pid, signal.SIGCONT)
            before = len(siege.ended())
            siege.until(lambda: siege.ran(before + 50), "work that goes on")
        siege.drained()
        siege.end(extra_runs=HELD)


def test_workers_whose_clocks_are_wrong_run_each_task_once_and_in_time(tmp_path: Path) -> None:
    """An hour ahead and an hour behind: leases and delays go by the server's clock."""
    skew = """
    import dray.core.clock
    SKEW = float(os.environ.get("SKEW", "0"))
    dray.core.clock.SystemClock.time = staticmethod(lambda: time.time() + SKEW)
    """
    with RedisServer() as server, on_redis(tmp_path, server.url(), skew) as siege:
        for hours in (-1, 1):
            siege.worker(SKEW=str(hours * 3600.0))
        began = time.monotonic()
        siege.send("later", countdown=1.0)
        siege.send("long", "long", 1.5 * LEASE_S)
        for number in range(100):
            siege.send(f"t{number}")
        siege.drained()
        report = siege.end()
        assert report.duplicated == {}
        started = {run.id: run.start for run in read_runs(siege.runs)}
        assert 1.0 <= started["later"] - began <= 4.0
