"""Servers that stand in for each other, under fire. Slow: run by ``make test-clusters``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.servers import RabbitMQCluster, RedisCluster, RedisSentinelTrio
from tests.siege import Siege, on_rabbitmq, on_redis

pytestmark = pytest.mark.skipif("DRAY_TEST_CLUSTERS" not in os.environ, reason="slow: make test-clusters")

WINDOW_S = 1.0
"""What a master confirmed in its last moments may be unknown to its replica: documented, as long as a heartbeat."""
FAILOVER_S = 30.0
HELD = 40


def goes_on(siege: Siege, count: int = 50) -> None:
    before = len(siege.ended())
    siege.until(lambda: siege.ran(before + count), "work that goes on", FAILOVER_S)


def test_sentinels_promote_a_replica_and_work_goes_on(tmp_path: Path) -> None:
    with RedisSentinelTrio() as trio, on_redis(tmp_path, trio.url()) as siege:
        siege.worker()
        with siege.under_load():
            master = trio.master
            master.kill()
            killed_at = time.monotonic()
            trio.await_other_master(master)
            goes_on(siege)
        siege.send("after")
        siege.until(lambda: "after" in siege.ended(), "the call that came after")
        siege.drained(but=HELD)
        lost = siege.known() - siege.ended()
        assert lost <= confirmed_between(siege, killed_at - WINDOW_S, killed_at), "lost outside of the window"
        assert siege.workers[0].poll() is None


def confirmed_between(siege: Siege, since: float, until: float) -> set[str]:
    lines = map(json.loads, siege.ledger.path.read_text().splitlines())
    return {line["id"] for line in lines if line["state"] == "confirmed" and since <= line["time"] <= until}


def test_a_slot_that_moves_under_load_loses_nothing(tmp_path: Path) -> None:
    with RedisCluster() as cluster, on_redis(tmp_path, cluster.url()) as siege:
        key = "{dray:default}"
        siege.worker()
        with siege.under_load():
            for _ in range(3):
                owner = cluster.owner_of(key)
                target = next(server for server in cluster.servers if server is not owner)
                cluster.move_slot_of(key, target, count=1)
                goes_on(siege)
        siege.drained()
        siege.end(extra_runs=HELD)


def test_the_leader_of_a_quorum_queue_is_killed_and_work_goes_on(tmp_path: Path) -> None:
    with RabbitMQCluster() as cluster:
        vhost = cluster.add_vhost()
        with on_rabbitmq(tmp_path, cluster.urls(vhost)) as siege:
            siege.worker()
            with siege.under_load():
                for node in cluster.nodes:
                    node.eval("[ok = dets:sync(Table) || Table <- dets:all()]")
                leader = cluster.leader_of("dray.queue.default", vhost)
                leader.kill()
                goes_on(siege)
                leader.start()
                goes_on(siege)
            siege.drained()
            siege.end(extra_runs=2 * HELD)
