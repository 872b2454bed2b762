"""Three RabbitMQ nodes that are one cluster."""

from __future__ import annotations

from typing import Any, Self

from tests.servers_process import until
from tests.servers_rabbitmq import Epmd, RabbitMQServer
from tests.servers_server import Group

RUNNING = """
    case erlang:function_exported(rabbit_nodes, list_running, 0) of
        true -> length(rabbit_nodes:list_running());  % since 3.11
        false -> length(rabbit_nodes:all_running())
    end"""


class RabbitMQCluster(Group):
    """Nodes on loopback that find each other at their first start; any may be killed and started again."""

    def __init__(self, size: int = 3, **settings: Any) -> None:
        self._epmd = Epmd()
        self.nodes = [RabbitMQServer(epmd=self._epmd, **settings) for _ in range(size)]
        names = ", ".join(f"'{node.node}'" for node in self.nodes)
        for node in self.nodes:
            node.settings["cluster_nodes"] = f"{{[{names}], disc}}"

    @property
    def members(self) -> list[RabbitMQServer]:
        return self.nodes

    def start(self) -> Self:
        super().start()
        until(self.is_whole, "the nodes know each other")
        return self

    def close(self) -> None:
        super().close()
        self._epmd.close()

    def is_whole(self) -> bool:
        return all(node.eval(RUNNING) == str(len(self.running)) for node in self.running)

    @property
    def running(self) -> list[RabbitMQServer]:
        return [node for node in self.nodes if node.running]

    def urls(self, vhost: str = "/") -> list[str]:
        return [node.url(vhost) for node in self.nodes]

    def add_vhost(self, name: str = "") -> str:
        return self.running[0].add_vhost(name)

    def delete_vhost(self, name: str) -> None:
        self.running[0].delete_vhost(name)

    def leader_of(self, queue: str, vhost: str) -> RabbitMQServer | None:
        """The node that leads a quorum queue, as the first node that runs knows; None while there is no leader."""
        name = self.running[0].eval(
            f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),'
            "case ra_leaderboard:lookup_leader(element(1, amqqueue:get_pid(Queue))) of"
            "    {_, Node} -> Node;"
            "    undefined -> undefined "
            "end"
        )
        return next((node for node in self.nodes if node.node == name.strip("'")), None)

    def await_leader(self, queue: str, vhost: str, timeout_s: float = 30) -> RabbitMQServer:
        """The leader, once there is one that runs."""

        def is_led() -> bool:
            leader = self.leader_of(queue, vhost)
            return leader is not None and leader.running

        until(is_led, f"a node that runs leads {queue}", timeout_s)
        leader = self.leader_of(queue, vhost)
        assert leader is not None
        return leader
