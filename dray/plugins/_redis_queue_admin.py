"""What is seldom asked of the Redis transport: a look into queues, dead letters, tombstones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dray.core.message import DeadLetter, Outgoing, QueueStats
from dray.plugins._redis import Command, Redis
from dray.plugins._redis_queue import BATCH, base_of, decode
from dray.plugins._redis_queue_scripts import script, scripted

_NAME_EVERY_S = 60.0
"""How often each process repeats the names of its queues: somebody may have flushed the database."""


class Admin:
    """Looks into queues by their names. Any thread.

    - the names themselves: a set, because a cluster has no place where all keys can be seen
    - stats, peek, purge; dead letters of one queue or all; tombstones, one key for each id
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._names = f"{prefix}:queues"
        self._named_at: dict[str, float] = {}

    def registration(self, queues: Sequence[str]) -> list[Command]:
        """The commands that make the names known of those queues that are due to be named."""
        now = time.monotonic()
        new = [queue for queue in queues if now - self._named_at.get(queue, -math.inf) > _NAME_EVERY_S]
        self._named_at.update(dict.fromkeys(new, now))
        return [script("register")([self._names, self._names], part) for part in _parts(new)]

    def register(self, queues: Sequence[str]) -> None:
        """Make these names known now."""
        for queue in queues:
            self._named_at.pop(queue, None)
        self._redis.run(self.registration(queues), again=True)

    def queues(self) -> list[str]:
        return sorted(name.decode() for name in self._redis.call("SMEMBERS", self._names, again=True))

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        answers = self._each("stats", queues, (), again=True)
        return {
            queue: QueueStats(ready, leased, delayed, dead, None if age_ms < 0 else age_ms / 1000)
            for queue, (ready, leased, delayed, dead, age_ms) in zip(queues, answers, strict=True)
        }

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        (answer,) = self._each("peek", [queue], (limit,), again=True)
        found = []
        for due_ms, value in zip(answer[::2], answer[1::2], strict=True):
            id_, body, headers, priority, _ = decode(value)
            found.append(Outgoing(queue, id_, body, headers, priority, float(due_ms) / 1000 if due_ms else None))
        return found

    def purge(self, queue: str) -> int:
        (count,) = self._each("purge", [queue], ())
        return int(count)

    # --- dead letters --------------------------------------------------------------------------------------

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        names = self.queues() if queue is None else [queue]
        return self._letters(names, self._each("dead_list", names, (limit,), again=True))[:limit]

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        return self._find("", ids)

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(letter.id for letter in self._find("delete", ids)))

    def _find(self, then: str, ids: Sequence[str]) -> list[DeadLetter]:
        names = self.queues()
        found = []
        for part in _parts(ids):
            found += self._letters(names, self._each("dead_find", names, (then, *part), again=not then))
        return found

    @staticmethod
    def _letters(queues: Sequence[str], answers: Sequence[Any]) -> list[DeadLetter]:
        """What was answered for each of the queues, newest first."""
        found = []
        for queue, answer in zip(queues, answers, strict=True):
            for place, died_ms, letter in zip(answer[::3], answer[1::3], answer[2::3], strict=True):
                reason, _, value = letter.partition(b"\0")
                id_, body, headers, _, vain = decode(value)
                died_at, text = float(died_ms) / 1000, reason.decode("utf-8", "replace")
                found.append((died_at, place, DeadLetter(id_, queue, body, headers, text, died_at, vain + 1)))
        found.sort(key=lambda item: item[:2], reverse=True)
        return [letter for _, _, letter in found]

    # --- tombstones ----------------------------------------------------------------------------------------

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool) -> None:
        expires_ms = math.ceil(expires_at * 1000)
        for part in _parts(list(marks)):
            commands: list[Command] = [("SET", self._tomb(id_), marks[id_], "PXAT", expires_ms) for id_ in part]
            self._redis.run(commands, again=True)
        if hasten:
            for part in _parts(list(marks)):
                self._hasten(part)

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        found = []
        for part in _parts(ids):
            keys = [self._tomb(id_) for id_ in part]
            if self._redis.is_cluster:
                found += self._redis.run([("GET", key) for key in keys], again=True)
            else:
                found += self._redis.call("MGET", *keys, again=True)
        return {id_: mark.decode() for id_, mark in zip(ids, found, strict=True) if mark is not None}

    def exhume(self, ids: Sequence[str]) -> None:
        for part in _parts(ids):
            self._redis.run([("DEL", self._tomb(id_)) for id_ in part], again=True)

    def _hasten(self, ids: Sequence[str]) -> None:
        """Through all queues, a part of each at a time."""
        cursors = dict.fromkeys(self.queues(), b"0")
        while cursors:
            commands = [scripted("hasten", [base_of(self._prefix, queue)], (at, *ids)) for queue, at in cursors.items()]
            answers = self._redis.run(commands, again=True)
            cursors = {queue: at for queue, at in zip(cursors, answers, strict=True) if at != b"0"}

    def _tomb(self, id_: str) -> str:
        return f"{self._prefix}:tomb:{id_}"

    def _each(self, name: str, queues: Sequence[str], arguments: Sequence[Any], again: bool = False) -> list[Any]:
        """The script's answer for each queue, in one round trip."""
        if not queues:
            return []
        return self._redis.run([scripted(name, [base_of(self._prefix, queue)], arguments) for queue in queues], again)


def _parts(items: Sequence[str]) -> Iterator[Sequence[str]]:
    """As many at a time as one command takes."""
    for at in range(0, len(items), BATCH):
        yield items[at : at + BATCH]
