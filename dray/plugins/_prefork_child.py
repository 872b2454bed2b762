"""The loop of one child: read a batch, claim an item, run it, keep its outcome, send outcomes in batches."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dray.core.contracts import Executor
from dray.core.message import Delivery, Outcome, StoredResult
from dray.plugins._escaped import outcome_of_escape
from dray.plugins._prefork_frames import (
    BYE,
    DRY,
    OUTCOMES,
    READY,
    REPORT,
    TOKENS,
    FrameReader,
    frame,
    pack_outcome,
    pack_report,
    unpack_items,
)
from dray.plugins._prefork_memory import RECORD, SlotMemory
from dray.plugins._prefork_server import flush_stdio
from dray.plugins._softlimit import SignalLimit

FLUSH_S = 0.001
"""No finished outcome waits longer than this for the next item to begin."""
EXIT_DESCRIPTORS_LOST = 71
"""Exit status when the child's own descriptors are gone: a task closed them."""
_HIGH_FD = 200  # out of the way of a task that closes, or counts on, low numbers
_MEMORY_CHECK_S = 0.1
_LONG_TASK_S = 0.005


@dataclass(frozen=True, slots=True)
class Retirement:
    """When a child makes room for a fresh one."""

    after_tasks: int | None
    over_bytes: int | None


_NEVER = Retirement(None, None)


class Outlet:
    """The way out: finished outcomes wait in shared memory, where they survive this process, until they are sent."""

    def __init__(self, sock: socket.socket, memory: SlotMemory) -> None:
        self._sock = sock
        self._memory = memory
        self._waiting = False
        self.muted = False
        """True in a process that a task forked: what it says would be taken for our word."""

    def add(self, seq: int, took_s: float, outcome: Outcome) -> None:
        """The current item is finished."""
        data = pack_outcome(outcome)
        if self._memory.finish(seq, took_s, data):
            self._waiting = True
            return
        self.flush()
        if self._memory.finish(seq, took_s, data):
            self._waiting = True
            return
        self._sock.sendall(frame(OUTCOMES, RECORD.pack(len(data), seq, took_s) + data))
        self._memory.unclaim()

    def flush(self) -> None:
        if self._waiting:
            self._sock.sendall(frame(OUTCOMES, self._memory.log()))
            self._memory.empty_log()
            self._waiting = False

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Say something, after all outcomes that came before it."""
        if not self.muted:
            self.flush()
            self._sock.sendall(frame(kind, payload))


class ChildSlot:
    """The slot that the executor talks to."""

    __slots__ = ("_hard", "_limit", "_memory", "_monotonic", "_outlet")

    def __init__(self, memory: SlotMemory, outlet: Outlet, monotonic: Callable[[], float]) -> None:
        self._memory = memory
        self._outlet = outlet
        self._monotonic = monotonic
        self._limit = SignalLimit(ChildSlot.begin, ChildSlot.end)
        self._hard = False

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        if hard_s is not None:
            self._hard = True
            self._memory.set_deadline(self._monotonic() + max(hard_s, 1e-6))  # 0 would mean never
        if soft_s is not None:
            self._limit.arm(task, soft_s)

    def end(self) -> None:
        if self._limit.armed:
            self._limit.disarm()
        if self._hard:
            self._hard = False
            self._memory.set_deadline(0.0)

    def report(self, result: StoredResult) -> None:
        self._limit.shield(self._send_report, pack_report(result))

    def _send_report(self, payload: bytes) -> None:
        self._outlet.send(REPORT, payload)

    def detach(self) -> None:
        """In a process that a task forked: the shared memory and the socket stay its parent's."""
        self._hard = self._limit.armed = False
        self._outlet.muted = True


class ChildLoop:
    """Runs items for as long as the parent sends some.

    Before each item it takes that item's token from the pipe. A missing token means that the parent took back all it
    had not begun: it drops what it holds, and all later frames of that generation, and says that it ran dry.
    """

    def __init__(
        self,
        sock: socket.socket,
        token_fd: int,
        memory: SlotMemory,
        executor: Executor,
        monotonic: Callable[[], float],
        retirement: Retirement,
    ) -> None:
        self._sock = socket.socket(fileno=_move_up(sock.detach()))
        self._token_fd = _move_up(token_fd)
        os.set_blocking(self._token_fd, False)
        self._reader = FrameReader(self._sock)
        self._memory = memory
        self._executor = executor
        self._monotonic = monotonic
        self._outlet = Outlet(self._sock, memory)
        self._slot = ChildSlot(memory, self._outlet, monotonic)
        self._retirement = retirement
        self._memory_checked_at = 0.0
        self._held: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._generation = 0
        self._dry = -1

    def run(self) -> int:
        """Serve until retirement or the end of the parent; the exit status."""
        os.register_at_fork(after_in_child=self._slot.detach)
        self._executor.forked()
        _reseed_numpy()
        self._outlet.send(READY, os.getpid().to_bytes(8, "little"))
        try:
            return self._serve()
        except (BrokenPipeError, ConnectionResetError):  # the parent let go of us
            return 0
        except OSError:
            return EXIT_DESCRIPTORS_LOST

    def _serve(self) -> int:
        monotonic, held, outlet, memory = self._monotonic, self._held, self._outlet, self._memory
        token_fd, run, slot, read, new = self._token_fd, self._executor.run, self._slot, os.read, tuple.__new__
        flushed_at, count, retires = 0.0, 0, self._retirement != _NEVER
        while True:
            if not held:
                outlet.flush()
                if not self._receive():
                    return 0
                flushed_at = monotonic()
                continue
            seq, fields = held.popleft()
            now = monotonic()
            if now - flushed_at > FLUSH_S:
                outlet.flush()
                flushed_at = now
            memory.claim(seq, now)
            try:
                token = read(token_fd, 1)
            except BlockingIOError:
                self._run_dry()
                continue
            if token != TOKENS[seq & 255]:
                return EXIT_DESCRIPTORS_LOST
            delivery = new(Delivery, fields)
            try:
                outcome = run(delivery, slot)
            except BaseException as error:
                slot.end()
                outcome = outcome_of_escape(self._executor, delivery, error)
            if outlet.muted:  # this is a process that the task forked; the task's own goes on elsewhere
                os._exit(0)
            took_s = monotonic() - now
            outlet.add(seq, took_s, outcome)
            count += 1
            if retires and self._should_retire(count, now, took_s):
                outlet.send(BYE)
                return 0

    def _receive(self) -> bool:
        """Wait for the next batch; False: there will be none."""
        while not self._held:
            for generation, payload in self._reader.frames():
                if generation > self._dry:
                    self._generation = generation
                    self._held.extend(unpack_items(payload))
            if not self._held:
                flush_stdio()
                if not self._reader.fill():
                    return False
        return True

    def _run_dry(self) -> None:
        self._memory.unclaim()
        self._held.clear()
        self._dry = self._generation
        self._outlet.send(DRY, self._dry.to_bytes(8, "little"))

    def _should_retire(self, count: int, now: float, took_s: float) -> bool:
        after, over = self._retirement.after_tasks, self._retirement.over_bytes
        if after is not None and count >= after:
            return True
        if over is None or (took_s < _LONG_TASK_S and now - self._memory_checked_at < _MEMORY_CHECK_S):
            return False
        self._memory_checked_at = now
        return resident_bytes() > over


def resident_bytes() -> int:
    """The memory that this process occupies now; where that cannot be read, the most it ever did."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _move_up(fd: int) -> int:
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:  # the limit of descriptors is lower than that
        return fd
    os.close(fd)
    return high


def _reseed_numpy() -> None:
    """``random`` reseeds itself after a fork; numpy's global generator would give every child the same numbers."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        with contextlib.suppress(Exception):
            numpy.random.seed()
