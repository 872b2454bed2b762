"""Who does what: the children of a prefork pool and the work between them. All of it under the pool's lock."""

from __future__ import annotations

import logging
import mmap
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable

from dray.core.contracts import Executor
from dray.core.errors import TaskRevoked, TimeLimitExceeded, WorkerLost
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult, acknowledged
from dray.plugins._prefork_frames import BYE, DRY, OUTCOMES, READY, REPORT, Item, records, unpack_outcome, unpack_report
from dray.plugins._prefork_link import Link
from dray.plugins._prefork_memory import SlotMemory
from dray.plugins._prefork_pace import BATCH_S, Pace
from dray.plugins._prefork_server import DIED, NOT_SPAWNED, ForkServer, Message

BATCH_ITEMS = 250
BATCH_BYTES = 1 << 20
STUCK_S = 0.010
"""A child that is this long at one item keeps nothing else to itself: neither items nor outcomes."""
TICK_S = 0.050
"""How often running tasks are compared with their time limits."""
_BACKOFF_S, _BACKOFF_MAX_S = 0.1, 5.0
_BACKOFF_BUSY_MAX_S = 0.5
"""The bound where a task did it: the child itself comes up well, and others wait for it."""


class Crew:
    """The children and the work.

    - splits what is pending fairly among idle children, in batches bounded by the time they take;
    - moves what waits behind a long task to others;
    - enforces hard limits, replaces dead children with back-off, charges exactly the item that ran;
    - collects outcomes and reports for the pool to pass on.
    """

    def __init__(
        self,
        size: int,
        server: ForkServer,
        memory: mmap.mmap,
        executor: Executor,
        monotonic: Callable[[], float],
        logger: logging.Logger,
    ) -> None:
        self.links = [Link(slot, SlotMemory(memory, slot)) for slot in range(size)]
        self.pending: deque[Item] = deque()
        self.outcomes: list[Outcome] = []
        self.reports: list[StoredResult] = []
        self.closing = False
        """Nothing is handed over any more, no child is replaced."""
        self.ending = False
        """The children are being killed."""
        self._server = server
        self._executor = executor
        self._monotonic = monotonic
        self._logger = logger
        self._pace = Pace()

    # --- work out

    def dispatch(self) -> None:
        """Hand pending items over, as far as the children should have some."""
        pending = self.pending
        if not pending or self.closing:
            return
        idle = [link for link in self.links if link.is_idle()]
        for waiting, link in zip(range(len(idle), 0, -1), idle, strict=True):
            link.give(*self._batch(-(-len(pending) // waiting), ahead=False))
            if not pending:
                return
        busy = [link for link in self.links if link.takes_more()]
        for waiting, link in zip(range(len(busy), 0, -1), busy, strict=True):
            items, short = self._batch(-(-len(pending) // waiting), ahead=True)
            if items:
                link.give(items, short)

    def _batch(self, share: int, ahead: bool) -> tuple[list[Item], bool]:
        """The next items, and whether they are known to be short; ``ahead``: only such."""
        items: list[Item] = []
        pending, expect = self.pending, self._pace.expect
        left_s, left_bytes = BATCH_S, BATCH_BYTES
        for _ in range(min(share, BATCH_ITEMS, len(pending))):
            delivery = pending[0][1]
            expected_s = expect(delivery.headers)
            size = len(delivery.body)
            if (items or ahead) and (expected_s >= left_s or size > left_bytes):
                break
            items.append(pending.popleft())
            left_s -= expected_s
            left_bytes -= size
        return items, left_s > 0

    def _put_back(self, items: Iterable[Item]) -> None:
        self.pending.extendleft(reversed(list(items)))

    def recall(self) -> list[Delivery]:
        """Everything that has not begun, in the order it came."""
        items = list(self.pending)
        self.pending.clear()
        for link in self.links:
            items += link.take_back()
        items.sort(key=lambda item: item[0])
        return [delivery for _, delivery in items]

    def cancel(self, delivery: Delivery, kill: bool) -> bool:
        for at, (_, waiting) in enumerate(self.pending):
            if waiting is delivery:
                del self.pending[at]
                return True
        for link in self.links:
            seq = next((seq for seq, given in link.outstanding.items() if given is delivery), None)
            if seq is not None:
                return self._cancel_given(link, seq, delivery, kill)
        return False

    def _cancel_given(self, link: Link, seq: int, delivery: Delivery, kill: bool) -> bool:
        items = link.take_back()
        self._put_back(item for item in items if item[0] != seq)
        if any(item[0] == seq for item in items):
            return True
        return kill and self._kill(link, seq, TaskRevoked(f"task {delivery.id} was revoked while it ran"))

    def _kill(self, link: Link, seq: int, error: Exception) -> bool:
        """End the child because of this item; False: it is not at this item (any more).

        Once the tokens are taken back the child cannot begin another: if it is at this item still, it dies at it or
        after it, and no other is hit.
        """
        self._put_back(link.take_back())
        if seq not in link.outstanding or link.memory.current()[0] != seq:
            return False
        link.ready = False
        link.condemned = (seq, error)
        self._server.kill(link.slot)
        return True

    # --- work in

    def take(self, link: Link, frames: Iterable[tuple[int, bytes]]) -> None:
        """What a child said."""
        for kind, payload in frames:
            if kind == OUTCOMES:
                self._finish(link, payload)
            elif kind == REPORT:
                self.reports.append(unpack_report(payload))
            elif kind == READY:
                link.pid = int.from_bytes(payload, "little")
                link.ready = True
            elif kind == DRY:
                link.ran_dry(int.from_bytes(payload, "little"))
            elif kind == BYE:
                link.ready = False
                link.worked = True
        if link.deaf:
            link.ready = False
            self._put_back(link.take_back())

    def _finish(self, link: Link, data: bytes) -> None:
        outstanding, note, outcomes = link.outstanding, self._pace.note, self.outcomes
        for seq, took_s, packed in records(data):
            delivery = outstanding.pop(seq, None)
            if delivery is not None:  # else it was read from shared memory before
                note(delivery.headers, took_s)
                outcomes.append(unpack_outcome(delivery, packed) if packed else acknowledged(delivery))
        link.worked = True

    # --- time

    def tick(self, now: float) -> None:
        """Look after running tasks and vacant slots."""
        for link in self.links:
            if link.outstanding:
                self._watch(link, now)
            elif link.respawn_at is not None and link.respawn_at <= now and not self.closing:
                link.spawn(self._server)
        self.dispatch()

    def _watch(self, link: Link, now: float) -> None:
        seq, began, deadline = link.memory.current()
        delivery = link.outstanding.get(seq)
        if delivery is None or link.condemned is not None:
            return
        if deadline and now >= deadline and link.memory.current() == (seq, began, deadline):
            error = TimeLimitExceeded(
                f"task {delivery.id} was killed after {now - began:.3g} s: its hard time limit was over"
            )
            self._kill(link, seq, error)
        elif now - began > STUCK_S:
            if data := link.kept_outcomes():
                self._finish(link, data)
            if len(link.outstanding) > 1:
                self._put_back(link.take_back())

    def next_look(self, now: float) -> float | None:
        """Seconds until :meth:`tick` has something to do; None: nothing will be."""
        wait_s: float | None = None
        for link in self.links:
            if link.outstanding:
                due_s = STUCK_S if len(link.outstanding) > 1 else TICK_S
            elif link.respawn_at is not None:
                due_s = max(link.respawn_at - now, 0.0)
            else:
                continue
            wait_s = due_s if wait_s is None else min(wait_s, due_s)
        return wait_s

    # --- life and death

    def spawn_all(self) -> None:
        for link in self.links:
            link.spawn(self._server)

    def hear(self, message: Message, now: float) -> None:
        """What the fork server said."""
        link = self.links[message.slot]
        if message.what == NOT_SPAWNED:
            self._logger.error("cannot fork a child (errno %d); trying again", message.status)
            self._vacate(link, now, worked=False, busy=False)
        elif message.what == DIED:
            self._bury(link, message, now)

    def _bury(self, link: Link, message: Message, now: float) -> None:
        """A child died: keep what it finished, charge the item that ran, move the others."""
        self._salvage(link)
        how = describe_exit(message.status)
        busy = bool(link.outstanding)
        if message.status and link.condemned is None and not self.ending:
            lost = ", ".join(delivery.id for delivery in link.outstanding.values())
            self._logger.warning("child %d died: %s; task lost: %s", message.pid, how, lost or "none")
        for seq, delivery in list(link.outstanding.items()):  # one at most
            if link.condemned is not None and link.condemned[0] == seq:
                error = link.condemned[1]
            elif self.ending:  # we killed it: stop() returns the item
                continue
            else:
                task = delivery.headers.get("task", "")
                error = WorkerLost(f"the process that ran {task} (task {delivery.id}) died: {how}, pid {message.pid}")
            del link.outstanding[seq]
            self.outcomes.append(self._executor.lost(delivery, error))
        self._vacate(link, now, worked=link.worked or link.condemned is not None, busy=busy)

    def _salvage(self, link: Link) -> None:
        """Take from a dead child all that it finished and all that it did not begin."""
        self.take(link, link.rest())
        if data := link.kept_outcomes():
            self._finish(link, data)
        self._put_back(link.take_back())

    def _vacate(self, link: Link, now: float, worked: bool, busy: bool) -> None:
        """Empty the slot and say when it is filled again."""
        link.close()
        if worked:
            link.failures = 0
        pause_s = 0.0
        if link.failures:
            longest_s = _BACKOFF_BUSY_MAX_S if busy else _BACKOFF_MAX_S
            pause_s = min(_BACKOFF_S * 2.0 ** min(link.failures - 1, 16), longest_s)
        link.failures += 1
        link.respawn_at = now + pause_s

    def running(self) -> list[RunningTask]:
        found = []
        for link in self.links:
            seq, began, _ = link.memory.current()
            delivery = link.outstanding.get(seq)
            if delivery is not None:
                task = delivery.headers.get("task", "")
                found.append(RunningTask(delivery.id, task, began, link.pid))
        return found

    def is_busy(self) -> bool:
        return any(link.outstanding for link in self.links)

    # --- the end

    def close(self) -> None:
        """Let what runs run, begin nothing more."""
        self.closing = True
        for link in self.links:
            self._put_back(link.take_back())

    def end(self) -> None:
        """Kill what still runs."""
        self.closing = self.ending = True
        self._server.end()

    def abandon(self) -> None:
        """The fork server died, and its children with it: keep what they finished."""
        self.close()
        self.ending = True
        for link in self.links:
            if link.sock is not None:
                self._salvage(link)
                link.close()

    def unfinished(self) -> list[Delivery]:
        """Take all that is left, in the order it came."""
        items = list(self.pending)
        self.pending.clear()
        for link in self.links:
            items += link.outstanding.items()
            link.outstanding.clear()
            link.close()
        items.sort(key=lambda item: item[0])
        return [delivery for _, delivery in items]


def describe_exit(status: int) -> str:
    """A wait status for people: ``signal 11 (SIGSEGV)`` or ``exit code 3``."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
