"""The kits over Redis: one server, a Unix socket, a cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import Durability, Transport
from dray.plugins._redis import Redis, RedisOptions
from dray.plugins.transports.redis import RedisTransport
from dray.testing import FakeClock, TransportConformance, plugin_context
from tests.redis_clock import age, end_leases, move_to
from tests.servers import RedisCluster, RedisServer


class RedisKit(TransportConformance):
    """Each class has a server of its own, each test a prefix."""

    server: ClassVar[Any]
    settings: ClassVar[dict[str, Any]] = {}
    durability: ClassVar[Durability]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def own_server(cls) -> Iterator[None]:
        with RedisServer(**cls.settings) as cls.server:
            yield

    def url(self) -> str:
        return str(self.server.url())

    def make(self, clock: Clock) -> Transport:
        options = RedisTransport.Options(url=self.url(), prefix=self.prefix)
        transport = RedisTransport(options, plugin_context("redis", clock))
        return move_to(transport, clock) if isinstance(clock, FakeClock) else transport

    def through(self, port: int) -> Transport:
        options = RedisTransport.Options(
            url=f"redis://127.0.0.1:{port}", prefix=self.prefix, timeout=0.5, connect_timeout=0.5, heartbeat=0.5
        )
        return RedisTransport(options, plugin_context("redis", SystemClock()))

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)
        self.prefix = f"kit-{uuid.uuid4().hex[:8]}"
        self.nodes = [Redis(RedisOptions(url=server.url()), plugin_context("redis")) for server in self.servers()]

    def end(self) -> None:
        super().end()
        for redis in self.nodes:
            redis.close()
        if not all(server.running for server in self.servers()):  # the test has broken it
            self.server.start()

    def servers(self) -> list[RedisServer]:
        return [self.server]

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for redis in self.nodes:
            age(redis, self.prefix, seconds)
            if self._proxies:  # who speaks through them has the machine's clock
                end_leases(redis, self.prefix, seconds)

    def break_store(self) -> None:
        for server in self.servers():
            server.kill()

    def test_the_durability_is_what_the_server_was_set_up_for(self) -> None:
        assert self.open().features.durability == self.durability


class TestRedis(RedisKit):
    """Nothing that was confirmed is lost with the server."""

    settings: ClassVar[dict[str, Any]] = {"appendonly": True, "appendfsync": "always"}
    durability = Durability.D3

    machine_examples = 12  # each command waits for the disk

    def restart(self) -> None:
        self.server.restart()


class TestRedisOverAUnixSocket(RedisKit):
    """As most servers are set up: restarts in good order lose nothing."""

    settings: ClassVar[dict[str, Any]] = {"appendonly": True, "unixsocket": True}
    durability = Durability.D1

    def url(self) -> str:
        return str(self.server.unix_url())

    def restart(self) -> None:
        self.server.stop()
        self.server.start()


class TestRedisCluster(RedisKit):
    """Three masters without persistence. No proxy can stand before a cluster: its nodes tell their own addresses."""

    durability = Durability.D1
    machine_examples = 20
    through = TransportConformance.through

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def own_server(cls) -> Iterator[None]:
        with RedisCluster() as cls.server:
            yield

    def servers(self) -> list[RedisServer]:
        return list(self.server.servers)
