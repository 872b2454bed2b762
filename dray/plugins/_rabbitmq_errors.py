"""What pika and RabbitMQ say when something goes wrong, in terms of what to do about it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

from pika import exceptions

from dray.core.errors import Unavailable
from dray.plugins._rabbitmq_address import Address

ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 403, 404, 405, 406


class Refused(Unavailable):
    """The broker closed a channel because of what was asked."""

    def __init__(self, address: Address, error: Any) -> None:
        super().__init__(f"rabbitmq: {address}: {error.reply_text} ({error.reply_code})")
        self.code: int = error.reply_code
        self.text: str = error.reply_text
        self.__cause__ = error


def link_lost(address: Address, error: Exception | None) -> Unavailable:
    """A link that was there is gone."""
    if isinstance(error, exceptions.ConnectionClosedByClient):
        text = "the connection was closed"
    elif isinstance(error, exceptions.ConnectionClosed):
        text = f"the broker closed the connection: {error.reply_text} ({error.reply_code})"
    else:
        text = f"the connection is lost: {_brief(error)}"
    failure = Unavailable(f"rabbitmq: {address}: {text}")
    failure.__cause__ = error
    return failure


def cannot_connect(address: Address, error: Exception) -> Unavailable:
    """No connection could be made: which setting to look at."""
    failure = Unavailable(f"rabbitmq: {address}: {_why_not(address, error)}")
    failure.__cause__ = error
    return failure


def _why_not(address: Address, error: Exception) -> str:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the broker's certificate is not trusted: {cause.verify_message}; set ca to the authority that signed "
                "it (verify: false trusts anybody)"
            )
        if isinstance(cause, ssl.SSLError):
            return f"no TLS there ({cause.reason}): is it the port for amqp://, not amqps://?"
        if isinstance(cause, (exceptions.ProbableAuthenticationError, exceptions.AuthenticationError)):
            return f"the broker refused user {address.username!r} (ACCESS_REFUSED): check user and password in url"
        if isinstance(cause, (exceptions.ProbableAccessDeniedError,)):
            return f"no access to the virtual host {address.vhost!r}: check the end of url: {_brief(cause)}"
        if isinstance(cause, exceptions.ConnectionClosedByBroker):
            return _refusal(address, cause)
        if isinstance(cause, exceptions.IncompatibleProtocolError):
            if address.secure:
                return "it does not speak AMQP 0-9-1: check host and port in url"
            return "it does not speak plain AMQP 0-9-1: check host and port in url, and whether it is the port for amqps://"
        if isinstance(cause, socket.gaierror):
            return f"the host {address.host!r} is not known: check url"
        if isinstance(cause, ConnectionRefusedError):
            return "nothing listens there: check host and port in url, and whether the broker runs"
        if "Timeout while setting up AMQP" in str(cause):  # pika wraps it in different ways
            return "something listens there and does not answer in AMQP: check host and port in url"
        if isinstance(cause, (TimeoutError, ConnectionResetError)):
            return f"no connection: {_brief(cause)}"
    return f"no connection: {_brief(error)}"


def _refusal(address: Address, error: Any) -> str:
    if error.reply_code == ACCESS_REFUSED:
        return f"the broker refused user {address.username!r}: check user and password in url: {error.reply_text}"
    if "vhost" in error.reply_text:
        return f"the virtual host {address.vhost!r} cannot be used: check the end of url: {error.reply_text}"
    return f"the broker refused: {error.reply_text} ({error.reply_code})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that pika wraps: it keeps causes in ``args``, ``exception`` and ``exceptions``."""
    queue, seen = [error], set()
    while queue:
        one = queue.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [*one.args, getattr(one, "exception", None), *getattr(one, "exceptions", ()), one.__cause__]
        queue += [each for each in inner if isinstance(each, BaseException)]


def _brief(error: BaseException | None) -> str:
    causes = [] if error is None else list(_causes(error))
    if not causes:
        return "unknown"
    root = causes[-1]
    return str(root) or type(root).__name__
