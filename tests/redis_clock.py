"""The Redis transport on a test's clock: its scripts are told the time instead of asking the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dray.core.clock import Clock
from dray.plugins._redis import Command, Redis, Script
from dray.plugins._redis_queue_scripts import NAMES, script
from dray.plugins.transports.redis import RedisTransport

_START, _ASK = "table.remove(KEYS)", "redis.call('TIME')"
_TOLD = "local told = {table.remove(ARGV, #ARGV - 1), table.remove(ARGV)}"


def move_to(transport: RedisTransport, clock: Clock) -> RedisTransport:
    """Everything that the transport does in the server from now on happens at ``clock``'s time."""
    transport._redis._router = _Router(transport._redis._router, clock)  # type: ignore[assignment]
    return transport


class _Router:
    """Passes commands on, changed."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._told: dict[str, Script] = {}
        for name in NAMES:
            asking = script(name)
            assert _START in asking.source
            assert _ASK in asking.source
            told = asking.source.replace(_START, f"{_START}; {_TOLD}").replace(_ASK, "told")
            self._told[asking.sha] = Script(told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def attempt(self, commands: Sequence[Command], again: bool) -> list[Any]:
        return list(self._inner.attempt([self._changed(command) for command in commands], again))

    def _changed(self, command: Command) -> Command:
        now = self._clock.time()
        if command[0] == "EVALSHA":
            microseconds = round(now * 1e6)
            source = self._told[str(command[1])].source
            return ("EVAL", source, *command[2:], microseconds // 10**6, microseconds % 10**6)
        if command[0] == "SET" and command[3] == "PXAT":
            return (*command[:3], "PX", round(int(command[4]) - now * 1000))
        return command


def age(redis: Redis, prefix: str, seconds: float) -> None:
    """Make what expires by itself expire so much earlier: what the server does without a script."""
    for key in redis.call("KEYS", f"{prefix}:tomb:*", again=True):
        redis.call("PEXPIRE", key, redis.call("PTTL", key) - round(seconds * 1000))


def end_leases(redis: Redis, prefix: str, seconds: float) -> None:
    """Make leases end so much earlier, for transports that live by the server's clock."""
    for key in redis.call("KEYS", f"{{{prefix}:*}}:leases", again=True):
        for receipt in redis.call("ZRANGE", key, 0, -1):
            redis.call("ZINCRBY", key, str(-seconds * 1000), receipt)
