"""What kind of server answers: its version, its role, what it keeps through a crash, what it throws away when full."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import hiredis

from dray.core.contracts import Durability
from dray.core.errors import Unavailable
from dray.plugins._redis_link import Link, understood

LEAST = (7, 0)


@dataclass(frozen=True, slots=True)
class Server:
    """What a probe found."""

    version: tuple[int, ...]
    """As Redis counts: Valkey says which Redis it equals."""
    text: str
    """For people: ``redis 7.0.15``."""
    is_cluster: bool
    durability: Durability
    window: str
    """What a crash may cost, for people."""
    policy: str
    """Its ``maxmemory-policy``."""
    maxmemory_bytes: int

    @property
    def evicts(self) -> bool:
        """Whether it throws keys away before they expire, once its memory is full."""
        return self.policy != "noeviction"


def probe(link: Link) -> Server:
    """Ask; raises ``LinkLost``, and ``Unavailable`` for a server that is too old or may not be asked."""
    info, config = link.exchange([("INFO",), ("CONFIG", "GET", "appendfsync")])
    if isinstance(info, hiredis.ReplyError):
        info = b""  # a user without +info: all that is checked here is unknown
    with understood(link.address):
        fsync = config[1].decode() if isinstance(config, list) and len(config) > 1 else ""
        return server_of(_fields(info), fsync, link.address)


def server_of(fields: dict[str, str], fsync: str, where: object) -> Server:
    """What INFO's fields mean. Raises ``Unavailable`` for a server that is too old."""
    version_text = fields.get("redis_version", "")
    version = tuple(map(int, re.findall(r"\d+", version_text)[:3]))
    name = "valkey" if fields.get("server_name") == "valkey" else "redis"
    text = (
        f"{name} {fields.get('valkey_version', version_text)}" if version else "a Redis that does not tell its version"
    )
    if version and version < LEAST:
        raise Unavailable(
            f"redis at {where}: it is {text}; dray needs Redis 7.0 or later, or Valkey: point `url` at one"
        )
    durability, window = _durability(fields, fsync)
    return Server(
        version,
        text,
        fields.get("cluster_enabled") == "1",
        durability,
        window,
        fields.get("maxmemory_policy", "noeviction"),
        int(fields.get("maxmemory", "0") or 0),
    )


def _durability(fields: dict[str, str], fsync: str) -> tuple[Durability, str]:
    if fields.get("aof_enabled") == "1":
        if fsync == "always":
            return Durability.D3, "appendonly with appendfsync always: nothing confirmed is lost"
        if fsync == "no":  # each answer comes after the write to the file, which the system keeps if Redis dies
            return Durability.D2, "appendonly with appendfsync no: only a crash of its machine costs what came last"
        # While it syncs, Redis puts off writing, and answers all the same.
        return Durability.D1, f"appendonly with appendfsync {fsync or 'everysec'}: a crash may cost the last 2 seconds"
    if not fields:
        return Durability.D1, "unknown: the user may not ask for INFO"
    return Durability.D1, "no appendonly file: a crash costs everything since the last snapshot, if there is one"


def _fields(info: Any) -> dict[str, str]:
    pairs = (line.partition(":") for line in bytes(info).decode(errors="replace").splitlines())
    return {name: value for name, separator, value in pairs if separator}
