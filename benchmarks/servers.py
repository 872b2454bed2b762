"""Private brokers on free loopback ports: RabbitMQ with its default schedulers, Redis without persistence."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

START_S = 60.0
RABBITMQ = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")
HELLO = {"redis": b"INFO server\r\n", "rabbitmq": b"AMQP\x00\x00\x09\x01"}
"""What each answers with something that holds its version."""
PEER_QUEUES = ("peer", "peer.DQ", "peer.XQ", "peer.dead_letter", "peer.delay")


class ServerError(Exception):
    """A broker is not installed, or does not start."""


class Server:
    """A running broker: its URL and its processes. ``clean`` empties what the peers leave in it."""

    def __init__(self, name: str, url: str, process: subprocess.Popen[bytes], port: int) -> None:
        self.name = name
        self.url = url
        self._process = process
        self._port = port
        self._hello = HELLO[name]

    @property
    def pid(self) -> int:
        """The process that does the work: Erlang's, below RabbitMQ's start scripts."""
        members = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        return next((member.pid for member in members if member.name() == "beam.smp"), self._process.pid)

    def version(self) -> str | None:
        """As it tells in its greeting."""
        greeting = _greeting(self._port, self._hello).decode("latin-1")
        found = re.search(r"(?:redis_version:|versionS...[^\d])(\d+\.[\d.]+)", greeting, re.DOTALL)
        return found[1] if found else None

    def clean(self) -> None:
        (_clean_rabbitmq if self.name == "rabbitmq" else _clean_redis)(self.url)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def redis() -> Iterator[Server]:
    program = shutil.which("redis-server")
    if program is None:
        raise ServerError("redis-server is not installed: apt-get install redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _folder() as folder, _process([program, *options, "--dir", str(folder)], folder, {}) as process:
        _await(port, HELLO["redis"], process, folder)
        yield Server("redis", f"redis://127.0.0.1:{port}/0", process, port)


@contextlib.contextmanager
def rabbitmq() -> Iterator[Server]:
    program = next((found for name in RABBITMQ if (found := shutil.which(name))), None)
    if program is None:
        raise ServerError("RabbitMQ is not installed: apt-get install rabbitmq-server")
    port, epmd = free_port(), free_port()
    with _folder() as folder:
        (folder / "plugins").write_text("[].")
        env = {
            "HOME": str(folder),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_NODENAME": f"bench{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        try:
            with _process([program], folder, env) as process:
                _await(port, HELLO["rabbitmq"], process, folder)
                yield Server("rabbitmq", f"amqp://guest:guest@127.0.0.1:{port}/%2F", process, port)
        finally:  # Erlang's port mapper outlives the node that started it
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["epmd", "-port", str(epmd), "-kill"], capture_output=True, check=False)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-server-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def _process(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server, and all that it starts, in a process group of its own that ends with the context."""
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break


def _await(port: int, hello: bytes, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the server takes connections and answers on them."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if _greeting(port, hello):
                return
        time.sleep(0.05)
    raise ServerError(f"the server did not start:\n{(folder / 'server.log').read_text(errors='replace')[-1500:]}")


def _greeting(port: int, hello: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=2) as link:
        link.sendall(hello)
        return link.recv(4096)


def _clean_redis(url: str) -> None:
    from redis import Redis

    with Redis.from_url(url) as client:
        client.flushall()


def _clean_rabbitmq(url: str) -> None:
    from pika import BlockingConnection, URLParameters

    connection = BlockingConnection(URLParameters(url))
    channel = connection.channel()
    for queue in PEER_QUEUES:
        channel.queue_delete(queue)
    connection.close()
