"""The result back end kit over Redis: one server, TLS, a cluster, Sentinels."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import Durability, ResultBackend
from dray.plugins._redis import Redis
from dray.plugins._redis_results import decode
from dray.plugins.backends.redis import RedisBackend
from dray.testing import ResultBackendConformance, plugin_context
from tests.servers import HOST, Certificates, RedisCluster, RedisSentinelTrio, RedisServer


class RedisResultsKit(ResultBackendConformance):
    """Each class has a server of its own, each test a prefix."""

    durability: ClassVar[Durability]
    server: ClassVar[Any]

    @classmethod
    def serve(cls, folder: Path) -> Any:
        raise NotImplementedError

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def own_server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with cls.serve(tmp_path_factory.mktemp("redis")) as cls.server:
            yield

    def settings(self) -> dict[str, Any]:
        return {"url": self.server.url(), "prefix": self.prefix}

    def make(self, clock: Clock) -> ResultBackend:
        return RedisBackend(RedisBackend.Options(**self.settings()), plugin_context("redis", clock))

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.server.port

    def through(self, port: int) -> ResultBackend:
        url = self.server.url().replace(str(self.server.port), str(port))
        fast = {"url": url, "timeout": 0.5, "connect_timeout": 1.0, "heartbeat": 0.5}
        return RedisBackend(RedisBackend.Options(**self.settings() | fast), plugin_context("redis", SystemClock()))

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)
        self.prefix = f"kit-{uuid.uuid4().hex[:8]}"

    def advance(self, seconds: float) -> None:
        """Redis lets things expire by its own clock: do what it would do."""
        super().advance(seconds)
        redis: Redis = self.sample().redis  # type: ignore[attr-defined]
        for key in [key for server in self.masters() for key in server.command("KEYS", f"{self.prefix}:r:*")]:
            result = decode(key, redis.call("GET", key))
            if result and result.expires_at is not None and result.expires_at <= self.clock.time():
                redis.call("DEL", key)

    def masters(self) -> list[RedisServer]:
        return [self.server]

    def test_the_durability_is_what_the_server_was_set_up_for(self) -> None:
        assert self.open().features.durability == self.durability


class TestRedisBackend(RedisResultsKit):
    """Nothing that was confirmed is lost with the server."""

    durability = Durability.D3

    @classmethod
    def serve(cls, folder: Path) -> RedisServer:
        return RedisServer(appendonly=True, appendfsync="always")

    def end(self) -> None:
        super().end()
        if not self.server.running:  # the test has broken it
            self.server.start()

    def restart(self) -> None:
        self.server.restart()

    def break_store(self) -> None:
        self.server.kill()


class TestRedisBackendOverTls(RedisResultsKit):
    """As above; the file is left to the system, which survives the end of Redis."""

    durability = Durability.D2
    certificates: ClassVar[Certificates]

    @classmethod
    def serve(cls, folder: Path) -> RedisServer:
        cls.certificates = Certificates.make(folder)
        return RedisServer(appendonly=True, appendfsync="no", requirepass="p@ss/word", tls=cls.certificates)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "tls_ca": str(self.certificates.authority)}

    def restart(self) -> None:
        self.server.restart()


class TestRedisBackendOnACluster(RedisResultsKit):
    """Three masters; what the proxy passes on says where the others are, so there is none."""

    durability = Durability.D1
    through = ResultBackendConformance.through

    @classmethod
    def serve(cls, folder: Path) -> RedisCluster:
        return RedisCluster(3)

    def masters(self) -> list[RedisServer]:
        return list(self.server.servers)


class TestRedisBackendBehindSentinels(RedisResultsKit):
    """A master that Sentinels name; they would lead past a proxy."""

    durability = Durability.D1
    through = ResultBackendConformance.through

    @classmethod
    def serve(cls, folder: Path) -> RedisSentinelTrio:
        return RedisSentinelTrio()

    def masters(self) -> list[RedisServer]:
        return [self.server.master]
