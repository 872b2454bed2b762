"""What the parent knows of a child without asking: one slot's part of the shared memory.

The child writes, the parent reads. There is no lock between them: a value that matters is read again once the child
cannot go on (its tokens are taken back, see ``_prefork_link``) or is dead.
"""

from __future__ import annotations

import mmap
from struct import Struct

LOG_OFFSET = 4096
LOG_BYTES = 65536
SLOT_BYTES = LOG_OFFSET + LOG_BYTES

_LOG = Struct("<QQ")  # turn (counts how often the log was emptied), bytes used
_NOW = Struct("<Qdd")  # current item's sequence number (0: none), begun at, hard deadline (0: none)
_FINISHED = Struct("<QQ")  # bytes used, current item: adjacent, so that one call writes both, in this order
_TURN_AT, _USED_AT, _NOW_AT, _DEADLINE_AT, _END_AT = 0, 8, 16, 32, 40
_DEADLINE = Struct("<d")
RECORD = Struct("<IQd")
"""Before each outcome: bytes of it that follow, sequence number, seconds that it took."""


def shared_memory(slots: int) -> mmap.mmap:
    """Anonymous memory that every process forked from here on shares. Pages cost nothing before they are written."""
    return mmap.mmap(-1, max(slots, 1) * SLOT_BYTES)


class SlotMemory:
    """One slot: what runs in it, and the outcomes that its child has not sent yet."""

    __slots__ = ("_base", "_log", "_memory", "_turn", "_used")

    def __init__(self, memory: mmap.mmap, index: int) -> None:
        self._memory = memory
        self._base = index * SLOT_BYTES
        self._log = self._base + LOG_OFFSET
        self._used = 0
        self._turn = 0

    # --- the child's side

    def claim(self, seq: int, now: float) -> None:
        """About to take the token of this item. Written first, so that there is no moment at which it runs unseen."""
        _NOW.pack_into(self._memory, self._base + _NOW_AT, seq, now, 0.0)

    def unclaim(self) -> None:
        _NOW.pack_into(self._memory, self._base + _NOW_AT, 0, 0.0, 0.0)

    def set_deadline(self, deadline: float) -> None:
        """When the parent kills the child (monotonic seconds); 0: never."""
        _DEADLINE.pack_into(self._memory, self._base + _DEADLINE_AT, deadline)

    def finish(self, seq: int, took_s: float, outcome: bytes) -> bool:
        """Keep the outcome of the current item, which thereby is finished; False: no room."""
        size, at = len(outcome), self._log + self._used
        end = self._used + RECORD.size + size
        if end > LOG_BYTES:
            return False
        RECORD.pack_into(self._memory, at, size, seq, took_s)
        if size:
            self._memory[at + RECORD.size : self._log + end] = outcome
        self._used = end
        _FINISHED.pack_into(self._memory, self._base + _USED_AT, end, 0)
        return True

    def log(self) -> bytes:
        """The outcomes kept."""
        return self._memory[self._log : self._log + self._used]

    def empty_log(self) -> None:
        self._turn += 1
        self._used = 0
        _LOG.pack_into(self._memory, self._base + _TURN_AT, self._turn, 0)

    # --- the parent's side

    def reset(self) -> None:
        """For a new child."""
        self._memory[self._base : self._base + _END_AT] = bytes(_END_AT)

    def current(self) -> tuple[int, float, float]:
        """Sequence number of the current item (0: none), when it began, its hard deadline (0: none)."""
        seq, began, deadline = _NOW.unpack_from(self._memory, self._base + _NOW_AT)
        return seq, began, deadline

    def log_mark(self) -> tuple[int, int]:
        """Changes whenever the log does."""
        turn, used = _LOG.unpack_from(self._memory, self._base + _TURN_AT)
        return turn, used

    def finished(self) -> bytes:
        """The outcomes that the child keeps; empty when it is just sending them (they are on their way then)."""
        turn, used = self.log_mark()
        data = self._memory[self._log : self._log + min(used, LOG_BYTES)]
        return data if self.log_mark()[0] == turn else b""
