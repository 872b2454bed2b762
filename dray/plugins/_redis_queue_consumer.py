"""The consumer of the Redis transport: claims in batches, waits on a bell while there is nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from dray.core.contracts import Consumer
from dray.core.errors import TransportError, Unavailable
from dray.core.message import Delivery
from dray.plugins._redis import Redis, RedisOptions
from dray.plugins._redis_queue import BATCH, INDEXES, base_of, decode
from dray.plugins._redis_queue_admin import Admin
from dray.plugins._redis_queue_bell import Bell
from dray.plugins._redis_queue_errors import explained
from dray.plugins._redis_queue_scripts import scripted

_LOOK_EVERY_S = 5.0
"""``SOON_MS`` of ``common.lua``: how late at most a message is noticed whose consumer died on the way to it."""


class RedisConsumer(Consumer):
    """Takes messages of some queues.

    - one command claims from all queues; in a cluster one for each queue, until there are enough
    - keeps watch for the next delayed message or ending lease if no other consumer does
    - passes on what it was woken for and then had no need of
    """

    def __init__(
        self,
        redis: Redis,
        admin: Admin,
        options: RedisOptions,
        queues: Sequence[str],
        lease_s: float,
        now: Callable[[], float],
    ) -> None:
        self._redis = redis
        self._admin = admin
        self._queues = queues
        self._slots = [[queue] for queue in queues] if redis.is_cluster else [list(queues)]
        self._bases = [[base_of(options.prefix, queue) for queue in slot] for slot in self._slots]
        self._lease_s = lease_s
        self._now = now
        self._keeps_watch = [False] * len(self._slots)
        self._owed: set[str] = set()
        """Queues whose token we took and have not looked into since."""
        self._bell = Bell(redis, self._bases, options.timeout)

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        if limit <= 0:
            return []
        deadline = time.monotonic() + timeout_s  # real time, as the server's: a test's clock cannot end a system call
        while True:
            left_s = deadline - time.monotonic()
            found, look_s = self._claim(min(limit, BATCH), left_s > 0)
            if found or left_s <= 0:
                return found
            self._name_queues()
            rung = self._bell.wait(min(left_s, look_s))
            if rung is None:
                self._owed.update(*self._bases)  # cut short, the server may have given us a token
                return []
            self._owed |= rung

    def _claim(self, limit: int, waits: bool) -> tuple[list[Delivery], float]:
        """What there is, or how long to wait for a ring before looking again."""
        found: list[Delivery] = []
        look_s, until = _LOOK_EVERY_S, self._now() + self._lease_s
        for number, queues in enumerate(self._slots):
            try:
                answer = self._ask(number, limit - len(found), waits and not found)
            except Unavailable:
                if found:
                    break  # another node is away: these are ours, and must not wait for it
                raise
            self._keeps_watch[number] = answer[0] >= 0
            if self._keeps_watch[number]:
                look_s = min(look_s, answer[0] / 1000)
            last = len(queues)
            for at, batch, *values in answer[1:]:
                last, queue = at, queues[at - 1]
                for index, value in enumerate(values, 1):
                    id_, body, headers, _, vain = decode(value)
                    receipt = (queue, batch, INDEXES[index])
                    found.append(Delivery(queue, id_, body, headers, receipt, vain + 1, until))
            full = len(found) >= limit
            if self._owed:
                self._owed.difference_update(self._bases[number][: last if full else None])
            if full:
                break
        if found:
            self._pass_on()
        return found, look_s

    def _ask(self, number: int, limit: int, waits: bool) -> list[Any]:
        flags = ("1" if waits else "0", "1" if self._keeps_watch[number] else "0")
        command = scripted("claim", self._bases[number], (limit, round(self._lease_s * 1000), *flags))
        (answer,) = self._redis.attempt([command])
        if isinstance(answer, TransportError):
            error = explained(self._redis, answer, self._bases[number])
            raise Unavailable(f"{error}; what was on its way here comes back when its leases end") from error
        return list(answer)

    def _name_queues(self) -> None:
        naming = self._admin.registration(self._queues)
        if naming:
            self._redis.run(naming, again=True)

    def _pass_on(self) -> None:
        """Let others look into the queues that we were rung for; without an answer they do so before long."""
        if self._owed:
            owed, self._owed = self._owed, set()
            self._redis.attempt([scripted("ring", [base]) for base in owed], again=True)

    def wake(self) -> None:
        self._bell.wake()

    def close(self) -> None:
        self._bell.close()
        self._pass_on()
