"""What the instances of the memory transport share: queues, leases, dead letters, tombstones."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from dray.core.message import DeadLetter, Delivery, Outgoing

LEVELS = 10
_Entry = tuple[Outgoing, int, float]
"""A waiting message: itself, how often it was handed out, when it became ready (epoch seconds)."""


class Lease(NamedTuple):
    """A message that was handed out."""

    message: Outgoing
    deliveries: int
    until: float


class Waiter(Protocol):
    """A consumer that waits."""

    queues: tuple[str, ...]

    def poke(self) -> None:
        """Something may be there: look again. Never blocks."""
        ...


class Listener:
    """Hears one channel: a thread of its own calls ``deliver``, so that who says something never waits for it."""

    def __init__(self, channel: str, deliver: Callable[[bytes], None], logger: logging.Logger) -> None:
        self.channel = channel
        self._deliver = deliver
        self._logger = logger
        self._heard: SimpleQueue[bytes | None] = SimpleQueue()
        threading.Thread(target=self._run, name="dray-broadcast", daemon=True).start()

    def hear(self, payload: bytes | None) -> None:
        """Pass this on soon; None: the end."""
        self._heard.put(payload)

    def _run(self) -> None:
        while (payload := self._heard.get()) is not None:
            try:
                self._deliver(payload)
            except Exception:
                self._logger.exception("a listener to the channel %r failed", self.channel)


class Queue:
    """One queue: ready messages by priority, delayed ones by due time."""

    __slots__ = ("delayed", "levels")

    def __init__(self) -> None:
        self.levels: tuple[deque[_Entry], ...] = tuple(deque() for _ in range(LEVELS))
        """Highest priority first."""
        self.delayed: list[tuple[float, int, Outgoing, int]] = []
        """A heap of due time, number, message, delivery count."""

    def promote(self, now: float) -> None:
        while self.delayed and self.delayed[0][0] <= now:
            due, _, message, count = heapq.heappop(self.delayed)
            self.levels[LEVELS - 1 - message.priority].append((message, count, due))

    def waiting(self) -> Iterator[Outgoing]:
        for level in self.levels:
            for message, _, _ in level:
                yield message
        for _, _, message, _ in sorted(self.delayed, key=lambda item: item[:2]):
            yield message

    def hasten(self, ids: Collection[str], now: float) -> bool:
        """Make delayed messages with these ids due; False if there are none."""
        hastened = [(min(item[0], now), *item[1:]) if item[2].id in ids else item for item in self.delayed]
        if hastened == self.delayed:
            return False
        self.delayed = hastened
        heapq.heapify(self.delayed)
        return True


class MemoryStore:
    """What the instances of :class:`MemoryTransport` that share it see. Every method needs ``lock`` held.

    - ready messages in one deque per queue and priority, delayed ones in one heap per queue
    - leases by receipt; an expired one goes back to the front of its queue when somebody next asks for messages
    - dead letters, tombstones, and the consumers that wait
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.queues: dict[str, Queue] = {}
        self.leases: dict[int, Lease] = {}
        self.dead: dict[int, DeadLetter] = {}
        """Dead letters in the order they died."""
        self.waiters: set[Waiter] = set()
        self.listeners: set[Listener] = set()
        self._numbers = itertools.count(1)
        self._first_expiry = math.inf
        """No lease ends before this: the leases are looked through only after it, so that a claim stays cheap."""
        self._marks: dict[str, tuple[str, float]] = {}
        self._mark_expiries: list[tuple[float, str]] = []

    def queue(self, name: str) -> Queue:
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue()
        return queue

    def put(self, messages: Iterable[Outgoing], now: float) -> None:
        """Add new messages at the end of their queues, and poke who waits for them."""
        touched: dict[str, Queue] = {}
        for message in messages:
            name = message.queue
            queue = touched.get(name)
            if queue is None:
                queue = touched[name] = self.queue(name)
            if message.not_before is None or message.not_before <= now:
                queue.levels[LEVELS - 1 - message.priority].append((message, 0, now))
            else:
                heapq.heappush(queue.delayed, (message.not_before, next(self._numbers), message, 0))
        if self.waiters:
            self.poke(touched)

    def give_back(self, leases: Sequence[Lease], now: float, taken_back: int) -> None:
        """Put leased messages back to the front of their queues, in the order given."""
        for message, count, _ in reversed(leases):
            level = self.queue(message.queue).levels[LEVELS - 1 - message.priority]
            level.appendleft((message, count - taken_back, now))
        if self.waiters:
            self.poke({lease.message.queue for lease in leases})

    def poke(self, queues: Iterable[str]) -> None:
        names = set(queues)
        for waiter in [waiter for waiter in self.waiters if not names.isdisjoint(waiter.queues)]:
            self.waiters.discard(waiter)
            waiter.poke()

    def claim(self, queues: Sequence[str], limit: int, now: float, lease_s: float) -> list[Delivery]:
        self._expire(now)
        until = now + lease_s
        self._first_expiry = min(self._first_expiry, until)
        found: list[Delivery] = []
        leases, numbers = self.leases, self._numbers
        for name in queues:
            queue = self.queues.get(name)
            if queue is None:
                continue
            if queue.delayed:
                queue.promote(now)
            for level in queue.levels:
                while level:
                    if len(found) == limit:
                        return found
                    message, count, _ = level.popleft()
                    receipt = next(numbers)
                    leases[receipt] = Lease(message, count + 1, until)
                    found.append(Delivery(*message[:4], receipt, count + 1, until))
        return found

    def extend(self, receipt: int, until: float) -> bool:
        lease = self.leases.get(receipt)
        if lease is None:
            return False
        self.leases[receipt] = lease._replace(until=until)
        self._first_expiry = min(self._first_expiry, until)
        return True

    def next_event_at(self, queues: Iterable[str]) -> float:
        """When something may become ready by itself: a delayed message, or a lease that ends."""
        delayed = (self.queues[name].delayed for name in queues if name in self.queues)
        return min([self._first_expiry, *(heap[0][0] for heap in delayed if heap)])

    def bury(self, marks: Mapping[str, str], expires_at: float, now: float) -> None:
        while self._mark_expiries and self._mark_expiries[0][0] <= now:
            _, old = heapq.heappop(self._mark_expiries)
            if old in self._marks and self._marks[old][1] <= now:
                del self._marks[old]
        for key, mark in marks.items():
            self._marks[key] = (mark, expires_at)
            heapq.heappush(self._mark_expiries, (expires_at, key))

    def hasten(self, ids: Collection[str], now: float) -> None:
        self.poke({name for name, queue in self.queues.items() if queue.hasten(ids, now)})

    def buried(self, ids: Iterable[str], now: float) -> dict[str, str]:
        known = ((key, self._marks[key]) for key in ids if key in self._marks)
        return {key: mark for key, (mark, expires_at) in known if expires_at > now}

    def exhume(self, ids: Iterable[str]) -> None:
        for key in ids:
            self._marks.pop(key, None)

    def _expire(self, now: float) -> None:
        if now < self._first_expiry:
            return
        ended = [receipt for receipt, lease in self.leases.items() if lease.until <= now]
        self.give_back([self.leases.pop(receipt) for receipt in ended], now, 0)
        self._first_expiry = min((lease.until for lease in self.leases.values()), default=math.inf)
