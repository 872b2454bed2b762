"""The transport that keeps everything in this process: for tests, for programs of one process, and as the reference."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from dray.core.contracts import Consumer, Durability, PluginContext, Seconds, Transport, TransportFeatures
from dray.core.errors import ConfigError, TooLarge, Unavailable
from dray.core.message import Action, DeadLetter, Delivery, Outgoing, QueueStats, Settlement
from dray.plugins._memory import LEVELS, Lease, Listener, MemoryStore, Queue

HEADERS_BYTES = 2**16
"""More than the headers of a message ever have."""


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """The options of the memory transport."""

    lease: Seconds = 30.0
    """How long a delivery is guarded; the worker renews it while the task runs."""


class MemoryTransport(Transport):
    """Keeps messages in this process; the guarantees of the bigger transports, but lost with the process.

    - guards each operation on its store by one lock; a consumer waits outside it
    - instances made with the same ``store`` see the same queues
    """

    api = 1
    Options = MemoryOptions
    features = TransportFeatures(
        durability=Durability.D0,
        lease_s=30.0,
        max_delay_s=math.inf,
        priorities=LEVELS,
        atomic_then=True,
        dead_letter=True,
        release=True,
        max_body_bytes=2**24,
        shared=False,
        hastens=True,
    )

    def __init__(self, options: MemoryOptions, context: PluginContext, store: MemoryStore | None = None) -> None:
        super().__init__(options, context)
        if options.lease <= 0:
            raise ConfigError(f"memory: lease must be more than 0 seconds, not {options.lease:g}")
        self.features = replace(self.features, lease_s=options.lease)
        self.store = store or MemoryStore()
        self._listeners: list[Listener] = []
        self._closed = False

    def open(self) -> None:
        self._closed = False

    def close(self) -> None:
        self._closed = True
        for listener in self._listeners[:]:
            self._stop(listener)

    def declare(self, queues: Sequence[str]) -> None:
        with self.opened().lock:
            for name in queues:
                self.store.queue(name)

    def send(self, messages: Sequence[Outgoing]) -> None:
        self._check_sizes(messages)
        store = self.opened()
        with store.lock:
            store.put(messages, self.context.clock.time())

    def consumer(self, queues: Sequence[str], buffer: int) -> MemoryConsumer:
        del buffer  # nothing is ever held unclaimed
        return MemoryConsumer(self, self.opened(), queues)

    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        follow_ups = [message for settlement in settlements for message in settlement.then]
        self._check_sizes(follow_ups)
        store, now = self.opened(), self.context.clock.time()
        lost: list[Delivery] = []
        released: list[Lease] = []
        with store.lock:
            for delivery, action, then, reason in settlements:
                lease = store.leases.pop(delivery.receipt, None)
                if lease is None:
                    lost.append(delivery)
                    continue
                if then:
                    store.put(then, now)
                if action is Action.RELEASE:
                    released.append(lease)
                elif action is Action.DEAD:
                    message, count, _ = lease
                    letter = DeadLetter(
                        message.id, message.queue, message.body, message.headers, reason or "", now, count
                    )
                    store.dead[delivery.receipt] = letter
            if released:
                store.give_back(released, now, 1)
        return lost

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        store, until = self.opened(), self.context.clock.time() + lease_s
        with store.lock:
            return [delivery for delivery in deliveries if not store.extend(delivery.receipt, until)]

    # --- Inspectable ---------------------------------------------------------------------------------------

    def queues(self) -> list[str]:
        store = self.opened()
        with store.lock:
            return sorted({*store.queues, *(letter.queue for letter in store.dead.values())})

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        store, now = self.opened(), self.context.clock.time()
        with store.lock:
            leased = Counter(lease.message.queue for lease in store.leases.values())
            dead = Counter(letter.queue for letter in store.dead.values())
            found: dict[str, QueueStats] = {}
            for name in queues:
                queue = store.queues.get(name) or Queue()
                queue.promote(now)
                ready = sum(map(len, queue.levels))
                oldest = min((level[0][2] for level in queue.levels if level), default=now)
                age_s = now - oldest if ready else None
                found[name] = QueueStats(ready, leased[name], len(queue.delayed), dead[name], age_s)
            return found

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        store = self.opened()
        with store.lock:
            if queue not in store.queues:
                return []
            store.queues[queue].promote(self.context.clock.time())
            return list(itertools.islice(store.queues[queue].waiting(), limit))

    def purge(self, queue: str) -> int:
        store = self.opened()
        with store.lock:
            if queue not in store.queues:
                return 0
            count = sum(1 for _ in store.queues[queue].waiting())
            store.queues[queue] = Queue()
            return count

    # --- DeadLetters ---------------------------------------------------------------------------------------

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        store = self.opened()
        with store.lock:
            newest = (letter for letter in reversed(store.dead.values()) if queue in {None, letter.queue})
            return list(itertools.islice(newest, limit))

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        store, wanted = self.opened(), set(ids)
        with store.lock:
            return [letter for letter in store.dead.values() if letter.id in wanted]

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        with self.opened().lock:
            dead, wanted = self.store.dead, set(ids)
            return [dead.pop(number).id for number, letter in list(dead.items()) if letter.id in wanted]

    # --- Tombstones ----------------------------------------------------------------------------------------

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        store = self.opened()
        with store.lock:
            store.bury(marks, expires_at, self.context.clock.time())
            if hasten:
                store.hasten(marks, self.context.clock.time())

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        store = self.opened()
        with store.lock:
            return store.buried(ids, self.context.clock.time())

    def exhume(self, ids: Sequence[str]) -> None:
        with self.opened().lock:
            self.store.exhume(ids)

    # --- Broadcaster ---------------------------------------------------------------------------------------

    def broadcast(self, channel: str, payload: bytes) -> None:
        store = self.opened()
        with store.lock:
            for listener in store.listeners:
                if listener.channel == channel:
                    listener.hear(payload)

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        store = self.opened()
        listener = Listener(channel, deliver, self.context.logger)
        with store.lock:
            store.listeners.add(listener)
            self._listeners.append(listener)
        return lambda: self._stop(listener)

    def _stop(self, listener: Listener) -> None:
        with self.store.lock:
            if listener in self.store.listeners:
                self.store.listeners.remove(listener)
                self._listeners.remove(listener)
                listener.hear(None)

    def opened(self) -> MemoryStore:
        """The store; raises ``Unavailable`` after ``close``."""
        if self._closed:
            raise Unavailable("the memory transport is closed: open() it again")
        return self.store

    def _check_sizes(self, messages: Iterable[Outgoing]) -> None:
        limit = self.features.max_body_bytes
        for message in messages:
            if len(message.body) < limit - HEADERS_BYTES:
                continue  # headers are small: adding them up for each message would cost more than storing it
            size = len(message.body) + sum(map(len, message.headers)) + sum(map(len, message.headers.values()))
            if size > limit:
                raise TooLarge(
                    f"message {message.id} for queue {message.queue!r}: {size:,} bytes of body and headers, the memory"
                    f" transport takes {limit:,}. Store large data elsewhere and pass a reference to it."
                )


class MemoryConsumer(Consumer):
    """Takes messages from a :class:`MemoryStore`.

    It waits on a ``SimpleQueue``, whose ``put`` is reentrant: ``wake`` is safe in a signal handler, where taking the
    lock of a ``Condition`` or of an ``Event`` could deadlock with the code that the signal interrupted.
    """

    def __init__(self, transport: MemoryTransport, store: MemoryStore, queues: Sequence[str]) -> None:
        self.queues = tuple(dict.fromkeys(queues))
        self._transport = transport
        self._store = store
        self._clock = transport.context.clock
        self._pokes: SimpleQueue[None] = SimpleQueue()
        self._woken = False

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            found, ready_in_s = self._claim_or_register(limit, left_s > 0)
            if found or left_s <= 0 or self._woken:
                self._woken = False
                return found
            try:
                self._pokes.get(timeout=min(left_s, ready_in_s))
            except Empty:
                pass

    def _claim_or_register(self, limit: int, patient: bool) -> tuple[list[Delivery], float]:
        """Claim; with nothing there become a waiter under the same lock, so that no message slips between the two."""
        store, now = self._transport.opened(), self._clock.time()
        with store.lock:
            store.waiters.discard(self)
            found = store.claim(self.queues, limit, now, self._transport.options.lease)
            if found or not patient:
                return found, 0.0
            store.waiters.add(self)
            # The millisecond keeps a clock that rounds down from making this a busy loop.
            return found, max(store.next_event_at(self.queues) - now, 0.0) + 0.001

    def poke(self) -> None:
        """Something is there: look again."""
        if self._pokes.empty():
            self._pokes.put(None)

    def wake(self) -> None:
        self._woken = True
        self.poke()

    def close(self) -> None:
        with self._store.lock:
            self._store.waiters.discard(self)
