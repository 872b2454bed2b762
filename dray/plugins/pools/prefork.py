"""The ``prefork`` pool: tasks run in child processes, forked from a clean server with the application preloaded."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dray.core.contracts import Executor, PluginContext, Pool, PoolFeatures, Size
from dray.core.errors import ConfigError, DrayError
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.plugins._prefork_child import ChildLoop, Retirement
from dray.plugins._prefork_crew import TICK_S, Crew
from dray.plugins._prefork_link import Link
from dray.plugins._prefork_memory import SlotMemory, shared_memory
from dray.plugins._prefork_server import ForkServer

_LINGER_S = 0.5
"""So long after the last work the pool's thread ticks on; only after that it has to be woken for new work."""
_REAP_S = 10.0


@dataclass(frozen=True, slots=True)
class PreforkOptions:
    """Options of the ``prefork`` pool."""

    size: int | None = None
    """Number of child processes; default: the number of usable CPUs."""
    max_tasks_per_child: int | None = None
    """A child is replaced after so many tasks; default: never."""
    max_memory_per_child: Size | None = None
    """A child whose resident memory is over this after a task is replaced; default: never."""

    def __post_init__(self) -> None:
        for name in ("size", "max_tasks_per_child", "max_memory_per_child"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"prefork: {name} is {value}; it must be at least 1, or be left out")


class PreforkPool(Pool):
    """Runs tasks in ``size`` child processes.

    - ``start`` forks the fork server, which forks the children: call it before this process has threads;
    - one thread here waits for what children and fork server say, and looks after time limits while tasks run; when
      nothing runs it sleeps;
    - ``submit`` hands work over from the caller's own thread when a child is free.

    Soft limits raise ``SoftTimeLimitExceeded`` in the task through ``SIGALRM``, so tasks must leave that signal alone;
    hard limits and ``cancel(kill=True)`` are ``SIGKILL``. A task that forks gets a process that ends when the task
    function returns there. If the fork server is killed, its children die with it and cannot be made again cleanly:
    ``run`` raises, and ``stop`` returns what did not finish.
    """

    api = 1
    Options = PreforkOptions
    features = PoolFeatures(interrupt=True, kill=True)

    def __init__(self, options: PreforkOptions, context: PluginContext) -> None:
        super().__init__(options, context)
        self.capacity = options.size or usable_cpus()
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._numbers = itertools.count(1)
        self._crew: Crew | None = None
        self._failure: DrayError | None = None
        self._over = False
        self._wakes_at = 0.0

    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        self._done, self._report = done, report
        self._monotonic = self.context.clock.monotonic
        self._memory = memory = shared_memory(self.capacity)
        monotonic = self._monotonic
        retirement = Retirement(self.options.max_tasks_per_child, self.options.max_memory_per_child)

        def run_child(slot: int, sock: socket.socket, tokens: int) -> int:
            return ChildLoop(sock, tokens, SlotMemory(memory, slot), executor, monotonic, retirement).run()

        self._server = ForkServer.start(run_child)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._watched: dict[Link, tuple[socket.socket, int]] = {}
        self._active_at = monotonic()
        self._crew = Crew(self.capacity, self._server, memory, executor, monotonic, self.context.logger)
        self._crew.spawn_all()
        self._watch_sockets()
        self._thread = threading.Thread(target=self._work, name=f"dray-pool-{self.context.name}", daemon=True)
        self._thread.start()

    # --- called by the core

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        crew = self._started()
        with self._lock:
            crew.pending.extend(zip(self._numbers, deliveries, strict=False))
            crew.dispatch()
            wake = self._must_wake(crew)
        if wake:
            self._wake()

    def recall(self) -> list[Delivery]:
        if self._crew is None:
            return []
        with self._lock:
            return self._crew.recall()

    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        if self._crew is None:
            return False
        with self._lock:
            cancelled = self._crew.cancel(delivery, kill)
            self._crew.dispatch()
        return cancelled

    def run(self, stopping: threading.Event) -> None:
        while not stopping.wait(1.0):
            if self._failure is not None:
                raise self._failure

    def running(self) -> list[RunningTask]:
        if self._crew is None:
            return []
        with self._lock:
            return self._crew.running() if self._crew is not None else []

    def stop(self, timeout_s: float) -> list[Delivery]:
        crew, thread = self._crew, getattr(self, "_thread", None)
        if crew is None or thread is None:
            return []
        with self._lock:
            crew.close()
            self._quiet.wait_for(lambda: self._over or not crew.is_busy(), timeout_s)
            crew.end()
        thread.join(_REAP_S)
        with self._lock:
            if self._crew is None:
                return []
            self._crew = None
            unfinished = crew.unfinished()
        self._server.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._memory.close()
        return unfinished

    def _started(self) -> Crew:
        if self._crew is None:
            raise DrayError(f"pool {self.context.name} is not running: start() it first, and submit before stop()")
        return self._crew

    # --- the pool's thread

    def _work(self) -> None:
        crew = self._started()
        try:
            self._serve(crew)
        except Exception as error:
            self.context.logger.exception("pool %s failed", self.context.name)
            with self._lock:
                self._fail(f"pool {self.context.name} failed: {type(error).__name__}: {error}; restart the worker")

    def _fail(self, why: str) -> None:
        """It cannot go on: ``run`` raises this, ``stop`` returns the work."""
        self._failure = DrayError(why)
        self._over = True
        self._quiet.notify_all()

    def _serve(self, crew: Crew) -> None:
        ticked_at = 0.0
        while not self._over:
            events = self._selector.select(self._rest(crew))
            heard = [(key.data, key.data.read()) for key, mask in events if key.data and mask & selectors.EVENT_READ]
            with self._lock:
                now = self._monotonic()
                for key, mask in events:
                    if key.data and mask & selectors.EVENT_WRITE:
                        key.data.write()
                for link, frames in heard:
                    crew.take(link, frames)
                if any(key.fileobj is self._server for key, _ in events):
                    self._hear(crew, now)
                if now >= self._wakes_at or now - ticked_at >= TICK_S / 5:
                    crew.tick(now)
                    ticked_at = now
                crew.dispatch()
                self._watch_sockets()
                outcomes, crew.outcomes = crew.outcomes, []
                reports, crew.reports = crew.reports, []
                if outcomes:
                    self._active_at = now
            if any(key.fd == self._wake_read for key, _ in events):
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            self._pass_on(outcomes, reports)
            if crew.closing:
                with self._lock:
                    self._quiet.notify_all()

    def _hear(self, crew: Crew, now: float) -> None:
        """Listen to the fork server."""
        try:
            for message in self._server.messages():
                crew.hear(message, now)
        except EOFError:
            self._over = True
            if not crew.ending:
                self._fail(
                    f"the fork server of pool {self.context.name} (pid {self._server.pid}) died, and its children "
                    "with it; restart the worker"
                )
                self.context.logger.error("%s", self._failure)
            crew.abandon()

    def _rest(self, crew: Crew) -> float | None:
        """How long the thread may sleep."""
        with self._lock:
            now = self._monotonic()
            wait_s = crew.next_look(now)
            if wait_s is None and now - self._active_at < _LINGER_S:
                wait_s = TICK_S
            self._wakes_at = math.inf if wait_s is None else now + wait_s
            return wait_s

    def _must_wake(self, crew: Crew) -> bool:
        """Whether the thread would sleep too long for what was just handed over."""
        now = self._monotonic()
        wait_s = crew.next_look(now)
        return (wait_s is not None and self._wakes_at > now + wait_s) or self._watch_is_stale(crew)

    def _watch_is_stale(self, crew: Crew) -> bool:
        return any(link.interest() != self._watched.get(link, (None, 0))[1] for link in crew.links)

    def _watch_sockets(self) -> None:
        """Let the selector wait for exactly what the links are interested in."""
        links = self._started().links
        for link in links:
            sock, mask = self._watched.get(link, (None, 0))
            if sock is not None and (sock is not link.sock or not link.interest()):
                self._selector.unregister(sock)
                del self._watched[link]
        for link in links:
            mask, new = self._watched.get(link, (None, 0))[1], link.interest()
            if new == mask or link.sock is None:
                continue
            if mask:
                self._selector.modify(link.sock, new, link)
            else:
                self._selector.register(link.sock, new, link)
            self._watched[link] = (link.sock, new)

    def _pass_on(self, outcomes: list[Outcome], reports: list[StoredResult]) -> None:
        try:
            if reports:
                self._report(reports)
            if outcomes:
                self._done(outcomes)
        except Exception:
            self.context.logger.exception("what pool %s reports to the worker was not taken", self.context.name)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is being woken
            os.write(self._wake_write, b"\0")


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
