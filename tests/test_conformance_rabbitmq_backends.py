"""The result back end kit over those on RabbitMQ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dray.core.clock import Clock
from dray.core.contracts import ResultBackend
from dray.plugins.backends.amqp import AmqpBackend
from dray.plugins.backends.rpc import RpcBackend
from dray.testing import ResultBackendConformance, plugin_context
from tests.servers import RabbitMQServer, SharedRabbitMQ


class _OnRabbitMQ(ResultBackendConformance):
    """Each test has a virtual host; the one that kills the broker has a broker."""

    server: RabbitMQServer | None
    url: str

    @pytest.fixture(autouse=True)
    def broker(self, request: pytest.FixtureRequest, rabbitmq: SharedRabbitMQ) -> Iterator[None]:
        self.server = None
        if request.function.__name__ == "test_results_and_groups_survive_reopening":
            with RabbitMQServer() as self.server:
                self.url = self.server.url()
                yield
            return
        vhost = rabbitmq.add_vhost()
        self.url = rabbitmq.url(vhost)
        yield
        rabbitmq.delete_vhost(vhost)

    def restart(self) -> None:
        assert self.server is not None
        self.server.restart()


class TestRpc(_OnRabbitMQ):
    def make(self, clock: Clock) -> ResultBackend:
        return RpcBackend(RpcBackend.Options(url=self.url), plugin_context("rpc", clock))


@pytest.mark.timeout(600)  # thousands of queues are declared, each of which the broker writes down
class TestAmqp(_OnRabbitMQ):
    def make(self, clock: Clock) -> ResultBackend:
        return AmqpBackend(AmqpBackend.Options(url=self.url), plugin_context("amqp", clock))
