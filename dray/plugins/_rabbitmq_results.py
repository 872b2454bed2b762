"""What the result back ends on RabbitMQ are told about the broker, and what results look like on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dray.core.contracts import PluginContext, Seconds
from dray.core.errors import TooLarge
from dray.core.message import State, StoredResult
from dray.plugins._rabbitmq_address import Tls, addresses
from dray.plugins._rabbitmq_link import Dialer, LinkOptions
from dray.plugins._rabbitmq_publisher import Parcel

MAX_BODY_BYTES = 15 * 2**20
"""RabbitMQ 4 takes messages of 16 MiB."""
_STATES = {state.value: state for state in State}


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """How to reach the broker; the same as the transport's."""

    url: str | tuple[str, ...] = "amqp://guest:guest@localhost:5672/"
    """``amqp://user:password@host:5672/vhost``, ``amqps://...`` with TLS; several: the next one when one is away."""
    prefix: str = "dray"
    """What the names of queues and exchanges begin with."""
    heartbeat: Seconds = 20.0
    """How often either side shows that it lives; twice that without a sign, and the connection is given up."""
    connect_timeout: Seconds = 10.0
    """How long one attempt to connect may take."""
    timeout: Seconds = 30.0
    """How long to wait for the broker's confirmation or answer."""
    ca: Path | None = None
    """For ``amqps``: the certificates to trust; default: the system's."""
    cert: Path | None = None
    """For ``amqps``: the certificate to show to the broker."""
    key: Path | None = None
    """For ``amqps``: its private key, unless it is in the same file."""
    verify: bool = True
    """False: any certificate is taken, and whoever is in between can read and change everything."""

    def dialer(self, context: PluginContext, purpose: str) -> Dialer:
        """What connects with these options."""
        ca, cert, key = (context.base / path if path else None for path in (self.ca, self.cert, self.key))
        options = LinkOptions(round(self.heartbeat), self.connect_timeout, self.timeout)
        return Dialer(addresses(self.url), Tls(ca, cert, key, self.verify), options, context, purpose)


def check_size(result: StoredResult, name: str) -> None:
    """Raises ``TooLarge``."""
    if len(result.body) > MAX_BODY_BYTES:
        raise TooLarge(
            f"the result of {result.id} is {len(result.body):,} bytes; {name} takes {MAX_BODY_BYTES:,}: "
            "store the data elsewhere and return a reference to it"
        )


def parcel(exchange: str, routing_key: str, result: StoredResult, sender: str = "") -> Parcel:
    """A result as a message."""
    headers = {"state": result.state.value, "sender": sender}
    if result.expires_at is not None:
        headers["expires"] = repr(result.expires_at)  # as text: pika has no floats
    return Parcel(exchange, routing_key, result.body, result.id, headers=headers)


def result_of(properties: Any, body: bytes) -> StoredResult | None:
    """The inverse; None for what is no result."""
    headers: Mapping[str, Any] = properties.headers or {}
    state, expires = _STATES.get(str(headers.get("state"))), headers.get("expires")
    try:
        expires_at = None if expires is None else float(expires)
    except (TypeError, ValueError):
        return None
    if state is None or not properties.message_id:
        return None
    return StoredResult(properties.message_id, state, body, expires_at)
