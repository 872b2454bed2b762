"""Virtual time and strict turns: a simulation's threads, of which exactly one runs at any moment.

Real code cannot be suspended in the middle by a generator, so each simulated thread (a *fiber*) is a thread of the
system that holds a baton or waits for it. Who gets the baton next, and when, is decided by the seed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

EPOCH = 1_800_000_000.0
"""What the wall clock of a simulated world shows when it begins."""
NEVER = float("inf")
STEPS_MAX = 400_000
"""More turns than any history needs: a world that spins is stopped."""


class Killed(BaseException):
    """Unwinds a fiber whose process is dead. What it does on its way out has no effect on the world."""


class Process:
    """A simulated process: its fibers live and die together."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.dead = False
        self.paused_until = 0.0
        self.troubled_at = -NEVER
        """When something last kept it, rightly, from renewing its leases."""
        self.failed_at = -NEVER
        """When a request of it failed last."""
        self.blind_at = -NEVER
        """When it last could not look for revocations."""
        self.on_death: Callable[[], None] = lambda: None
        """Called once when it is killed, or has ended."""
        self.fibers: list[Fiber] = []

    def check(self) -> None:
        """Raises :class:`Killed` in a fiber of a dead process."""
        if self.dead:
            raise Killed


class Fiber:
    """A simulated thread."""

    __slots__ = ("done", "joiners", "name", "process", "slot", "thread", "ticket", "turn")

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = f"{process.name}/{name}"
        self.turn = threading.Lock()
        self.turn.acquire()
        self.ticket = 0
        self.done = False
        self.joiners: list[Fiber] = []
        self.thread: threading.Thread | None = None
        self.slot: Any = None
        """The slot of the pool that runs a task here."""


class Kernel:
    """Owns time, randomness and turns of one simulated world.

    The thread that makes it is the world's own fiber, which always has an appointment, so that there is always a next.
    """

    def __init__(self, seed: int, keep_trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.world = Process("world", seed)
        self.current = Fiber(self.world, "main")
        self.trace: list[str] | None = [] if keep_trace else None
        self.failures: list[str] = []
        self._heap: list[tuple[float, float, int, Fiber]] = []
        self._tickets = 0
        self._fibers: list[Fiber] = []
        self._hash = hashlib.blake2b(digest_size=12)

    # --- what happened -------------------------------------------------------------------------------------

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        line = f"{self.now:.4f} {self.current.name} {what}"
        self._hash.update(line.encode())
        if self.trace is not None:
            self.trace.append(line)

    @property
    def digest(self) -> str:
        """Stands for the whole trace."""
        return self._hash.hexdigest()

    # --- processes and fibers ------------------------------------------------------------------------------

    def process(self, name: str) -> Process:
        return Process(name, self.random.getrandbits(32))

    def spawn(self, process: Process, name: str, run: Callable[[], object]) -> Fiber:
        """A new fiber of ``process``; its first turn comes like any other."""
        fiber = Fiber(process, name)
        fiber.thread = threading.Thread(target=self._live, args=(fiber, run), name=fiber.name, daemon=True)
        process.fibers.append(fiber)
        self._fibers.append(fiber)
        fiber.thread.start()
        self.wake(fiber)
        return fiber

    def kill(self, process: Process) -> None:
        """SIGKILL: none of its fibers takes another step. Raises :class:`Killed` if it is the caller's own."""
        process.dead = True
        for fiber in process.fibers:
            if fiber is not self.current:
                self.wake(fiber)
        self.current.process.check()

    def _live(self, fiber: Fiber, run: Callable[[], object]) -> None:
        fiber.turn.acquire()
        try:
            fiber.process.check()
            run()
        except Killed:
            pass
        except BaseException as error:
            self.failures.append(f"{fiber.name} ended with {error!r}")
        fiber.done = True
        fiber.process.fibers.remove(fiber)
        for joiner in fiber.joiners:
            self.wake(joiner)
        self._hand_over(self._next())

    # --- time and turns ------------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Let others have their turns for so long."""
        self.pause(self.now + seconds)

    def pause(self, until: float = NEVER) -> None:
        """Give the baton away until that time, or until somebody wakes this fiber. Raises :class:`Killed`."""
        me = self.current
        self._appoint(me, until)
        following = self._next()
        if following is not me:
            self._hand_over(following)
            me.turn.acquire()
        if me.process.dead:
            raise Killed

    def wake(self, fiber: Fiber) -> None:
        """Its next turn comes now (or when its process is continued)."""
        if not fiber.done:
            self._appoint(fiber, self.now)

    def _appoint(self, fiber: Fiber, when: float) -> None:
        self._tickets += 1
        fiber.ticket = self._tickets
        if when < NEVER:
            heapq.heappush(self._heap, (when, self.random.random(), self._tickets, fiber))

    def _next(self) -> Fiber:
        self.steps += 1
        while True:
            when, _, ticket, fiber = heapq.heappop(self._heap)
            if ticket != fiber.ticket or fiber.done:
                continue  # it was woken before, has another appointment, or has ended
            process = fiber.process
            if process.paused_until > when and not process.dead:
                self._appoint(fiber, process.paused_until)
                continue
            self.now = max(self.now, when)
            if self.steps > STEPS_MAX and fiber.process is not self.world and not process.dead:
                continue  # it spins: only the world goes on, to its end
            return fiber

    def _hand_over(self, fiber: Fiber) -> None:
        self.current = fiber
        fiber.turn.release()

    def close(self) -> None:
        """End all fibers and their threads."""
        for fiber in self._fibers:
            if not fiber.done and fiber.process is not self.world:
                fiber.process.dead = True
        self.world.dead = True  # only helpers still look at it: the world's main fiber does not pause any more
        while left := [fiber for fiber in self._fibers if not fiber.done]:
            for fiber in left:
                self.wake(fiber)
            with contextlib.suppress(Killed):
                self.pause(self.now)
        for fiber in self._fibers:
            assert fiber.thread is not None
            fiber.thread.join()


class VirtualClock:
    """The kernel's time as a :class:`dray.core.clock.Clock`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def time(self) -> float:
        return EPOCH + self._kernel.now

    def monotonic(self) -> float:
        return self._kernel.now

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """``event`` is one of the simulation's own: its ``wait`` passes virtual time."""
        return event.wait(timeout_s)


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Keep this thread, and those it starts, on one processor: handing the baton over costs a quarter then."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[os.getpid() % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
