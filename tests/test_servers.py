"""The servers that other tests rely on: they start, keep their data, fail over, and never outlive their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pika.exceptions  # type: ignore[import-untyped]
import psutil
import pytest
import redis

from tests.servers import (
    Certificates,
    RabbitMQCluster,
    RabbitMQServer,
    RedisCluster,
    RedisSentinelTrio,
    RedisServer,
    SharedRabbitMQ,
    SharedRedis,
    free_ports,
)
from tests.servers_process import until


def test_redis_restarts_on_its_port_and_its_data() -> None:
    with RedisServer(appendonly=True, appendfsync="always") as server:
        server.command("SET", "kept", "yes")
        before = server.url()
        server.kill()
        assert not server.running
        server.start()
        assert (server.url(), server.command("GET", "kept")) == (before, "yes")
        folder = server.folder
    assert not folder.exists()


def test_redis_is_paused_and_resumed() -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url(), socket_timeout=0.2, retry=None) as client:
        client.ping()
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
        assert client.ping()


def test_redis_speaks_tls_and_over_a_unix_socket(tmp_path: Path) -> None:
    with RedisServer(tls=Certificates.make(tmp_path), requirepass="pass/word") as server:
        assert server.url().startswith("rediss://")
        assert server.command("PING")
    with RedisServer(unixsocket=True) as server, redis.Redis.from_url(server.unix_url()) as client:
        assert client.ping()


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="no-such-option"), RedisServer(no_such_option=1):
        pass


def test_a_server_ends_with_its_owner_however_it_dies(tmp_path: Path) -> None:
    script = """
import sys, time
from tests.servers import RedisServer
server = RedisServer().start()
print(server.pid, server.folder, flush=True)
time.sleep(60)
"""
    RedisServer().close()  # skips here, not in the owner, where Redis is missing
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    owner.stdout.close()
    assert psutil.pid_exists(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not psutil.pid_exists(int(pid)) and not Path(folder).exists(), "the server is gone")


def test_shared_servers_end_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        """
import os, pathlib, pytest
@pytest.mark.parametrize("number", range(4))
def test_shared(redis_server, number):
    pathlib.Path(os.environ["SEEN"], str(number)).write_text(redis_server.url())
"""
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DRAY_TEST_", "PYTEST_"))}
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)]
    subprocess.run(command, env={**env, "SEEN": str(tmp_path), "PYTHONPATH": root}, cwd=tmp_path, check=True)
    (url,) = {(tmp_path / str(number)).read_text() for number in range(4)}

    def is_gone() -> bool:
        try:
            with redis.Redis.from_url(url, retry=None) as client:
                return not client.ping()
        except redis.ConnectionError:
            return True

    until(is_gone, "the shared Redis is gone")


def test_sentinels_promote_the_replica() -> None:
    with RedisSentinelTrio() as trio:
        old = trio.master
        old.command("SET", "kept", "yes")
        until(lambda: trio.servers[1].command("GET", "kept") == "yes", "it is replicated")
        old.kill()
        new = trio.await_other_master(old)
        assert new.command("GET", "kept") == "yes"
        assert new.command("SET", "more", "yes")


def test_a_slot_of_a_cluster_moves() -> None:
    with RedisCluster() as cluster:
        source = cluster.owner_of("{some}key")
        source.command("SET", "{some}key", "kept")
        target = next(server for server in cluster.servers if server is not source)
        cluster.move_slot_of("{some}key", target)
        assert cluster.owner_of("{some}key") is target
        assert target.command("GET", "{some}key") == "kept"


def test_a_cluster_replaces_a_dead_master() -> None:
    with RedisCluster(replicas=1) as cluster:
        dead = cluster.owner_of("key")
        dead.kill()
        until(lambda: cluster.owner_of("key") is not dead and cluster.is_whole(), "a replica has taken over")


def test_rabbitmq_restarts_on_its_port_and_its_data(tmp_path: Path) -> None:
    with RabbitMQServer(tls=Certificates.make(tmp_path), consumer_timeout=5000) as server:
        assert server.eval("application:get_env(rabbit, consumer_timeout)") == "{ok,5000}"
        vhost = server.add_vhost("kept")
        publish(server.url(vhost))
        server.sync()
        server.settings["consumer_timeout"] = 6000
        server.restart()
        assert server.eval("application:get_env(rabbit, consumer_timeout)") == "{ok,6000}"
        assert take(server.url(vhost)) == b"body"
        secure = pika.URLParameters(server.tls_url(vhost))
        secure.ssl_options.context.load_verify_locations(str(tmp_path / "authority.pem"))
        pika.BlockingConnection(secure).close()
        epmd = server.epmd
    assert not server.running
    assert not epmd.running


def test_shared_rabbitmq_gives_each_test_a_virtual_host(rabbitmq: SharedRabbitMQ, rabbitmq_url: str) -> None:
    other = rabbitmq.add_vhost()
    publish(rabbitmq_url)
    assert take(rabbitmq_url) == b"body"
    with pytest.raises(pika.exceptions.ChannelClosedByBroker):
        take(rabbitmq.url(other))
    rabbitmq.delete_vhost(other)
    with pytest.raises(pika.exceptions.ProbableAccessDeniedError):
        publish(rabbitmq.url(other))


def test_shared_redis_keeps_tests_apart_by_prefix(redis_server: SharedRedis, redis_prefix: str) -> None:
    with redis.Redis.from_url(redis_server.url(), decode_responses=True) as client:
        client.set(f"{redis_prefix}:key", "mine")
        assert [*client.scan_iter(f"{redis_prefix}*")] == [f"{redis_prefix}:key"]
        client.delete(f"{redis_prefix}:key")


def test_free_ports_are_below_the_ephemeral_ones() -> None:
    """A client that polls a free ephemeral port may be given that very port, and then talks to itself."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < lowest for port in free_ports(20))


@pytest.mark.skipif("DRAY_TEST_CLUSTERS" not in os.environ, reason="three RabbitMQ nodes: make test-clusters")
def test_a_rabbitmq_cluster_elects_another_leader() -> None:
    with RabbitMQCluster() as cluster:
        vhost = cluster.add_vhost()
        publish(cluster.nodes[0].url(vhost))
        dead = cluster.await_leader("queue", vhost)
        dead.kill()
        assert take(cluster.await_leader("queue", vhost).url(vhost)) == b"body"
        cluster.start()
        assert cluster.is_whole()


def publish(url: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare("queue", durable=True, arguments={"x-queue-type": "quorum"})
    channel.basic_publish("", "queue", b"body")
    connection.close()


def take(url: str) -> bytes | None:
    """The next message; a quorum queue that has just been recovered has it a little later."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            method, _, body = channel.basic_get("queue", auto_ack=True)
            if method:
                return bytes(body)
            connection.sleep(0.05)
        return None
    finally:
        if connection.is_open:
            connection.close()
