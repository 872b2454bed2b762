"""The transport that keeps each message in a file of its own: no server, any POSIX folder, shared ones included."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dray.core import wire
from dray.core.contracts import Consumer, Durability, PluginContext, Seconds, Transport, TransportFeatures
from dray.core.errors import ConfigError, SendError, TooLarge, Unavailable, Uncertain
from dray.core.message import Action, DeadLetter, Delivery, Outgoing, QueueStats, Settlement
from dray.plugins import _folder_admin as admin
from dray.plugins._filesystem import (
    Sleeper,
    enclose,
    folder,
    listed,
    mapped,
    poke,
    remove_dead_sleepers,
    unique,
    write_whole,
)
from dray.plugins._folder_queue import LEVELS, FolderQueue, Name, microseconds
from dray.plugins._folder_reader import FolderReader

POLL_S = 1.0
"""How often to look for what other machines sent: their pokes don't reach this one."""
HOUSEKEEPING_S = 600.0
LEFTOVER_S = 86400.0
"""A temporary file this old was left by a process that died."""


class FilesystemTransport(Transport):
    """Keeps messages as files; every change of owner is one rename.

    - writes a message whole, then renames it to where consumers look
    - on settlement publishes ``then`` first and removes the delivery second: a crash in between repeats, never loses
    - wakes sleeping consumers of this machine; those of others look once a second
    - keeps tombstones and dead letters, and removes what expired of them as it goes
    """

    api: ClassVar[int] = 1

    features = TransportFeatures(
        durability=Durability.D2,
        lease_s=30.0,
        max_delay_s=math.inf,
        priorities=LEVELS,
        dead_letter=True,
        release=True,
        max_body_bytes=2**24,
        hastens=True,
    )

    @dataclass(frozen=True, slots=True)
    class Options:
        """One of ``url`` and ``path``, or neither: ``.dray/queue``."""

        url: str | None = None
        """``filesystem:///dir`` or ``file:///dir``."""
        path: str | None = None
        """A path instead of a URL; relative to the configuration\'s folder."""
        lease: Seconds = 30.0
        """How long a delivery is guarded; the worker renews it while the task runs."""
        fsync: bool = False
        """Survive power loss, at the price of a disk flush for each message."""
        dead_expires: Seconds = 30 * 86400.0
        """How long dead letters are kept."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        if options.lease <= 0:
            raise ConfigError(f"filesystem: lease must be more than 0 seconds, not {options.lease:g}")
        durability = Durability.D3 if options.fsync else Durability.D2
        self.features = replace(self.features, durability=durability, lease_s=options.lease)
        self.root = folder(options.url, options.path or ".dray/queue", context.base)
        self._temporary = self.root / "tmp"
        self._waiters = self.root / "waiters"
        self._tombstones = admin.Tombstones(self.root / "tombstones", self._write_temporary)
        self._queues: dict[str, FolderQueue] = {}
        self._consumers: set[FilesystemConsumer] = set()
        self._lock = threading.Lock()
        self._housekeeping_at = -math.inf
        self._is_open = False

    # --- life ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        if self._is_open:
            return
        with mapped("cannot open the queue folder", self.root):
            for part in (self._temporary, self._waiters, self.root / "queues"):
                part.mkdir(parents=True, exist_ok=True)
            os.unlink(self._write_temporary(b"probe"))
            remove_dead_sleepers(self._waiters)
            self._remove_leftovers()
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        with self._lock:
            consumers = list(self._consumers)
        for consumer in consumers:
            consumer.wake()
            consumer.close()

    @contextlib.contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """Around each use of the folder: says ``Unavailable`` when closed, or when the folder fails."""
        if not self._is_open:
            raise Unavailable(f"the filesystem transport on {self.root} is closed: open() it first")
        with mapped(doing, self.root):
            yield

    def declare(self, queues: Sequence[str]) -> None:
        with self.working("cannot make queues"):
            for name in queues:
                self.queue(name)

    def queue(self, name: str) -> FolderQueue:
        """The folder of a queue, made if need be."""
        queue = self._queues.get(name)
        if queue is None:
            queue = FolderQueue(self.root, name, self.options.fsync)
            queue.create()
            self._queues[name] = queue
        return queue

    # --- messages ------------------------------------------------------------------------------------------

    def send(self, messages: Sequence[Outgoing]) -> None:
        self._check_sizes(messages)
        with self.working("cannot send"):
            self._publish(messages)

    def _publish(self, messages: Sequence[Outgoing]) -> None:
        now = self.context.clock.time()
        written: list[tuple[FolderQueue, Name, str]] = []
        placed = 0
        try:
            for message in messages:
                queue = self.queue(message.queue)
                written.append((queue, Name.new(message, now), self._write_message(message)))
            for queue, name, path in written:
                queue.place(path, name)
                placed += 1
        except OSError as error:
            for _, _, path in written[placed:]:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            if placed:
                text = f"{placed} of {len(messages)} messages were stored in {self.root}, then: {error}"
                raise SendError(text, messages[placed:]) from error
            raise
        if self.options.fsync:
            self._flush({(queue, name.folder) for queue, name, _ in written})
        soon = microseconds(now + 2 * POLL_S)
        poke(self._waiters, {queue.queue for queue, name, _ in written if name.time <= soon})

    def _flush(self, folders: set[tuple[FolderQueue, str]]) -> None:
        try:
            for queue, name in folders:
                queue.flush(name)
        except OSError as error:
            raise Uncertain(f"messages were stored in {self.root}, but maybe not on its disk: {error}") from error

    def _write_message(self, message: Outgoing) -> str:
        inner = wire.pack(message.headers, message.body)
        return self._write_temporary(enclose({"id": message.id, "queue": message.queue}, inner))

    def _write_temporary(self, data: bytes) -> str:
        path = f"{self._temporary}/{microseconds(self.context.clock.time()):016x}-{unique()}"
        write_whole(path, data, self.options.fsync)
        return path

    def consumer(self, queues: Sequence[str], buffer: int) -> FilesystemConsumer:
        del buffer  # nothing is ever held unclaimed
        with self.working("cannot make queues"):
            readers = [FolderReader(self.queue(name), self.options.fsync) for name in dict.fromkeys(queues)]
        consumer = FilesystemConsumer(self, readers, Sleeper(self._waiters, queues))
        with self._lock:
            self._consumers.add(consumer)
        return consumer

    def forget(self, consumer: FilesystemConsumer) -> None:
        with self._lock:
            self._consumers.discard(consumer)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        self._check_sizes([message for settlement in settlements for message in settlement.then])
        with self.working("cannot settle"):
            lost = [settlement.delivery for settlement in settlements if not self._settle(settlement)]
            released = {item.delivery.queue for item in settlements if item.action is Action.RELEASE}
            if released:
                poke(self._waiters, released)
            return lost

    def _settle(self, settlement: Settlement) -> bool:
        delivery, action, then, reason = settlement
        receipt, now = delivery.receipt, self.context.clock.time()
        if then and not receipt.has_sent_then:
            # A fresh lease first: it proves that the delivery is ours, and that nobody takes it while `then` is sent.
            if not receipt.queue.extend(receipt, now + self.options.lease):
                return False
            self._publish(then)
            receipt.has_sent_then = True  # if the rest fails the same settlement comes again
            if self.context.faults is not None:
                self.context.faults.hit("follow_ups_sent")
        if action is Action.ACK:
            return bool(receipt.queue.acknowledge(receipt))
        if action is Action.RELEASE:
            return bool(receipt.queue.release(receipt))
        self._forget_expired_dead(now)
        return bool(receipt.queue.die(receipt.path, receipt.name, reason or "", now))

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        with self.working("cannot extend leases"):
            until = self.context.clock.time() + lease_s
            return [item for item in deliveries if not item.receipt.queue.extend(item.receipt, until)]

    def _check_sizes(self, messages: Sequence[Outgoing]) -> None:
        limit = self.features.max_body_bytes
        for message in messages:
            size = len(message.body) + sum(
                len(text.encode(errors="surrogatepass")) for pair in message.headers.items() for text in pair
            )
            if size > limit:
                raise TooLarge(
                    f"message {message.id} for queue {message.queue!r}: {size:,} bytes of body and headers, the"
                    f" filesystem transport takes {limit:,}. Store large data elsewhere and pass a reference to it."
                )

    # --- Inspectable ---------------------------------------------------------------------------------------

    def queues(self) -> list[str]:
        with self.working("cannot list queues"):
            return admin.queue_names(self.root)

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        now = self.context.clock.time()
        with self.working("cannot look into queues"):
            return {name: admin.stats(self._existing(name), now) for name in queues}

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        with self.working("cannot look into queues"):
            return admin.peek(self._existing(queue), limit, self.context.clock.time())

    def purge(self, queue: str) -> int:
        with self.working("cannot purge"):
            source = self._existing(queue)
            return sum(source.remove(name) for name in source.waiting())

    def _existing(self, queue: str) -> FolderQueue:
        """The folder of a queue, not made by looking into it."""
        return FolderQueue(self.root, queue, self.options.fsync)

    def _all_queues(self) -> list[FolderQueue]:
        return [self._existing(name) for name in admin.queue_names(self.root)]

    # --- DeadLetters ---------------------------------------------------------------------------------------

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        with self.working("cannot list dead letters"):
            return admin.dead_list(self._all_queues() if queue is None else [self._existing(queue)], limit)

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        with self.working("cannot read dead letters"):
            return [letter for letter, _, _, _ in admin.dead(self._all_queues(), ids)]

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        with self.working("cannot purge dead letters"):
            found = admin.dead(self._all_queues(), ids)
            return [letter.id for letter, source, entry, _ in found if source.forget(entry)]

    # --- Tombstones ----------------------------------------------------------------------------------------

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        with self.working("cannot write tombstones"):
            self._tombstones.write(marks, expires_at, self.context.clock.time())
            if marks and hasten:
                poke(self._waiters, admin.hasten(self._all_queues(), list(marks), self.context.clock.time()))

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        with self.working("cannot read tombstones"):
            return self._tombstones.read(ids, self.context.clock.time())

    def exhume(self, ids: Sequence[str]) -> None:
        with self.working("cannot remove tombstones"):
            self._tombstones.remove(ids)

    # --- housekeeping --------------------------------------------------------------------------------------

    def _forget_expired_dead(self, now: float) -> None:
        """Remove expired dead letters now and then."""
        if now < self._housekeeping_at:
            return
        self._housekeeping_at = now + HOUSEKEEPING_S
        for queue in self._all_queues():
            queue.forget_dead_before(now - self.options.dead_expires)

    def _remove_leftovers(self) -> None:
        limit = f"{microseconds(self.context.clock.time() - LEFTOVER_S):016x}"
        for name in listed(str(self._temporary)):
            if name < limit:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary / name)


class FilesystemConsumer(Consumer):
    """Claims from some queues in turn; between two looks it sleeps until poked."""

    def __init__(self, transport: FilesystemTransport, readers: Sequence[FolderReader], sleeper: Sleeper) -> None:
        self._transport = transport
        self._readers = readers
        self._sleeper = sleeper
        self._busy = threading.Lock()
        self._woken = False

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        with self._busy, self._transport.working("cannot receive"):
            found = self._claim(limit)
            while not found and not self._woken and time.monotonic() < deadline:
                found = self._sleep_then_claim(limit, deadline)
            self._woken = False
            return found

    def _sleep_then_claim(self, limit: int, deadline: float) -> list[Delivery]:
        self._sleeper.show()
        try:
            found = self._claim(limit)  # what came before others could see that we sleep
            if not found and not self._woken:
                due_s = min(reader.next_due for reader in self._readers) - self._transport.context.clock.time()
                # The millisecond keeps a clock that rounds down from making this a busy loop.
                self._sleeper.sleep(min(deadline - time.monotonic(), POLL_S, max(due_s, 0.0) + 0.001))
        finally:
            self._sleeper.hide()
        return found or self._claim(limit)

    def _claim(self, limit: int) -> list[Delivery]:
        now, lease_s = self._transport.context.clock.time(), self._transport.options.lease
        found: list[Delivery] = []
        for reader in self._readers:
            found += reader.claim(limit - len(found), now, lease_s)
        return found

    def wake(self) -> None:
        self._woken = True
        self._sleeper.wake()

    def close(self) -> None:
        self._transport.forget(self)
        if self._busy.acquire(timeout=2):
            try:
                self._sleeper.close()
            finally:
                self._busy.release()
