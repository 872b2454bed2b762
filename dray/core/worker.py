"""One worker's life: the threads around its steps, start, warm stop, cold stop."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence

from dray.core.errors import ConfigError, TransportError
from dray.core.intake import RECEIVE_S, Intake
from dray.core.keeper import Keeper
from dray.core.message import Outcome, StoredResult
from dray.core.parts import WorkerParts
from dray.core.settler import NOTHING_TO_DO

log = logging.getLogger(__name__)
FLUSH_S = 10.0
EXIT_WARM, EXIT_FAILED, EXIT_COLD = 0, 1, 3
"""Exit codes: stopped in order; the worker itself failed; stopped cold, running tasks were given back."""


class Worker:
    """Runs the tasks of some queues in one pool until it is told to stop.

    Responsibilities: the threads (intake, settler, keeper, orders) around steps that do not know them; starting in the
    order that forks before it threads; stopping so that nothing is lost and nothing runs twice.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._intake = Intake(parts)
        self._keeper = Keeper(parts, self._intake)
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._settled_all = threading.Event()
        self._idle = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> int:
        """Work until :meth:`stop`; on the main thread, for solo tasks and signals. Returns an exit code."""
        parts = self._parts
        parts.pool.start(parts.executor, self._done, self._report)
        try:
            parts.transport.open()
            self._check_durability()
            parts.backend.open()
            parts.transport.declare(list(parts.queues))
        except BaseException:
            parts.pool.stop(0)
            raise
        threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"dray-{loop.__name__[1:-5]}", daemon=True)
            for loop in (self._intake_loop, self._settler_loop, self._keeper_loop, self._orders_loop)
        ]
        for thread in threads:
            thread.start()
        if parts.hooks.worker_started is not None:
            parts.hooks.worker_started(worker=parts.name, queues=list(parts.queues))
        parts.on_ready()
        patience_s = parts.shutdown_timeout_s
        try:
            parts.pool.run(self._stopping)
        except Exception as error:
            log.critical("the pool failed: %s", error)
            self._failure, patience_s = error, 0.0
            self._warm()
        self._shut_down(threads, patience_s)
        return EXIT_FAILED if self._failure is not None else EXIT_WARM

    @property
    def parts(self) -> WorkerParts:
        """What it is made of."""
        return self._parts

    def stop(self) -> None:
        """Warm stop: take nothing more, give back what has not begun, finish what runs. Any thread or handler."""
        self._orders.put(self._warm)

    def stop_cold(self) -> None:
        """End at once: what runs is ended and given back; the process exits with ``EXIT_COLD``. As :meth:`stop`."""
        self._orders.put(self._cold)

    # --- the loops -----------------------------------------------------------------------------------------

    def _intake_loop(self) -> None:
        pause_s, intake, clock = 0.05, self._intake, self._parts.clock
        while not self._stopping.is_set():
            intake.room.clear()
            try:
                if not intake.step():
                    intake.room.wait(1.0)
                pause_s = 0.05
            except TransportError as error:
                log.warning("receiving failed, trying again in %.1f s: %s", pause_s, error)
                intake.disconnect()
                if self._parts.transport.features.lease_s is None:
                    self._keeper.recall()  # what has not begun is likely to be handed out to others already
                clock.wait(self._stopping, pause_s * self._parts.random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, 5.0)
        intake.disconnect()

    def _settler_loop(self) -> None:
        settler = self._parts.settler
        while not self._settled_all.is_set():
            pause_s = settler.step()
            self._intake.look()  # it may wait for a backlog to shrink
            if pause_s == NOTHING_TO_DO:
                settler.wake.wait(1.0)
            elif pause_s > 0:
                self._parts.clock.wait(self._settled_all, pause_s)

    def _keeper_loop(self) -> None:
        while not self._parts.clock.wait(self._settled_all, self._keeper.pause_s):
            try:
                self._keeper.step()
            except TransportError as error:
                log.warning("keeping leases: %s", error)

    def _orders_loop(self) -> None:
        """Obeys: on its own thread, because a signal handler must take no lock, and a task may hold the main one."""
        while (order := self._orders.get()) is not None:
            order()

    def _guard(self, loop: Callable[[], None]) -> None:
        """A loop that dies takes the worker down in order: a supervisor starts another, leases bring the work back."""
        try:
            loop()
        except BaseException as error:
            log.critical("the worker's %s failed", loop.__name__, exc_info=True)
            self._failure = error
            self._warm()

    def _check_durability(self) -> None:
        required, features = self._parts.require_durability, self._parts.transport.features
        if required is not None and features.durability < required:
            raise ConfigError(
                f"require_durability is {required.name}, and the transport {self._parts.transport.context.name!r} "
                f"keeps {features.durability.name} as it is set up here"
            )

    # --- pieces --------------------------------------------------------------------------------------------

    def _done(self, outcomes: Sequence[Outcome]) -> None:
        self._parts.settler.collect(outcomes)
        self._intake.done(len(outcomes))
        if self._stopping.is_set() and self._intake.held <= 0:
            self._idle.set()

    def _report(self, results: Sequence[StoredResult]) -> None:
        self._parts.settler.report(results)

    def _shut_down(self, threads: list[threading.Thread], patience_s: float) -> None:
        parts = self._parts
        intake, settler, *_ = threads
        if parts.hooks.worker_stopping is not None:
            parts.hooks.worker_stopping(worker=parts.name)
        intake.join(RECEIVE_S + 5)
        self._keeper.recall()
        if parts.faults is not None:
            parts.faults.hit("draining")
        self._idle.clear()  # the last step of the intake may have begun another one since it was set
        if self._intake.held > 0:
            running = parts.pool.running()
            log.info("stopping: up to %.0f s for %d running tasks", patience_s, len(running))
            self._idle.wait(patience_s)
        parts.settler.give_back(parts.pool.stop(0))
        self._flush(settler)
        if parts.hooks.worker_stopped is not None:
            parts.hooks.worker_stopped(worker=parts.name)

    def _flush(self, thread: threading.Thread) -> None:
        """Settle what is left, then end the settler's and the keeper's thread."""
        clock, settler = self._parts.clock, self._parts.settler
        deadline, nobody = clock.monotonic() + FLUSH_S, threading.Event()
        while settler.backlog and thread.is_alive() and clock.monotonic() < deadline:
            clock.wait(nobody, 0.005)
        self._settled_all.set()
        settler.wake.set()
        thread.join(FLUSH_S)
        self._orders.put(None)
        if settler.backlog:
            log.error("%d outcomes could not be settled; their tasks run again when their leases end", settler.backlog)

    def _warm(self) -> None:
        self._stopping.set()
        self._intake.wake()

    def _cold(self) -> None:
        parts = self._parts
        self._warm()
        unfinished = parts.pool.stop(0)
        log.warning("cold stop: %d running tasks are given back", len(unfinished))
        parts.settler.give_back(unfinished)
        deadline, nobody = parts.clock.monotonic() + FLUSH_S, threading.Event()
        while parts.settler.backlog and parts.clock.monotonic() < deadline:
            parts.clock.wait(nobody, 0.005)
        with contextlib.suppress(Exception):
            parts.transport.close()  # others need not find out that we are gone
        logging.shutdown()
        os._exit(EXIT_COLD)
