"""One connection to a Redis server: dialled, tried, used by one thread at a time, thrown away when in doubt."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hiredis

from dray.core.errors import ConfigError, Unavailable
from dray.plugins._redis_link_errors import code_of, refused
from dray.plugins._redis_link_url import Address, RedisOptions, Target

Argument = bytes | str | int
Command = Sequence[Argument]
"""A command and its arguments, as in ``("SET", key, value, "PX", 1000)``."""

AS_SENTINEL = " (a Sentinel: what it asks for is `sentinel_username` and `sentinel_password`)"
_READ_BYTES = 65536
_NOTHING = object()
_BROKEN = (OSError, hiredis.HiredisError, MemoryError)
"""What ends a connection. Garbage may announce an answer that no memory could hold."""


class LinkLost(Exception):
    """The connection broke or fell silent. What was sent on it may have been carried out."""


class Link:
    """A connection. One thread at a time.

    - sends commands in one write and reads their answers; error replies come back as values
    - says whether the peer has hung up; after any failure it is closed and of no further use
    """

    __slots__ = ("_buffer", "_poll", "_reader", "address", "sock", "timeout_s", "used_at")

    def __init__(self, sock: socket.socket, address: Address, timeout_s: float) -> None:
        self.sock = sock
        self.address = address
        self.used_at = time.monotonic()
        self.timeout_s = timeout_s
        self._reader: Any = hiredis.Reader(notEnoughData=_NOTHING)
        self._buffer = bytearray(_READ_BYTES)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        sock.settimeout(timeout_s)

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The answer to each command, in one round trip. Raises ``LinkLost``."""
        self.send(pack(commands))
        return [self.receive() for _ in commands]

    def send(self, data: bytes) -> None:
        """Write packed commands. Raises ``LinkLost``."""
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next answer; ``timeout_s`` is for commands that block in the server. Raises ``LinkLost``."""
        reader, buffer = self._reader, self._buffer
        if timeout_s is not None:
            self.sock.settimeout(timeout_s)
        try:
            while (answer := reader.gets()) is _NOTHING:
                count = self.sock.recv_into(buffer)
                if not count:
                    raise ConnectionResetError("it closed the connection")
                reader.feed(buffer, 0, count)
        except _BROKEN as error:
            raise self._lost(error) from error
        finally:
            if timeout_s is not None and self.is_open:
                self.sock.settimeout(self.timeout_s)
        return answer

    def available(self) -> list[Any]:
        """The answers that can be had without waiting. Raises ``LinkLost``."""
        answers: list[Any] = []
        try:
            self.sock.settimeout(0.0)
            while True:
                count = self.sock.recv_into(self._buffer)
                if not count:
                    raise ConnectionResetError("it closed the connection")
                self._reader.feed(self._buffer, 0, count)
                if count < _READ_BYTES and not isinstance(self.sock, ssl.SSLSocket):
                    break
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            raise self._lost(error) from error
        try:
            while (answer := self._reader.gets()) is not _NOTHING:
                answers.append(answer)
            self.sock.settimeout(self.timeout_s)
        except _BROKEN as error:
            raise self._lost(error) from error
        return answers

    @property
    def is_open(self) -> bool:
        """Whether it was not closed, by a failure for instance."""
        return self.sock.fileno() >= 0

    def is_alive(self, heartbeat_s: float) -> bool:
        """Whether it can be used again: nothing to read means open; one that idled long is asked."""
        if not self._poll.poll(0) and time.monotonic() - self.used_at < heartbeat_s:
            return True
        try:  # TLS may have had something to say; a server that hung up fails at once
            return self.exchange([("PING",)]) == [b"PONG"]
        except LinkLost:
            return False

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError):
            self.sock.close()

    def _lost(self, error: Exception) -> LinkLost:
        self.close()
        if isinstance(error, TimeoutError):
            return LinkLost(f"redis at {self.address}: no answer within {self.timeout_s:g} s")
        if isinstance(error, hiredis.HiredisError | MemoryError):
            return LinkLost(f"redis at {self.address}: what it answers is not Redis' protocol")
        return LinkLost(f"redis at {self.address}: the connection was lost: {error}")


class Dialler:
    """Makes connections by the options: TLS, log-in, database, and whether the server takes writes."""

    def __init__(self, options: RedisOptions, target: Target, base: Path) -> None:
        self._options = options
        self._base = base
        self._login = _login(target.username, target.password)
        self._sentinel_login = _login(options.sentinel_username or "", options.sentinel_password or "")
        self._database = target.database
        self._tls = _tls_context(options, base) if any(address.tls for address in target.addresses) else None

    def dial(self, address: Address, *, sentinel: bool = False, replica: bool = False) -> Link:
        """A logged-in connection; unless ``sentinel`` or ``replica``, to a writable master. Raises ``Unavailable``."""
        link = Link(self._connect(address), address, self._options.connect_timeout)
        commands: list[Command] = list(self._sentinel_login if sentinel else self._login)
        if not sentinel:
            if self._database:
                commands.append(("SELECT", self._database))
            commands.append(("CLIENT", "SETNAME", "dray"))
            commands.append(("ROLE",))
        try:
            if commands:
                link.send(pack(commands))
            for command in commands:  # one by one: a server that refuses us says so once, and hangs up
                with understood(address):
                    where = f"{address}{AS_SENTINEL}" if sentinel else str(address)
                    _check_login(where, command, link.receive(), master=not replica)
        except LinkLost as error:
            link.close()
            raise Unavailable(f"{error}; {self._hint(address)}") from error
        except BaseException:
            link.close()
            raise
        link.timeout_s = self._options.timeout
        link.sock.settimeout(link.timeout_s)
        return link

    def _connect(self, address: Address) -> socket.socket:
        timeout_s = self._options.connect_timeout
        try:
            if address.path:
                return _connect_unix(str(self._base / address.path), timeout_s)
            sock = socket.create_connection((address.host, address.port), timeout_s)
        except OSError as error:
            setting = "the path" if address.path else "host and port"
            raise Unavailable(
                f"redis at {address}: cannot connect: {error}; check that the server runs, and {setting} in `url`"
            ) from error
        _keep_alive(sock, self._options.heartbeat)
        return self._wrap(sock, address, self._tls) if address.tls and self._tls else sock

    def _wrap(self, sock: socket.socket, address: Address, tls: ssl.SSLContext) -> ssl.SSLSocket:
        try:
            return tls.wrap_socket(sock, server_hostname=address.host)
        except ssl.SSLCertVerificationError as error:
            sock.close()
            raise Unavailable(
                f"redis at {address}: its certificate is not trusted ({error.verify_message}): set `tls_ca` to the "
                "file of the authority that signed it, and check the host name in `url`"
            ) from error
        except OSError as error:
            sock.close()
            raise Unavailable(
                f"redis at {address}: no TLS there ({error}): if the server speaks plain TCP, write `url` with "
                "redis:// (or `tls: false`); if it asks for a certificate, set `tls_cert` and `tls_key`"
            ) from error

    def _hint(self, address: Address) -> str:
        if address.tls:
            return "it speaks TLS: does it ask for a certificate (`tls_cert`, `tls_key`)?"
        return "is it Redis? If it speaks TLS, write `url` with rediss:// (or `tls: true`)"


def pack(commands: Sequence[Command]) -> bytes:
    """Commands as they go over the wire."""
    pack_one: Any = hiredis.pack_command
    return b"".join([pack_one(tuple(command)) for command in commands])


def _login(username: str, password: str) -> tuple[Command, ...]:
    if not username and not password:
        return ()
    return (("AUTH", username, password) if username else ("AUTH", password),)


@contextlib.contextmanager
def understood(where: object) -> Iterator[None]:
    """Round what takes answers apart: one of an impossible shape means that the connection is not to be trusted."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, struct.error) as error:
        raise LinkLost(f"redis at {where}: what it answers makes no sense: {error}") from error


def _tls_context(options: RedisOptions, base: Path) -> ssl.SSLContext:
    """Raises ``ConfigError`` for files that cannot be read."""

    def file(path: str | None) -> str | None:
        return str(base / path) if path else None

    try:
        context = ssl.create_default_context(cafile=file(options.tls_ca))
        context.check_hostname = options.tls_verify == "full"
        if options.tls_verify == "none":
            context.verify_mode = ssl.CERT_NONE
        if options.tls_cert:
            context.load_cert_chain(str(file(options.tls_cert)), file(options.tls_key))
    except OSError as error:
        raise ConfigError(f"tls_ca, tls_cert or tls_key cannot be read: {error}") from error
    return context


def _connect_unix(path: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _check_login(where: str, command: Command, answer: Any, *, master: bool) -> None:
    """Raises ``Unavailable`` if a command of the log-in was refused, or the server is no master and should be."""
    if isinstance(answer, hiredis.ReplyError):
        if command[0] not in ("CLIENT", "ROLE") or code_of(answer) != "NOPERM":
            raise refused(answer, where)
    elif command[0] == "ROLE" and master and answer[0] != b"master":
        raise refused(hiredis.ReplyError("READONLY"), where)


def _keep_alive(sock: socket.socket, heartbeat_s: float) -> None:
    """Let the kernel notice a peer that is gone, within two heartbeats."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, round(heartbeat_s / 2))
    for name, value in (
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", seconds),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", max(1000, round(heartbeat_s * 2000))),
    ):
        option = getattr(socket, name, None)  # not every system has all of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
