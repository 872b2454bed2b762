"""Servers for tests: private ones, to be killed and configured, and those that a whole test run shares.

``shared_redis()`` and ``shared_rabbitmq()`` are started by whichever process of the run needs them first, and end with
the run; tests keep apart by virtual host and by key prefix (the fixtures of conftest.py). Where the environment names a
server (DRAY_TEST_RABBITMQ_URL, DRAY_TEST_REDIS_URL), that one is shared and nothing is started.
"""

from __future__ import annotations

from tests.servers_process import HOST, free_ports, missing
from tests.servers_rabbitmq import RabbitMQServer
from tests.servers_rabbitmq_cluster import RabbitMQCluster
from tests.servers_redis import RedisServer
from tests.servers_redis_group import RedisCluster, RedisSentinelTrio
from tests.servers_shared import SharedRabbitMQ, SharedRedis, shared_rabbitmq, shared_redis
from tests.servers_tls import Certificates

__all__ = [
    "HOST",
    "Certificates",
    "RabbitMQCluster",
    "RabbitMQServer",
    "RedisCluster",
    "RedisSentinelTrio",
    "RedisServer",
    "SharedRabbitMQ",
    "SharedRedis",
    "free_ports",
    "missing",
    "shared_rabbitmq",
    "shared_redis",
]
