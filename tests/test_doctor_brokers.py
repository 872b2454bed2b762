"""A broker that cannot be used as it is configured: ``dray doctor`` and the worker say which setting, and end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pika
import pytest
import redis
from click.testing import CliRunner

from dray.cli import cli
from dray.core.clock import SystemClock
from dray.core.message import Outgoing
from dray.plugins.transports.redis import RedisTransport
from dray.testing import plugin_context
from dray.testing.network import closed_port
from tests.servers import HOST, Certificates, RedisServer, SharedRabbitMQ, SharedRedis
from tests.siege import Siege

SECRET = "hunter2hunter2"
QUEUE = "dray-doctor"
SOON_S = 20.0


@dataclass
class Places:
    """Servers that are set up in many ways, started when they are asked for."""

    request: pytest.FixtureRequest
    folder: Path

    @cached_property
    def redis(self) -> str:
        shared: SharedRedis = self.request.getfixturevalue("redis_server")
        return shared.url()

    @cached_property
    def rabbitmq(self) -> SharedRabbitMQ:
        found: SharedRabbitMQ = self.request.getfixturevalue("rabbitmq")
        return found

    @cached_property
    def vhost_url(self) -> str:
        return str(self.request.getfixturevalue("rabbitmq_url"))

    def redis_with(self, **options: Any) -> RedisServer:
        server = RedisServer(**options)
        self.request.addfinalizer(server.close)
        return server.start()

    def redis_over_tls(self) -> RedisServer:
        return self.redis_with(tls=Certificates.make(self.folder))

    def replica(self) -> str:
        return self.redis_with(replicaof=(HOST, self.redis_with().port)).url()

    def with_a_key_of_another_kind(self) -> str:
        """Somebody else uses the names of our keys."""
        url, prefix = self.redis, self.folder.name
        transport = RedisTransport(
            RedisTransport.Options(url=url, prefix=prefix), plugin_context("redis", SystemClock())
        )
        transport.open()
        transport.send([Outgoing(QUEUE, "m", b"body", {})])
        transport.close()
        with redis.Redis.from_url(url) as client:
            for key in client.keys(f"*{prefix}:{QUEUE}*"):
                kind = client.type(key)
                client.delete(key)
                client.set(key, "x") if kind != b"string" else client.lpush(key, "x")
        return url

    def with_a_queue_of_another_kind(self) -> str:
        connection = pika.BlockingConnection(pika.URLParameters(self.vhost_url))
        connection.channel().queue_declare(f"dray.queue.{QUEUE}", durable=True)
        connection.close()
        return self.vhost_url

    def port_of_rabbitmq(self) -> int:
        return urlsplit(self.rabbitmq.url()).port or 5672

    def user_without_permission(self) -> str:
        self.rabbitmq.eval(
            'case rabbit_auth_backend_internal:exists(<<"poor">>) of true -> ok;'
            ' false -> rabbit_auth_backend_internal:add_user(<<"poor">>, <<"poor">>, <<"test">>) end'
        )
        return self.vhost_url.replace("guest:guest@", "poor:poor@")


class Case(NamedTuple):
    """One thing that is wrong."""

    use: str
    url: Callable[[Places], str]
    says: tuple[str, ...]
    """What the finding holds, whatever the case of its letters: the setting, and what is wrong with it."""
    own_prefix: bool = False
    """Its keys begin with the name of the test's folder."""


CASES: dict[str, Case] = {
    # --- Redis
    "redis, no password": Case(
        "redis", lambda places: f"redis://{HOST}:{places.redis_with(requirepass=SECRET).port}/0", ("password",)
    ),
    "redis, wrong password": Case(
        "redis",
        lambda places: f"redis://:wrong-{SECRET}@{HOST}:{places.redis_with(requirepass='other').port}/0",
        ("password",),
    ),
    "redis, wrong port": Case("redis", lambda _: f"redis://{HOST}:{closed_port()}/0", ("url", HOST, "refused")),
    "redis, unknown host": Case(
        "redis", lambda _: "redis://no-such-host.invalid:6379/0", ("url", "no-such-host.invalid")
    ),
    "redis, TLS to a plain port": Case(
        "redis", lambda places: places.redis.replace("redis://", "rediss://"), ("redis://", "TLS")
    ),
    "redis, plain to a TLS port": Case(
        "redis", lambda places: f"redis://{HOST}:{places.redis_over_tls().port}/0", ("rediss://",)
    ),
    "redis, a certificate nobody trusts": Case(
        "redis", lambda places: places.redis_over_tls().url(), ("certificate", "tls_ca")
    ),
    "redis, not a Redis": Case("redis", lambda places: f"redis://{HOST}:{places.port_of_rabbitmq()}/0", ("url",)),
    "redis, database out of range": Case(
        "redis", lambda places: f"{places.redis.rpartition('/')[0]}/99", ("database", "url")
    ),
    "redis, a replica": Case("redis", Places.replica, ("replica", "url")),
    "redis, one that evicts": Case(
        "redis",
        lambda places: places.redis_with(maxmemory="100mb", maxmemory_policy="allkeys-lru").url(),
        ("maxmemory-policy", "noeviction"),
    ),
    "redis, keys of something else": Case(
        "redis", Places.with_a_key_of_another_kind, ("prefix", "key"), {"prefix": ""}
    ),
    # --- RabbitMQ
    "rabbitmq, wrong password": Case(
        "rabbitmq", lambda places: places.vhost_url.replace("guest:guest@", f"guest:{SECRET}@"), ("password", "url")
    ),
    "rabbitmq, wrong virtual host": Case(
        "rabbitmq", lambda places: places.rabbitmq.url("no-such-vhost"), ("virtual host", "no-such-vhost", "url")
    ),
    "rabbitmq, no permission": Case("rabbitmq", Places.user_without_permission, ("virtual host", "poor")),
    "rabbitmq, wrong port": Case("rabbitmq", lambda _: f"amqp://guest:guest@{HOST}:{closed_port()}/", ("url", "port")),
    "rabbitmq, unknown host": Case(
        "rabbitmq", lambda _: "amqp://guest:guest@no-such-host.invalid/", ("url", "no-such-host.invalid")
    ),
    "rabbitmq, TLS to a plain port": Case(
        "rabbitmq", lambda places: places.rabbitmq.url().replace("amqp://", "amqps://"), ("amqp://", "TLS")
    ),
    "rabbitmq, plain to a TLS port": Case(
        "rabbitmq", lambda places: f"amqp://guest:guest@{HOST}:{places.redis_over_tls().port}/", ("amqps://",)
    ),
    "rabbitmq, a certificate nobody trusts": Case(
        "rabbitmq", lambda places: f"amqps://guest:guest@{HOST}:{places.redis_over_tls().port}/", ("certificate", "ca")
    ),
    "rabbitmq, not a RabbitMQ": Case(
        "rabbitmq", lambda places: f"amqp://guest:guest@{HOST}:{urlsplit(places.redis).port}/", ("AMQP", "url")
    ),
    "rabbitmq, a queue with other arguments": Case(
        "rabbitmq", Places.with_a_queue_of_another_kind, ("queue_type", QUEUE)
    ),
}


OF_THE_WORKER = (
    "redis, wrong password",
    "redis, wrong port",
    "redis, plain to a TLS port",
    "redis, a replica",
    "rabbitmq, wrong password",
    "rabbitmq, wrong virtual host",
    "rabbitmq, wrong port",
    "rabbitmq, TLS to a plain port",
    "rabbitmq, a queue with other arguments",
)
"""Its words are the doctor's; these show that it ends with them."""


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A configuration with one thing wrong, and a module with a task."""
    case: Case = request.param
    transport = {"use": case.use, "url": case.url(Places(request, tmp_path)), "connect_timeout": 1, "timeout": 2}
    transport |= {"prefix": tmp_path.name} if case.own_prefix else {}
    path = tmp_path / "dray.yaml"
    workers = {"default": {"queues": [QUEUE], "pool": "solo"}}
    path.write_text(json.dumps({"transport": transport, "backend": "null", "workers": workers}))
    (tmp_path / "tasks.py").write_text("from dray import Dray\napp = Dray()\n\n@app.task\ndef t(): pass\n")
    yield path


def cases(names: Iterable[str]) -> list[Any]:
    """Each with its configuration."""
    return [pytest.param(CASES[name], CASES[name], id=name) for name in names]


def check_text(case: Case, text: str) -> None:
    plain = " ".join(text.split()).lower()
    missing = [words for words in case.says if words.lower() not in plain]
    assert not missing, f"{missing} is not in: {text}"
    assert SECRET not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("case", "config"), cases(CASES), indirect=["config"])
def test_the_doctor_names_the_setting(case: Case, config: Path) -> None:
    began = time.monotonic()
    done = CliRunner().invoke(cli, ["doctor", "--json", "--config", str(config)])
    assert time.monotonic() - began < SOON_S
    assert done.exit_code == 1, done.output
    (finding,) = [each for each in json.loads(done.stdout) if each["check"] == "transport"]
    assert not finding["ok"], finding
    check_text(case, finding["detail"])
    assert SECRET not in done.output


@pytest.mark.parametrize(("case", "config"), cases(OF_THE_WORKER), indirect=["config"])
def test_a_worker_names_the_setting_and_ends(case: Case, config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dray", "worker", "tasks:app"],
        cwd=config.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * SOON_S,
    )
    text = done.stdout + done.stderr
    assert done.returncode not in (0, -6, -11), text
    check_text(case, text)


def test_a_worker_that_meets_keys_of_something_else_lives_and_waits(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Who made them may remove them: it tries again, ever more slowly, and says why."""
    places = Places(request, tmp_path)
    url = places.with_a_key_of_another_kind()
    with Siege(tmp_path, {"use": "redis", "url": url, "prefix": tmp_path.name}, {"use": "null"}) as siege:
        worker = siege.worker("--queues", QUEUE)
        siege.until(lambda: siege.project.log().count("trying again") >= 2, "two attempts")
        check_text(CASES["redis, keys of something else"], siege.project.log())
        with redis.Redis.from_url(url) as client:
            client.delete(*client.keys(f"*{tmp_path.name}:{QUEUE}*"))
        siege.send("after", queue=QUEUE)
        siege.drained()
        assert worker.poll() is None
