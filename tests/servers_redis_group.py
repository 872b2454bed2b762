"""Redis servers that stand in for each other: a master watched by Sentinels, a cluster."""

from __future__ import annotations

import secrets
from typing import Any, Self

from tests.servers_process import HOST, free_ports, until
from tests.servers_redis import PROGRAMS, RedisServer, answers, redis_process
from tests.servers_server import Group, Server

MASTER = "dray"
SLOTS = 16384


class RedisSentinel(Server):
    """One Sentinel. It is told of the others and of the replica, which it would else take seconds to find."""

    def __init__(self, port: int, identity: str, settings: list[str]) -> None:
        self.folder = PROGRAMS.folder("sentinel")
        self.port = port
        config = self.folder / "sentinel.conf"
        here = [f"port {port}", f"bind {HOST}", f"dir {PROGRAMS.inside(self.folder)}", f"sentinel myid {identity}"]
        config.write_text("\n".join([*here, *settings, ""]))
        self._process = redis_process(config, "--sentinel")

    def master_port(self) -> int:
        import redis

        with redis.Redis(HOST, self.port, decode_responses=True, socket_timeout=10) as client:
            _, port = client.sentinel_get_master_addr_by_name(MASTER)
        return int(port)

    def _answers(self) -> bool:
        return answers(self.port)


class RedisSentinelTrio(Group):
    """A master, a replica and three Sentinels, which promote the replica a few seconds after the master's death."""

    def __init__(self, down_after_ms: int = 1000, **options: Any) -> None:
        common: dict[str, Any] = {"repl_diskless_sync_delay": 0, "repl_ping_replica_period": 1, **options}
        master = RedisServer(**common)
        replica = RedisServer(replicaof=(HOST, master.port), **common)
        self.servers = [master, replica]
        self.sentinels = sentinels(master.port, replica.port, down_after_ms)

    @property
    def members(self) -> list[Server]:
        return [*self.servers, *self.sentinels]

    def start(self) -> Self:
        super().start()
        until(lambda: any(is_linked(server) for server in self.servers), "the replica has the master's data")
        return self

    def url(self, database: int = 0) -> str:
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{MASTER}/{database}"

    @property
    def master(self) -> RedisServer:
        """As the first Sentinel that runs says."""
        port = next(sentinel for sentinel in self.sentinels if sentinel.running).master_port()
        return next(server for server in self.servers if server.port == port)

    def await_other_master(self, old: RedisServer, timeout_s: float = 20) -> RedisServer:
        """The one that was promoted in its place."""
        until(lambda: self.master is not old and role(self.master) == "master", "another master is chosen", timeout_s)
        return self.master


def sentinels(master_port: int, replica_port: int, down_after_ms: int) -> list[RedisSentinel]:
    identities = {port: secrets.token_hex(20) for port in free_ports(3)}
    settings = [
        f"sentinel monitor {MASTER} {HOST} {master_port} 2",
        f"sentinel down-after-milliseconds {MASTER} {down_after_ms}",
        f"sentinel failover-timeout {MASTER} 5000",
        f"sentinel known-replica {MASTER} {HOST} {replica_port}",
    ]
    known = {port: f"sentinel known-sentinel {MASTER} {HOST} {port} {own}" for port, own in identities.items()}
    return [
        RedisSentinel(port, own, [*settings, *(line for other, line in known.items() if other != port)])
        for port, own in identities.items()
    ]


class RedisCluster(Group):
    """Masters that share the slots, each with ``replicas`` replicas, which replace a dead master within seconds.

    ``servers`` are the masters, then the first replica of each, then the second ...
    """

    def __init__(self, masters: int = 3, replicas: int = 0, node_timeout_ms: int = 1000, **options: Any) -> None:
        common: dict[str, Any] = {
            "cluster_enabled": True,
            "cluster_node_timeout": node_timeout_ms,
            "repl_diskless_sync_delay": 0,
        }
        common |= {"cluster_replica_validity_factor": 0, **options}
        self._bus_ports = free_ports(masters * (1 + replicas))
        self.servers = [RedisServer(cluster_port=port, **common) for port in self._bus_ports]
        self._masters = masters
        self._formed = False

    @property
    def members(self) -> list[RedisServer]:
        return self.servers

    def start(self) -> Self:
        super().start()
        if not self._formed:
            self._form()
            self._formed = True
        until(self.is_whole, "all slots of the cluster are served")
        return self

    def _form(self) -> None:
        first, *others = self.servers
        for index, server in enumerate(self.servers[: self._masters]):
            low, high = (SLOTS * edge // self._masters for edge in (index, index + 1))
            server.command("CLUSTER", "ADDSLOTSRANGE", low, high - 1)
            server.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for server, bus_port in zip(others, self._bus_ports[1:], strict=True):
            first.command("CLUSTER", "MEET", HOST, server.port, bus_port)
        until(self.is_whole, "the nodes of the cluster know each other")
        for index, replica in enumerate(self.servers[self._masters :]):
            replica.command("CLUSTER", "REPLICATE", node_id(self.servers[index % self._masters]))
        until(lambda: all(map(is_linked, self.servers[self._masters :])), "the replicas have their masters' data")

    def is_whole(self) -> bool:
        running = [server for server in self.servers if server.running]
        known = f"cluster_known_nodes:{len(self.servers)}"
        return all(
            "cluster_state:ok" in info and known in info
            for info in (str(server.command("CLUSTER", "INFO")) for server in running)
        )

    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{HOST}:{server.port}" for server in self.servers)

    def owner_of(self, key: str) -> RedisServer:
        """The master that has the key's slot."""
        asked = next(server for server in self.servers if server.running)
        slot = asked.command("CLUSTER", "KEYSLOT", key)
        for low, high, (_, port, *_), *_ in asked.command("CLUSTER", "SLOTS"):
            if low <= slot <= high:
                return next(server for server in self.servers if server.port == port)
        raise LookupError(f"nobody has slot {slot}")

    def move_slot_of(self, key: str, target: RedisServer, count: int = 100) -> None:
        """Resharding as redis-cli does it, ``count`` keys at a time: clients see MOVED, ASK and TRYAGAIN meanwhile."""
        source = self.owner_of(key)
        slot = source.command("CLUSTER", "KEYSLOT", key)
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, count):
            source.command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, source, *self.servers):
            if server.running and role(server) == "master":
                server.command("CLUSTER", "SETSLOT", slot, "NODE", node_id(target))


def node_id(server: RedisServer) -> str:
    return str(server.command("CLUSTER", "MYID"))


def role(server: RedisServer) -> str:
    return str(server.command("ROLE")[0])


def is_linked(server: RedisServer) -> bool:
    """Whether it is a replica in step with its master."""
    kind, *details = server.command("ROLE")
    return bool(kind == "slave" and details[2] == "connected")
