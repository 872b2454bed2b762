"""What Celery is known to do wrong with Redis and RabbitMQ, done right: one test for each failure.

The names of Celery's tickets stand for thousands of hours; none of these needs a setting here.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from dray.core.message import Outgoing
from dray.testing.ledger import read_runs
from tests.servers import RabbitMQServer, RedisServer, SharedRabbitMQ, SharedRedis
from tests.siege import LEASE_S, Siege, on_rabbitmq, on_redis

BROKERS = ("redis", "rabbitmq")


@pytest.fixture(params=BROKERS)
def siege(request: pytest.FixtureRequest, tmp_path: Path, redis_prefix: str) -> Iterator[Siege]:
    """On a server that all tests share."""
    if request.param == "redis":
        server: SharedRedis = request.getfixturevalue("redis_server")
        made = on_redis(tmp_path, server.url(), prefix=redis_prefix)
    else:
        made = on_rabbitmq(tmp_path, request.getfixturevalue("rabbitmq_url"))
    with made:
        yield made


# --- connections -----------------------------------------------------------------------------------------------


def test_a_worker_goes_on_consuming_after_redis_came_back(tmp_path: Path) -> None:
    """Celery 4 and 5: connected again, it says, and takes no task any more until somebody restarts it."""
    with RedisServer(appendonly=True) as server, on_redis(tmp_path, server.url()) as siege:
        siege.worker()
        for number in range(3):
            siege.send(f"before-{number}")
            siege.drained()
            server.stop()  # it waits for tasks, and has nothing else to do
            server.start()
            siege.send(f"after-{number}")
            siege.drained()
        siege.end()


# --- long tasks ------------------------------------------------------------------------------------------------


def test_a_long_task_is_not_delivered_again_while_it_runs(tmp_path: Path, redis_server: SharedRedis) -> None:
    """Celery on Redis: whatever runs longer than ``visibility_timeout`` is run again, and again."""
    with on_redis(tmp_path, redis_server.url(), prefix=tmp_path.name) as siege:
        siege.worker("--pool", "prefork", "--size", "1")
        siege.send("long", "long", 2.5 * LEASE_S)
        siege.until(lambda: bool(siege.runs.exists() and siege.starts("long")), "its start")
        siege.worker()  # has nothing to do but to wait for it
        siege.drained()
        assert siege.end().duplicated == {}


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_a_task_longer_than_the_consumer_timeout_runs_once(
    queue_type: str, hasty_rabbitmq: RabbitMQServer, tmp_path: Path
) -> None:
    """Celery with late acknowledgement: after 30 minutes RabbitMQ closes the channel, and the task runs again."""
    url = hasty_rabbitmq.url(hasty_rabbitmq.add_vhost())
    with on_rabbitmq(tmp_path, url, queue_type=queue_type, consumer_timeout=5) as siege:
        siege.worker()
        siege.send("long", "long", 12.0)
        for number in range(20):
            siege.send(f"t{number}")
            time.sleep(0.2)
        siege.until(lambda: "long" in siege.ended(), "the end of the long task")
        siege.drained()
        assert siege.starts("long") == 1
        siege.end()


@pytest.fixture(scope="module")
def hasty_rabbitmq() -> Iterator[RabbitMQServer]:
    with RabbitMQServer(consumer_timeout=5000, channel_tick_interval=500) as server:
        yield server


# --- tasks for later -------------------------------------------------------------------------------------------


def test_tasks_for_later_wait_in_the_broker_and_not_in_a_worker(siege: Siege, request: pytest.FixtureRequest) -> None:
    """Celery: every task with an ``eta`` is fetched at once, past every prefetch limit, and is lost with the worker."""
    first, sent_at = siege.worker(), dict[str, float]()
    for _ in range(50):
        siege.app.send_task("tasks.quick", [0], countdown=3600)
    for number in range(10):
        sent_at[f"soon-{number}"] = time.monotonic()
        siege.send(f"soon-{number}", countdown=2.0)
    siege.send("now")
    siege.drained_of({"now"})
    assert held_by_workers(siege, request) == 0
    siege.kill(first)
    siege.worker()
    siege.drained()
    started = {run.id: run.start for run in read_runs(siege.runs)}
    assert all(started[id_] - at >= 1.99 for id_, at in sent_at.items()), "a task came early"
    assert held_by_workers(siege, request) == 0
    assert len(started) == 11


def held_by_workers(siege: Siege, request: pytest.FixtureRequest) -> int:
    """Messages that were handed out and not settled, as the broker says."""
    leased = siege.app.transport.stats(["default"])["default"].leased  # type: ignore[attr-defined]
    if leased is not None:
        return int(leased)
    broker: SharedRabbitMQ = request.getfixturevalue("rabbitmq")
    vhost = pika.URLParameters(request.getfixturevalue("rabbitmq_url")).virtual_host
    counts = broker.eval(
        f'[Count || [{{_, Count}}] <- rabbit_amqqueue:info_all(<<"{vhost}">>, [messages_unacknowledged])]'
    )
    return sum(json.loads(counts))


# --- what cannot be read ---------------------------------------------------------------------------------------

HEADERS = {"task": "tasks.quick", "type": "json"}
UNREADABLE: dict[str, tuple[dict[str, str], bytes]] = {
    "not JSON": (HEADERS, b"\xff\xfe{[1], {}"),
    "cut off": (HEADERS, b"[[1], {"),
    "no headers": ({}, b"hello"),
    "foreign headers": ({"lang": "py", "argsrepr": "()"}, b"[[], {}, {}]"),
    "empty": (HEADERS, b""),
}


def test_a_body_that_is_not_json_kills_no_worker(siege: Siege) -> None:
    """Celery: one message with a body that cannot be decoded, and the worker ends; or starts, and ends again."""
    expect_dead(siege, UNREADABLE)


def test_a_body_of_three_elements_is_refused_once(siege: Siege) -> None:
    """Celery: ``not enough values to unpack``, a worker that crashes, restarts and takes the same message again."""
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    expect_dead(
        siege,
        {
            "three": (HEADERS, json.dumps([[1], {}, embed]).encode()),
            "one": (HEADERS, b"[[1]]"),
            "an object": (HEADERS, b'{"args": [1]}'),
        },
    )


def expect_dead(siege: Siege, messages: dict[str, tuple[dict[str, str], bytes]]) -> None:
    """Each becomes one dead letter with a reason; what comes after runs."""
    transport: Any = siege.app.transport
    transport.send([Outgoing("default", id_, body, headers) for id_, (headers, body) in messages.items()])
    worker = siege.worker()
    siege.send("after")
    siege.drained()
    siege.until(lambda: len(transport.dead_list(None, 100)) >= len(messages), "the dead letters")
    letters = transport.dead_list(None, 100)
    assert sorted(letter.id for letter in letters) == sorted(messages)
    assert all(letter.reason for letter in letters)
    assert all(letter.delivery_count == 1 for letter in letters), "it was tried again"
    assert worker.poll() is None, siege.project.log()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert siege.starts("after") == 1
