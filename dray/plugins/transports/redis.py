"""Redis and Valkey as a transport. What runs inside the server is in ``_redis_lua``, one file for each command."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dray.core.contracts import Consumer, Durability, PluginContext, Seconds, Transport, TransportFeatures
from dray.core.errors import ConfigError, SendError, TransportError, Uncertain
from dray.core.message import Action, DeadLetter, Delivery, Outgoing, QueueStats, Settlement
from dray.plugins._redis import Argument, Command, Redis, RedisOptions
from dray.plugins._redis_link_url import target_of
from dray.plugins._redis_queue import BATCH, MAX_BODY_BYTES, Receipt, base_of, runs
from dray.plugins._redis_queue_admin import Admin
from dray.plugins._redis_queue_consumer import RedisConsumer
from dray.plugins._redis_queue_errors import explained
from dray.plugins._redis_queue_scripts import NAMES, script, scripted

_COMMAND_BYTES = 2**24
"""Bodies in one command, about: a client's buffer in the server is limited, and other clients want their turn."""


class RedisTransport(Transport):
    """Messages in lists and sorted sets of a Redis server, claimed and settled by scripts on the server's clock.

    Responsibilities: sends, settles and extends a batch in one round trip, one command for each queue; knows which
    follow-ups can be swapped atomically; checks at ``open`` what the server promises. A receipt is the queue, the batch
    that one claim took (a number that is never given out twice) and an index in it; it is good until the lease has
    ended and somebody claims.
    """

    api: ClassVar[int] = 1
    features = TransportFeatures(
        durability=Durability.D3,
        lease_s=30.0,
        max_delay_s=math.inf,
        priorities=10,
        atomic_then=True,
        dead_letter=True,
        release=True,
        max_body_bytes=MAX_BODY_BYTES,
        hastens=True,
    )

    @dataclass(frozen=True, slots=True)
    class Options(RedisOptions):
        """Where Redis is, and how long things last there."""

        lease: Seconds = 30.0
        """How long a delivery is guarded; the worker renews it while the task runs."""
        dead_expires: Seconds = 30 * 86400.0
        """How long dead letters are kept."""

        def __post_init__(self) -> None:
            RedisOptions.__post_init__(self)
            if self.lease < 0.01:
                raise ConfigError(f"lease: {self.lease:g} s is too short, the least is 10ms")

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        self._redis = Redis(options, context, map(script, NAMES))
        self._admin = Admin(self._redis, options.prefix)
        self.features = replace(self.features, lease_s=options.lease, atomic_then=not self._redis.is_cluster)
        target = target_of(options)
        self._fails_over = target.kind != "plain" or len(target.addresses) > 1
        self._now = context.clock.time

    def open(self) -> None:
        server = self._redis.open()
        if server.evicts and server.maxmemory_bytes:
            self._redis.close()
            raise ConfigError(
                f"{self.context.name}: the server's maxmemory-policy is {server.policy}: when its memory is full it "
                "throws messages away. Set CONFIG SET maxmemory-policy noeviction (and in its redis.conf), or use "
                "another Redis for queues than for a cache"
            )
        durability, window = server.durability, server.window
        if self._fails_over and durability > Durability.D1:
            durability, window = Durability.D1, f"{window}, but a failover costs what the replica had not received yet"
        self.features = replace(self.features, durability=durability)
        self.context.logger.info("%s keeps %s: %s", server.text, durability.name, window)

    def declare(self, queues: Sequence[str]) -> None:
        if queues:
            self._admin.register(queues)

    def close(self) -> None:
        self._redis.close()

    # --- sending and settling ------------------------------------------------------------------------------

    def send(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        by_queue: dict[str, list[Outgoing]] = {}
        for message in messages:
            by_queue.setdefault(message.queue, []).append(message)
        batches = [part for queue in by_queue.values() for part in _parts(queue)]
        now = self._now()
        commands = []
        for batch in batches:
            count, arguments = runs(batch, lambda _: 1, now)
            commands.append(scripted("send", [self._base(batch[0].queue)], (count, *arguments)))
        naming = self._admin.registration(list(by_queue))  # done or not, the messages are what counts
        answers = self._redis.attempt([*naming, *commands])[len(naming) :]
        failed = [(batch, answer) for batch, answer in zip(batches, answers, strict=True) if answer != 1]
        if failed:
            self._not_sent(failed, len(batches))

    def _not_sent(self, failed: Sequence[tuple[list[Outgoing], Any]], tried: int) -> None:
        errors = [explained(self._redis, error, [self._base(batch[0].queue)]) for batch, error in failed]
        for error in errors:
            if isinstance(error, Uncertain):
                raise error
        if len(failed) == tried:
            raise errors[0]
        raise SendError(str(errors[0]), [message for batch, _ in failed for message in batch]) from errors[0]

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        ours, repeated = _first_of_each(settlements)
        stale: set[Receipt] = set()
        if self._redis.is_cluster:
            ours, stale = self._send_follow_ups(ours)
        done: list[Receipt] = []
        other: dict[str, list[Settlement]] = {}
        for settlement in ours:
            delivery, action, then, _ = settlement
            if action is Action.ACK and not then:
                done.append(delivery.receipt)
            else:
                other.setdefault(delivery.queue, []).append(settlement)
        commands = self._for_receipts("acknowledge", done)
        naming: list[Command] = []
        for queue, batch in other.items():
            commands += [(queue, self._settle(queue, part)) for part in _settlement_parts(batch)]
            names = {message.queue for settlement in batch for message in settlement.then}
            naming += self._admin.registration(list(names))
        stale |= self._run(commands, naming)
        if not stale and not repeated:
            return []
        lost = [settlement.delivery for settlement in settlements if settlement.delivery.receipt in stale]
        return lost + [settlement.delivery for settlement in repeated if settlement.delivery.receipt not in stale]

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        receipts = dict.fromkeys(delivery.receipt for delivery in deliveries)
        stale = self._run(self._for_receipts("extend", receipts, round(lease_s * 1000)))
        return [delivery for delivery in deliveries if delivery.receipt in stale] if stale else []

    def _for_receipts(self, name: str, receipts: Iterable[Receipt], *before: Argument) -> list[tuple[str, Command]]:
        """Commands, each with its queue, that give a script these receipts by batches."""
        by_queue: dict[str, dict[int, list[bytes]]] = {}
        for queue, batch, index in receipts:
            by_queue.setdefault(queue, {}).setdefault(batch, []).append(index)
        commands = []
        for queue, batches in by_queue.items():
            keys = [self._base(queue)]
            arguments = list(before)
            for batch, indexes in batches.items():
                arguments += (batch, len(indexes), *indexes)
                if len(arguments) > BATCH:
                    commands.append((queue, scripted(name, keys, arguments)))
                    arguments = list(before)
            if len(arguments) > len(before):
                commands.append((queue, scripted(name, keys, arguments)))
        return commands

    def _settle(self, queue: str, settlements: Sequence[Settlement]) -> Command:
        """The command that swaps deliveries of one queue for what follows."""
        keys = {queue: 1}
        arguments: list[bytes | int | str] = [round(self.options.dead_expires * 1000)]
        for delivery, action, then, reason in settlements:
            count, follow_ups = runs(then, lambda name: keys.setdefault(name, len(keys) + 1), self._now())
            text = (reason or "").replace("\0", " ") if action is Action.DEAD else ""
            _, batch, index = delivery.receipt
            arguments += (batch, index, action.value, text.encode("utf-8", "replace"), count)
            arguments += follow_ups
        return scripted("settle", [self._base(name) for name in keys], arguments)

    def _send_follow_ups(self, settlements: list[Settlement]) -> tuple[list[Settlement], set[Receipt]]:
        """First of two steps, in a cluster. What is left to be settled, and the receipts that are no longer good."""
        swapped = [settlement for settlement in settlements if settlement.then]
        if not swapped:
            return settlements, set()
        # Extended so that they are still ours in the second step.
        lost = self.extend([settlement.delivery for settlement in swapped], self.options.lease)
        stale = {delivery.receipt for delivery in lost}
        ours = [settlement for settlement in settlements if settlement.delivery.receipt not in stale]
        self.send([message for settlement in ours for message in settlement.then])
        if self.context.faults is not None:
            self.context.faults.hit("follow_ups_sent")
        return [settlement._replace(then=()) for settlement in ours], stale

    def _run(self, commands: Sequence[tuple[str, Command]], naming: Sequence[Command] = ()) -> set[Receipt]:
        """One round trip; the receipts that were answered, of the queues that the commands are for."""
        stale: set[Receipt] = set()
        if not commands:
            return stale
        answers = self._redis.attempt([*naming, *(command for _, command in commands)])[len(naming) :]
        for (queue, _), answer in zip(commands, answers, strict=True):
            if isinstance(answer, TransportError):
                raise explained(self._redis, answer, [self._base(queue)])
            for place in answer:
                batch, _, index = place.partition(b"-")
                stale.add((queue, int(batch), index))
        return stale

    # --- receiving -----------------------------------------------------------------------------------------

    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        del buffer  # nothing is held unclaimed
        names = tuple(dict.fromkeys(queues))
        self.declare(names)
        return RedisConsumer(self._redis, self._admin, self.options, names, self.options.lease, self._now)

    # --- what lies in the queues, dead letters, tombstones, broadcasts -------------------------------------

    def queues(self) -> list[str]:
        return self._admin.queues()

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        return self._admin.stats(queues)

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        return self._admin.peek(queue, limit)

    def purge(self, queue: str) -> int:
        return self._admin.purge(queue)

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        return self._admin.dead_list(queue, limit)

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        return self._admin.dead_get(ids)

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        return self._admin.dead_purge(ids)

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        self._admin.bury(marks, expires_at, hasten)

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        return self._admin.buried(ids)

    def exhume(self, ids: Sequence[str]) -> None:
        self._admin.exhume(ids)

    def broadcast(self, channel: str, payload: bytes) -> None:
        self._redis.call("PUBLISH", self._channel(channel), payload)

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        return self._redis.listener.subscribe(self._channel(channel), deliver)

    # --- names ---------------------------------------------------------------------------------------------

    def _base(self, queue: str) -> str:
        return base_of(self.options.prefix, queue)

    def _channel(self, channel: str) -> str:
        return f"{self.options.prefix}:broadcast:{channel}"


def _parts(messages: Sequence[Outgoing]) -> Iterable[list[Outgoing]]:
    """Messages of one queue, as many at a time as one command takes."""
    part: list[Outgoing] = []
    size = 0
    for message in messages:
        size += len(message.body)
        if part and (len(part) >= BATCH or size > _COMMAND_BYTES):
            yield part
            part, size = [], len(message.body)
        part.append(message)
    yield part


def _settlement_parts(settlements: list[Settlement]) -> Iterable[list[Settlement]]:
    """Deliveries of one queue in the order they were handed out, as many at a time as one command takes."""
    settlements.sort(key=lambda settlement: settlement.delivery.receipt)
    part: list[Settlement] = []
    size = 0
    for settlement in settlements:
        size += sum(len(message.body) for message in settlement.then)
        if part and (len(part) >= BATCH or size > _COMMAND_BYTES):
            yield part
            part, size = [], sum(len(message.body) for message in settlement.then)
        part.append(settlement)
    yield part


def _first_of_each(settlements: Sequence[Settlement]) -> tuple[list[Settlement], list[Settlement]]:
    """Those whose delivery is settled for the first time in this batch, and the others."""
    seen: set[Any] = set()
    first: list[Settlement] = []
    repeated: list[Settlement] = []
    for settlement in settlements:
        receipt = settlement.delivery.receipt
        (repeated if receipt in seen else first).append(settlement)
        seen.add(receipt)
    return first, repeated
