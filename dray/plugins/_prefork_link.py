"""The parent's end of one child."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections import deque
from collections.abc import Sequence

from dray.core.message import Delivery
from dray.plugins._prefork_frames import TOKENS, FrameReader, Item, frame, pack_items, tune
from dray.plugins._prefork_memory import SlotMemory
from dray.plugins._prefork_server import ForkServer

LOOK_AHEAD = 2
"""Batches that a child may have: the one it works on, and the next, so that it never waits for us."""


class Link:
    """One slot and the child in it.

    - hands items over: their tokens first, then the frame; never blocks, keeps what the socket does not take;
    - takes back exactly what has not begun, by taking the tokens out of the pipe again: who reads a token, parent or
      child, owns its item, and the kernel gives each byte to one reader;
    - reads what the child says, and what it left in shared memory.

    Not thread-safe: the pool's lock guards it, but for :meth:`read`, which is the pool thread's alone.
    """

    def __init__(self, slot: int, memory: SlotMemory) -> None:
        self.slot = slot
        self.memory = memory
        self.pid = 0
        self.outstanding: dict[int, Delivery] = {}
        """Handed over and not finished, in order: the last ones are those that have not begun."""
        self.ready = False
        """It may be given items: it has said that it waits, and it does not owe us a "dry"."""
        self.short = False
        """Its last batch was of known, short work: another may wait behind it."""
        self.worked = False
        """It has finished something."""
        self.deaf = False
        """It closed its end, although it may not be dead yet."""
        self.condemned: tuple[int, Exception] | None = None
        """The item for which it is being killed, and the error that says why."""
        self.failures = 0
        """Deaths in a row of children in this slot that had not finished anything."""
        self.respawn_at: float | None = None
        self.sock: socket.socket | None = None
        self._reader: FrameReader | None = None
        self._token_read = self._token_write = -1
        self._generation = 0
        self._outbox: deque[memoryview] = deque()
        self._sent = 0
        self._batch_ends: deque[int] = deque()
        self._log_mark = (0, 0)

    # --- life

    def spawn(self, server: ForkServer) -> None:
        """Have a child forked; it says when it is ready."""
        self.sock, there = socket.socketpair()
        self.sock.setblocking(False)
        tune(self.sock)
        tune(there)
        self._reader = FrameReader(self.sock)
        self._token_read, self._token_write = os.pipe()
        os.set_blocking(self._token_read, False)  # the child's end is the same open file: it does not block either
        self.memory.reset()
        self.respawn_at = None
        server.spawn(self.slot, there, self._token_read)
        there.close()

    def close(self) -> None:
        """Forget the child, which is dead or ends by this."""
        if self.sock is not None:
            self.sock.close()
            os.close(self._token_read)
            os.close(self._token_write)
        self.sock = self._reader = None
        self.pid = 0
        self.ready = self.short = self.worked = self.deaf = False
        self.condemned = None
        self._generation = self._sent = 0
        self._outbox.clear()
        self._batch_ends.clear()
        self._log_mark = (0, 0)

    # --- handing over, taking back

    def is_idle(self) -> bool:
        return self.ready and not self.outstanding

    def takes_more(self) -> bool:
        """Whether another batch may wait behind the one it works on."""
        if not self.ready or not self.short or self._outbox:
            return False
        done, ends = self._sent - len(self.outstanding), self._batch_ends
        while ends and ends[0] <= done:
            ends.popleft()
        return len(ends) < LOOK_AHEAD

    def give(self, items: Sequence[Item], short: bool) -> None:
        """Hand these over as one batch."""
        payload = pack_items(items)
        self.outstanding.update(items)
        self._sent += len(items)
        self._batch_ends.append(self._sent)
        self.short = short
        os.write(self._token_write, b"".join([TOKENS[seq & 255] for seq, _ in items]))
        self._send(frame(self._generation, payload))

    def take_back(self) -> list[Item]:
        """What it has not begun, and now never will, in order. It gets nothing new before it has run dry."""
        if self.sock is None or not self.outstanding:
            return []
        try:
            count = len(os.read(self._token_read, 65536))
        except BlockingIOError:
            return []
        items = [self.outstanding.popitem() for _ in range(count)]
        items.reverse()
        self._sent -= count
        self._batch_ends.clear()
        self.ready = False
        return items

    def ran_dry(self, generation: int) -> None:
        """It dropped all it had of that generation: the next frames are of a new one."""
        if generation == self._generation:
            self._generation += 1
            self.ready = self.condemned is None  # one that is about to be killed must not begin anything

    # --- the wire

    def interest(self) -> int:
        """What to wait for at its socket."""
        if self.sock is None or self.deaf:
            return 0
        return selectors.EVENT_READ | selectors.EVENT_WRITE if self._outbox else selectors.EVENT_READ

    def write(self) -> None:
        """Send what the socket did not take before."""
        while self._outbox and self.sock is not None:
            try:
                count = self.sock.send(self._outbox[0])
            except BlockingIOError:
                return
            except OSError:  # it is dying: the fork server tells
                self._outbox.clear()
                return
            if count == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][count:]

    def _send(self, data: bytes) -> None:
        self._outbox.append(memoryview(data))
        if len(self._outbox) == 1:
            self.write()

    def read(self) -> list[tuple[int, bytes]]:
        """The frames that are there; never blocks. Sets ``deaf`` when the child closed its end."""
        if self._reader is None:
            return []
        try:
            self.deaf = not self._reader.fill()
        except BlockingIOError:
            pass
        except OSError:
            self.deaf = True
        return list(self._reader.frames())

    def rest(self) -> list[tuple[int, bytes]]:
        """Everything that a dead child had still sent."""
        if self._reader is None:
            return []
        frames = list(self._reader.frames())
        with contextlib.suppress(OSError):
            while self._reader.fill():
                frames += self._reader.frames()
        return frames

    def kept_outcomes(self) -> bytes:
        """Outcomes in shared memory that were not looked at yet."""
        mark = self.memory.log_mark()
        if mark == self._log_mark or not mark[1]:
            return b""
        data = self.memory.finished()
        if data:
            self._log_mark = mark
        return data
