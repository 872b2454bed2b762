"""What all tests share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.servers import SharedRabbitMQ, SharedRedis, shared_rabbitmq, shared_redis
from tests.servers_shared import disown_the_run, own_the_run

# No deadline: how long an example takes says nothing on a loaded machine. In CI the same examples on each run.
settings.register_profile("dray", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("dray")


def pytest_configure() -> None:
    own_the_run()


def pytest_unconfigure() -> None:
    disown_the_run()


@pytest.fixture(scope="session")
def rabbitmq() -> SharedRabbitMQ:
    """The RabbitMQ that the whole run shares: for tests that neither kill nor configure it."""
    return shared_rabbitmq()


@pytest.fixture(scope="session")
def redis_server() -> SharedRedis:
    """The Redis that the whole run shares: for tests that neither kill nor configure it."""
    return shared_redis()


@pytest.fixture
def rabbitmq_url(rabbitmq: SharedRabbitMQ) -> Iterator[str]:
    """An empty virtual host on the shared RabbitMQ."""
    vhost = rabbitmq.add_vhost()
    yield rabbitmq.url(vhost)
    rabbitmq.delete_vhost(vhost)


@pytest.fixture
def redis_prefix() -> str:
    """What the keys of this test begin with on the shared Redis."""
    return f"dray-test-{uuid.uuid4().hex[:12]}"
