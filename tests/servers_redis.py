"""A private Redis (or Valkey) server."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.servers_process import HOST, Programs, ServerProcess, connection, free_ports
from tests.servers_server import Server

if TYPE_CHECKING:
    import redis

    from tests.servers_tls import Certificates

PROGRAMS = Programs(Path(os.environ.get("DRAY_TEST_REDIS_ROOT", "/")))


class RedisServer(Server):
    """A Redis of one's own, on a free loopback port, its data in a temporary folder.

    Options are those of redis.conf with underscores: ``RedisServer(appendonly=True, save=(60, 1))``.
    ``tls`` makes the port speak TLS only; ``unixsocket`` adds a socket (``unix_url``).
    """

    def __init__(
        self, *, tls: Certificates | None = None, unixsocket: bool = False, owner: int = 0, **options: Any
    ) -> None:
        redis_program()  # skipped where there is none, before anything is made
        self.folder = PROGRAMS.folder("redis")
        (self.port,) = free_ports(1)
        self.tls = tls
        self.password = str(options.get("requirepass", ""))
        self.socket_path = self.folder / "redis.sock"
        settings: dict[str, Any] = {"bind": HOST, "save": "", "dir": PROGRAMS.inside(self.folder), "port": self.port}
        if tls:
            settings |= self._tls_settings(tls)
        if unixsocket:
            settings["unixsocket"] = PROGRAMS.inside(self.socket_path)
        settings |= {name.replace("_", "-"): value for name, value in options.items()}
        config = self.folder / "redis.conf"
        config.write_text("".join(config_line(name, value) for name, value in settings.items()))
        self._process = redis_process(config, owner=owner)

    def _tls_settings(self, tls: Certificates) -> dict[str, Any]:
        copied = tls.copy_to(self.folder)
        return {
            "port": 0,
            "tls-port": self.port,
            "tls-cert-file": PROGRAMS.inside(copied.certificate),
            "tls-key-file": PROGRAMS.inside(copied.key),
            "tls-ca-cert-file": PROGRAMS.inside(copied.authority),
            "tls-auth-clients": "no",
        }

    def url(self, database: int = 0) -> str:
        scheme = "rediss" if self.tls else "redis"
        credentials = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"{scheme}://{credentials}{HOST}:{self.port}/{database}"

    def unix_url(self, database: int = 0) -> str:
        credentials = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"unix://{credentials}{self.socket_path}?db={database}"

    def client(self) -> redis.Redis:
        """To look at it, and to do what no transport does; the caller closes it."""
        import redis

        secure = {"ssl_ca_certs": str(self.tls.authority)} if self.tls else {}
        return redis.Redis.from_url(self.url(), decode_responses=True, socket_timeout=10, **secure)

    def command(self, *arguments: str | int) -> Any:
        with self.client() as client:
            return client.execute_command(*arguments)

    def _answers(self) -> bool:
        return answers(self.port, secure=self.tls is not None)


def redis_program() -> str:
    wanted = os.environ.get("DRAY_TEST_REDIS_PROGRAM")
    return PROGRAMS.find(*([wanted] if wanted else ["redis-server", "valkey-server"]))


def redis_process(config: Path, *arguments: str, owner: int = 0) -> ServerProcess:
    command = PROGRAMS.command(redis_program(), PROGRAMS.inside(config), *arguments)
    return ServerProcess(command, config.parent, owner=owner)


def answers(port: int, *, secure: bool = False) -> bool:
    """Whether a Redis here is ready for commands: those that it refuses for want of a password included."""
    try:
        with connection(port, 1) as plain, unverified(plain) if secure else plain as opened:
            opened.sendall(b"PING\r\n")
            return opened.recv(64).startswith((b"+PONG", b"-NOAUTH", b"-MASTERDOWN"))
    except OSError:
        return False


def unverified(opened: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(opened)


def config_line(name: str, value: Any) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join([name, *(f'"{part}"' for part in parts)]) + "\n"
