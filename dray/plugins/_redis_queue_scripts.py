"""The Lua commands of the Redis transport."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

from dray.plugins._redis import Argument, Command, Script

NAMES = (
    "acknowledge",
    "claim",
    "dead_find",
    "dead_list",
    "extend",
    "hasten",
    "peek",
    "purge",
    "register",
    "ring",
    "send",
    "settle",
    "stats",
)


@cache
def script(name: str) -> Script:
    """The script of this name. What all of them share goes between its first line, which holds flags, and the rest."""
    flags, _, rest = _read(name).partition("\n")
    return Script(f"{flags}\n{_read('common')}{rest}")


def scripted(name: str, bases: Sequence[str], arguments: Iterable[Argument] = ()) -> Command:
    """The command that runs a script for these queues."""
    return script(name)((*bases, f"{bases[0]}:numbers"), arguments)


def _read(name: str) -> str:
    return (resources.files("dray.plugins") / "_redis_lua" / f"{name}.lua").read_text("utf-8")
