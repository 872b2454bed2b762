"""What a script's failure means for the messages it was about."""

from __future__ import annotations

from collections.abc import Iterable

import hiredis

from dray.core.errors import TransportError, Uncertain
from dray.plugins._redis import Command, Redis

_TYPES = {
    **{str(level): b"list" for level in range(10)},
    "levels": b"zset",
    "delayed": b"zset",
    "leases": b"zset",
    "numbers": b"string",
    "bell": b"list",
    "watch": b"string",
    "dead": b"hash",
    "died": b"zset",
    "deadids": b"zset",
}
"""Each key of a queue, as in ``_redis_lua/common.lua``."""


def explained(redis: Redis, error: TransportError, bases: Iterable[str]) -> TransportError:
    """The error of a script: it is uncertain if the script had begun, and names the key that stood in its way."""
    text = str(error.__cause__)
    if not isinstance(error.__cause__, hiredis.ReplyError) or " script: " not in text:
        return error
    if text.startswith("WRONGTYPE"):
        keys = ", ".join(_foreign(redis, bases))
        error = type(error)(f"{error}; in the way: {keys}. Delete what is not dray's (DEL), or set another `prefix`")
    uncertain = Uncertain(str(error))
    uncertain.__cause__ = error
    return uncertain


def _foreign(redis: Redis, bases: Iterable[str]) -> list[str]:
    """Keys of these queues that are of another type than ours."""
    keys = [(f"{base}:{name}", kind) for base in bases for name, kind in _TYPES.items()]
    commands: list[Command] = [("TYPE", key) for key, _ in keys]
    answers = redis.attempt(commands, again=True)
    return [
        f"{key!r} is a {answer.decode()}, not a {kind.decode()}"
        for (key, kind), answer in zip(keys, answers, strict=True)
        if isinstance(answer, bytes) and answer not in (kind, b"none")
    ] or ["gone by now"]
