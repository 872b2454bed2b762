"""The Redis result back end: results and barriers in Redis 7.0 or later, or Valkey; pushed to whoever waits."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures, Seconds
from dray.core.errors import TooLarge
from dray.core.message import TERMINAL, StoredResult
from dray.plugins._redis import Redis, RedisOptions
from dray.plugins._redis_results import ARRIVE, STORE, WAIT, decode, encode, time_to_live_ms
from dray.plugins._redis_waiters import LEASE_MS, Waiters

MAX_BODY_BYTES = 16 * 2**20
"""Redis would take 512 MB, but serves nobody else while it copies: this much is some 10 ms."""
_BATCH = 500
"""Results that one script stores: others get their turn after about a millisecond."""
_BUCKETS = 128
"""Into how many slots the results of a cluster go: a script can store together only what is in the same one."""


class RedisBackend(ResultBackend):
    """Results, and who has arrived at a barrier, in Redis.

    Responsibilities: stores a batch in one round trip, never over a terminal state; fetches likewise; lets any number
    of threads wait on one connection; everything expires by itself.
    """

    api: ClassVar[int] = 1
    features = ResultFeatures(durability=Durability.D3, push=True, max_body_bytes=MAX_BODY_BYTES)

    @dataclass(frozen=True, slots=True)
    class Options(RedisOptions):
        """How to reach Redis, and how long groups are remembered."""

        barrier_expires: Seconds = 30 * 86400.0
        """How long the members of a group that never completes are remembered after the last one arrived."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        self.redis = Redis(options, context, (STORE, WAIT, ARRIVE))
        self._now = context.clock.time
        self._results = f"{options.prefix}:r:".encode()
        self._groups = f"{options.prefix}:b:".encode()
        self._waiters = Waiters(self.redis, options.prefix, self._register, context.random)

    def open(self) -> None:
        server = self.redis.open()
        durability = min(type(self).features.durability, server.durability)
        self.features = replace(self.features, durability=durability)
        self.context.logger.info("results in %s; %s", server.text, server.window)
        if server.evicts:
            self.context.logger.warning(
                "redis: its maxmemory-policy is %s: once its memory is full, results and the members of groups are "
                "thrown away before they expire; set maxmemory-policy to noeviction",
                server.policy,
            )

    def close(self) -> None:
        self.redis.close()
        self._waiters.reset()

    # --- results -------------------------------------------------------------------------------------------

    def store(self, results: Sequence[StoredResult]) -> None:
        kept: dict[bytes, StoredResult] = {}
        for result in results:
            if len(result.body) > MAX_BODY_BYTES:
                raise TooLarge(
                    f"the result of {result.id} is {len(result.body):,} bytes; redis takes {MAX_BODY_BYTES:,}: "
                    "store the data elsewhere and return a reference to it"
                )
            key = self._key(result.id)
            if key not in kept or kept[key].state not in TERMINAL:
                kept[key] = result
        now = self._now()
        commands = []
        for keys in self._batches(kept):
            arguments: list[bytes | int] = []
            for key in keys:
                result = kept[key]
                arguments += encode(result), time_to_live_ms(result.expires_at, now)
            commands.append(STORE(keys, arguments))
        self.redis.run(commands, again=True)

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        by_key = {self._key(id_): id_ for id_ in ids}
        batches = self._batches(by_key)
        answers = self.redis.run([("MGET", *keys) for keys in batches], again=True)
        with self.redis.understood():
            found = (
                decode(by_key[key], text)
                for keys, texts in zip(batches, answers, strict=True)
                for key, text in zip(keys, texts, strict=True)
            )
            return {result.id: result for result in found if result is not None}

    def delete(self, ids: Sequence[str]) -> None:
        self.redis.run([("UNLINK", *keys) for keys in self._batches(map(self._key, ids))], again=True)

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        if timeout_s <= 0 or not ids:
            return {id_: result for id_, result in self.fetch(ids).items() if result.state in TERMINAL}
        by_key = {self._key(id_): id_ for id_ in ids}
        texts = self._waiters.wait(by_key, timeout_s)
        with self.redis.understood():
            found = (decode(by_key[key], text) for key, text in texts.items())
            return {result.id: result for result in found if result is not None}

    def _register(self, keys: Sequence[bytes], channel: str) -> dict[bytes, bytes]:
        """Have ``channel`` told of these results, or have those that are there already."""
        batches = self._batches(keys)
        answers = self.redis.run([WAIT(some, (channel, LEASE_MS)) for some in batches], again=True)
        with self.redis.understood():
            return {
                some[at - 1]: bytes(text)
                for some, found in zip(batches, answers, strict=True)
                for at, text in zip(found[::2], found[1::2], strict=True)
            }

    # --- barriers ------------------------------------------------------------------------------------------

    def arrive(self, group: str, member: str, size: int) -> bool:
        expires_ms = round(self.options.barrier_expires * 1000)
        command = ARRIVE([self._groups + group.encode()], (member, size, expires_ms))
        return bool(self.redis.run([command], again=True)[0])

    # --- keys ----------------------------------------------------------------------------------------------

    def _key(self, id_: str) -> bytes:
        name = id_.encode()
        if not self.redis.is_cluster:
            return self._results + name
        return b"%b{%d}:%b" % (self._results, zlib.crc32(name) % _BUCKETS, name)

    def _batches(self, keys: Iterable[bytes]) -> list[list[bytes]]:
        """What goes into one command each: so much that others get their turn; in a cluster all of one slot."""
        slots: dict[bytes, list[bytes]] = {}
        if self.redis.is_cluster:
            for key in keys:
                slots.setdefault(key[: key.index(b"}")], []).append(key)
        else:
            slots[b""] = list(keys)
        return [some[at : at + _BATCH] for some in slots.values() for at in range(0, len(some), _BATCH)]
