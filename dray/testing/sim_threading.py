"""The parts of ``threading`` and ``queue`` that the worker uses, on virtual time.

:func:`virtual_threads` puts them in the place of the real ones in the worker's modules, so that the very code that
runs in production, its loops and its shutdown included, runs in a simulated world.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Generic, TypeVar
from unittest.mock import patch

from dray.core import intake, keeper, settler, worker
from dray.testing.sim_kernel import NEVER, Fiber, Kernel

T = TypeVar("T")


class SimEvent:
    """``threading.Event``."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._flag = False
        self._waiting: dict[Fiber, bool] = {}
        """Who waits, and whether it was set since."""

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        for fiber in self._waiting:
            self._waiting[fiber] = True
            self._kernel.wake(fiber)

    def clear(self) -> None:
        self._flag = False

    def wait(self, timeout: float | None = None) -> bool:
        if self._flag:
            return True
        kernel, me = self._kernel, self._kernel.current
        until = NEVER if timeout is None else kernel.now + timeout
        self._waiting[me] = False
        try:
            kernel.pause(until)
        finally:
            was_set = self._waiting.pop(me)
        return was_set


class SimLock:
    """``threading.Lock`` as a context manager."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._held = False
        self._waiting: deque[Fiber] = deque()

    def __enter__(self) -> bool:
        while self._held:
            self._waiting.append(self._kernel.current)
            self._kernel.pause()
        self._held = True
        return True

    def __exit__(self, *_: object) -> None:
        self._held = False
        if self._waiting:
            self._kernel.wake(self._waiting.popleft())


class SimThread:
    """``threading.Thread``: a fiber of the process that starts it."""

    def __init__(
        self,
        kernel: Kernel,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        name: str = "thread",
        daemon: bool = True,
    ) -> None:
        del daemon  # all end with their process
        self._kernel = kernel
        self._run = lambda: target(*args)
        self._name = name
        self._fiber: Fiber | None = None

    def start(self) -> None:
        self._fiber = self._kernel.spawn(self._kernel.current.process, self._name, self._run)

    def is_alive(self) -> bool:
        return self._fiber is not None and not self._fiber.done

    def join(self, timeout: float | None = None) -> None:
        assert self._fiber is not None
        if self._fiber.done:
            return
        me = self._kernel.current
        self._fiber.joiners.append(me)
        try:
            self._kernel.pause(NEVER if timeout is None else self._kernel.now + timeout)
        finally:
            self._fiber.joiners.remove(me)


class SimQueue(Generic[T]):
    """``queue.SimpleQueue`` with one reader."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._items: deque[T] = deque()
        self._reader: Fiber | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._reader is not None:
            self._kernel.wake(self._reader)

    def get(self) -> T:
        while not self._items:
            self._reader = self._kernel.current
            self._kernel.pause()
            self._reader = None
        return self._items.popleft()


@contextlib.contextmanager
def virtual_threads(kernel: Kernel, exited: Callable[[int], None]) -> Iterator[None]:
    """Within it, workers that are made live in ``kernel``'s world; ``exited`` is called for ``os._exit``."""
    threads = SimpleNamespace(
        Event=lambda: SimEvent(kernel),
        Lock=lambda: SimLock(kernel),
        Thread=lambda **options: SimThread(kernel, **options),
    )
    logs = SimpleNamespace(shutdown=lambda: None)
    with contextlib.ExitStack() as stack:
        for module in (intake, keeper, settler, worker):
            stack.enter_context(patch.object(module, "threading", threads))
        stack.enter_context(patch.object(worker, "queue", SimpleNamespace(SimpleQueue=lambda: SimQueue[Any](kernel))))
        stack.enter_context(patch.object(worker, "os", SimpleNamespace(_exit=exited)))
        stack.enter_context(patch.object(worker, "logging", logs))
        yield
