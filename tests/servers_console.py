"""Administers a RabbitMQ that runs servers_console.erl."""

from __future__ import annotations

import struct
import uuid

from tests.servers_process import connection

LENGTH = struct.Struct(">I")


class Console:
    """Erlang expressions that the server evaluates, and what tests do with them."""

    def __init__(self, port: int) -> None:
        self.port = port

    def eval(self, expressions: str, timeout_s: float = 30) -> str:
        """The value of the last expression, as Erlang writes it."""
        text = f"{expressions.rstrip().rstrip('.')}.".encode()
        with connection(self.port, timeout_s) as console, console.makefile("rb") as answers:
            console.sendall(LENGTH.pack(len(text)) + text)
            head = answers.read(LENGTH.size)
            if len(head) < LENGTH.size:
                raise ConnectionError(f"the server ended while it ran {expressions}")
            answer = answers.read(*LENGTH.unpack(head)).decode()
        if not answer.startswith("+"):
            raise RuntimeError(f"{expressions}: {answer[1:]}")
        return answer[1:]

    def add_vhost(self, name: str = "") -> str:
        """A virtual host in which the user guest may do anything; it gets a name of its own where none is given."""
        name = name or unique_vhost()
        self.eval(
            f'rabbit_vhost:add(<<"{name}">>, <<"test">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"test">>)'
        )
        return name

    def delete_vhost(self, name: str) -> None:
        self.eval(f'rabbit_vhost:delete(<<"{name}">>, <<"test">>)')

    def version(self) -> tuple[int, ...]:
        text = self.eval("unicode:characters_to_binary(rabbit_misc:version())")
        return tuple(int(part) for part in text.strip('<>"').split(".")[:3])


def unique_vhost() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"
