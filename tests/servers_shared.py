"""The Redis and the RabbitMQ that all processes of a test run share."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from tests.servers_console import Console, unique_vhost
from tests.servers_process import HOST
from tests.servers_rabbitmq import RabbitMQServer
from tests.servers_redis import RedisServer

OWNER = "DRAY_TEST_OWNER"
FOLDER = "DRAY_TEST_SHARED"
RABBITMQ_URL = "DRAY_TEST_RABBITMQ_URL"
REDIS_URL = "DRAY_TEST_REDIS_URL"


class SharedRedis:
    """Not to be killed or configured, nor emptied: each test keeps to its own key prefix."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: int | None = None) -> str:
        return self._url if database is None else f"{self._url.rpartition('/')[0]}/{database}"


class SharedRabbitMQ:
    """Not to be killed or configured: each test has its own virtual host."""

    def __init__(self, url: str, console_port: int = 0) -> None:
        self._url = url.rstrip("/")
        self._console = Console(console_port) if console_port else None

    def url(self, vhost: str = "/") -> str:
        return f"{urlsplit(self._url)._replace(path='').geturl()}/{quote(vhost, safe='')}"

    def eval(self, expressions: str) -> str:
        assert self._console, f"the RabbitMQ of {RABBITMQ_URL} runs no expressions: start a private RabbitMQServer"
        return self._console.eval(expressions)

    def version(self) -> tuple[int, ...]:
        assert self._console, f"the RabbitMQ of {RABBITMQ_URL} runs no expressions: start a private RabbitMQServer"
        return self._console.version()

    def add_vhost(self, name: str = "") -> str:
        """A virtual host that the user of the URL may do anything in; it gets a name of its own where none is given."""
        if self._console:
            return self._console.add_vhost(name)
        name = name or unique_vhost()
        user = urlsplit(self._url).username or "guest"
        self._manage("PUT", f"vhosts/{name}", {})
        self._manage("PUT", f"permissions/{name}/{user}", dict.fromkeys(("configure", "write", "read"), ".*"))
        return name

    def delete_vhost(self, name: str) -> None:
        if self._console:
            self._console.delete_vhost(name)
        else:
            self._manage("DELETE", f"vhosts/{name}", None)

    def _manage(self, method: str, path: str, body: Any) -> None:
        """A server that is not ours is administered by its management plugin, with the URL's user."""
        parts = urlsplit(self._url)
        port = os.environ.get("DRAY_TEST_RABBITMQ_MANAGEMENT_PORT", "15672")
        where = f"http://{parts.hostname}:{port}/api/"
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, where, parts.username or "guest", parts.password or "guest")
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            opener.open(request, timeout=10).close()
        except OSError as error:
            raise RuntimeError(
                f"{RABBITMQ_URL} needs a server with the management plugin at {where}: {error}"
            ) from error


@cache
def shared_redis() -> SharedRedis:
    def start() -> dict[str, Any]:
        server = RedisServer(owner=owner()).start()
        server.leave()
        return {"url": server.url()}

    return SharedRedis(os.environ.get(REDIS_URL) or once("redis", start)["url"])


@cache
def shared_rabbitmq() -> SharedRabbitMQ:
    def start() -> dict[str, Any]:
        server = RabbitMQServer(owner=owner()).start()
        server.leave()
        return {"url": f"amqp://guest:guest@{HOST}:{server.port}", "console_port": server.console.port}

    if url := os.environ.get(RABBITMQ_URL):
        return SharedRabbitMQ(url)
    return SharedRabbitMQ(**once("rabbitmq", start))


def own_the_run() -> None:
    """Called by pytest's first process: its workers, and the pytests that tests start, share its servers."""
    if OWNER not in os.environ:
        os.environ[OWNER] = str(os.getpid())
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="dray-shared-")


def disown_the_run() -> None:
    if os.environ.get(OWNER) == str(os.getpid()):
        with suppress(OSError):
            for file in Path(os.environ[FOLDER]).iterdir():
                file.unlink()
            Path(os.environ[FOLDER]).rmdir()


def owner() -> int:
    own_the_run()
    return int(os.environ[OWNER])


def once(name: str, start: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``start`` answered in whichever process of the run came first."""
    owner()
    path = Path(os.environ[FOLDER]) / f"{name}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(start()))
        found: dict[str, Any] = json.loads(path.read_text())
        return found
