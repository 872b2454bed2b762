"""Where a RabbitMQ broker is and how to get in: URLs and options become what pika connects with."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pika

from dray.core.errors import ConfigError

DEFAULT_URL = "amqp://guest:guest@localhost:5672/"
_PORTS = {"amqp": 5672, "amqps": 5671}


@dataclass(frozen=True, slots=True)
class Tls:
    """How ``amqps`` connections are made; the broker's certificate is verified unless ``verify`` is False."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Raises ``ConfigError`` for files that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(f"{name}={path}" for name, path in (("ca", self.ca), ("cert", self.cert)) if path)
            raise ConfigError(f"rabbitmq: the TLS files cannot be used ({files}): {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Address:
    """One broker and one virtual host."""

    host: str
    port: int
    vhost: str
    username: str
    password: str = field(repr=False)
    secure: bool = False

    def __str__(self) -> str:
        """For people: without the password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'amqps' if self.secure else 'amqp'}://{self.username}@{host}:{self.port}, vhost {self.vhost!r}"

    def parameters(self, tls: Tls, heartbeat_s: int, connect_timeout_s: float, label: str) -> Any:
        """What pika takes. One attempt: trying again, and elsewhere, is the link's business."""
        return pika.ConnectionParameters(
            host=self.host,
            port=self.port,
            virtual_host=self.vhost,
            credentials=pika.PlainCredentials(self.username, self.password),
            heartbeat=heartbeat_s,
            connection_attempts=1,
            socket_timeout=connect_timeout_s,
            stack_timeout=connect_timeout_s,
            ssl_options=pika.SSLOptions(tls.context(), self.host) if self.secure else None,
            client_properties={"connection_name": label, "product": "dray"},
        )


def addresses(url: str | Sequence[str] | None) -> tuple[Address, ...]:
    """The brokers that an option ``url`` names; raises ``ConfigError``."""
    urls = [DEFAULT_URL] if url is None else [url] if isinstance(url, str) else list(url)
    if not urls:
        raise ConfigError("rabbitmq: url is an empty list; give at least one")
    return tuple(_address(one) for one in urls)


def _address(url: str) -> Address:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"rabbitmq: url: {error}; write amqp://user:password@host:5672/vhost") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError("rabbitmq: url must look like amqp://user:password@host:5672/vhost, or amqps://...")
    if parts.query or parts.fragment:
        raise ConfigError(
            f"rabbitmq: url: {parts.hostname}: what follows the virtual host ('?...') is not understood; heartbeat, "
            "ca, cert, key and verify are options of their own beside url, and a '#' in a password is written %23"
        )
    vhost = unquote(parts.path[1:]) if parts.path not in ("", "/", "//") else "/"
    return Address(
        parts.hostname,
        port or _PORTS[parts.scheme],
        vhost,
        unquote(parts.username or "guest"),
        unquote(parts.password or "guest"),
        parts.scheme == "amqps",
    )
