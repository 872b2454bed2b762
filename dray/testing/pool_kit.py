"""What the tests of pools need: an executor that does what a delivery's body says, and a started pool around it.

Tests wait for events that tasks and pools cause, through pipes, which work the same between threads and processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dray.core.clock import SystemClock
from dray.core.contracts import PluginContext, Pool, Slot
from dray.core.message import Action, Delivery, Outcome, Settlement, State, StoredResult

PATIENCE_S = 20.0
"""How long the suite waits for what must happen; a pool that works never makes it wait so long."""


def pool_context(name: str) -> PluginContext:
    """A context for a pool under test."""
    return PluginContext(
        name=name, logger=logging.getLogger("dray.pool"), clock=SystemClock(), random=random.Random(1), base=Path.cwd()
    )


def make_delivery(key: str, body: bytes = b"ok", **headers: str) -> Delivery:
    """A delivery whose receipt, an open lock, cannot be copied or sent anywhere."""
    return Delivery("queue", key, body, {"task": "kit", **headers}, threading.Lock())


def make_deliveries(count: int, body: bytes = b"ok", prefix: str = "d") -> list[Delivery]:
    return [make_delivery(f"{prefix}{number}", body) for number in range(count)]


class Pipe:
    """Bytes between tasks and tests."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._rest = b""

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)

    def lines(self, count: int) -> list[str]:
        """The next ``count`` lines."""
        deadline = time.monotonic() + PATIENCE_S
        while self._rest.count(b"\n") < count:
            ready, _, _ = select.select([self.reader], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"only {self._rest.count(10)} of {count} tasks started in {PATIENCE_S:g} s")
            self._rest += os.read(self.reader, 65536)
        *found, self._rest = self._rest.split(b"\n", count)
        return [line.decode() for line in found]

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class KitExecutor:
    """Does what the body says: ``command argument``. Headers ``soft`` and ``hard`` are the limits in seconds.

    ``ok``; ``echo X``; ``gate`` (tell ``started``, wait for a byte of ``gate``); ``spin`` (until something stops it);
    ``work S`` (compute for S seconds); ``wait S`` (sleep; its value is the thread's native id); ``fail``; ``exit`` and
    ``interrupt`` (``SystemExit``, ``KeyboardInterrupt``); ``report N`` (N interim states, then ``ok``).
    """

    def __init__(self) -> None:
        self.gate = Pipe()
        self.started = Pipe()
        self.lost_errors: list[Exception] = []

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        headers = delivery.headers
        soft, hard = headers.get("soft"), headers.get("hard")
        try:
            slot.begin(headers.get("task", ""), soft and float(soft), hard and float(hard))  # type: ignore[arg-type]
            try:
                value = self.perform(delivery, slot)
            finally:
                slot.end()
        except Exception as error:
            return outcome(delivery, State.FAILURE, f"{type(error).__name__}: {error}")
        return outcome(delivery, State.SUCCESS, value)

    def perform(self, delivery: Delivery, slot: Slot) -> str:
        """The user's function."""
        command, _, argument = delivery.body.decode().partition(" ")
        if command == "echo":
            return argument
        if command == "gate":
            self.started.write(delivery.id.encode() + b"\n")
            os.read(self.gate.reader, 1)
        elif command == "wait":
            time.sleep(float(argument))
            return str(threading.get_native_id())
        elif command in {"spin", "work"}:
            end = time.monotonic() + float(argument or PATIENCE_S)
            while time.monotonic() < end:
                pass
        elif command == "fail":
            raise ValueError(argument)
        elif command == "exit":
            raise SystemExit(3)
        elif command == "interrupt":
            raise KeyboardInterrupt
        elif command == "report":
            for number in range(int(argument)):
                slot.report(StoredResult(delivery.id, State.STARTED, str(number).encode(), None))
        return "ok"

    def lost(self, delivery: Delivery, error: Exception) -> Outcome:
        return outcome(delivery, State.FAILURE, f"lost: {type(error).__name__}: {error}")

    def forked(self) -> None:
        """Nothing to drop."""

    def open_gate(self, count: int) -> None:
        """Let ``count`` gated tasks pass."""
        self.gate.write(b"." * count)

    def close(self) -> None:
        self.gate.close()
        self.started.close()


def outcome(delivery: Delivery, state: State, value: str) -> Outcome:
    return Outcome(Settlement(delivery, Action.ACK), StoredResult(delivery.id, state, value.encode(), None))


class PoolHarness:
    """A started pool, its main thread's ``run``, and what it reported."""

    def __init__(self, pool: Pool, executor: KitExecutor) -> None:
        self.pool = pool
        self.executor = executor
        self.outcomes: list[Outcome] = []
        self.reports: list[StoredResult] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        pool.start(executor, self._done, self._report)
        self._runner = threading.Thread(target=pool.run, args=(self._stopping,))
        self._runner.start()

    def _done(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self.outcomes += outcomes
            self._changed.notify_all()

    def _report(self, results: Sequence[StoredResult]) -> None:
        with self._changed:
            self.reports += results
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(until, PATIENCE_S), f"{what}: {len(self.outcomes)} outcomes so far"

    def wait_for(self, count: int) -> list[Outcome]:
        """The outcomes, once there are ``count``."""
        self.wait(lambda: len(self.outcomes) >= count, f"waited for {count} outcomes")
        assert len(self.outcomes) == count
        return self.outcomes

    def run(self, *deliveries: Delivery) -> list[str]:
        """Submit these and return their values, in the same order."""
        before = len(self.outcomes)
        self.pool.submit(deliveries)
        found = self.wait_for(before + len(deliveries))[before:]
        values = {id(each.settlement.delivery): value_of(each) for each in found}
        return [values[id(delivery)] for delivery in deliveries]

    def close(self) -> None:
        self.executor.open_gate(1000)  # threads that wait there cannot be ended otherwise
        self._stopping.set()
        self.pool.stop(PATIENCE_S)
        self._runner.join()


def value_of(each: Outcome) -> str:
    return each.result.body.decode() if each.result is not None else ""


def footprint() -> dict[str, Any]:
    """Open descriptors, threads and child processes of this process."""
    fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    children: list[str] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += task.read_text().split()
    return {"fds": fds, "threads": threading.active_count(), "children": sorted(children)}
