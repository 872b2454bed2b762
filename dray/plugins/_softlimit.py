"""Soft time limits: raise ``SoftTimeLimitExceeded`` inside a running task, and never outside of it.

Two ways. :class:`SignalLimit` uses ``SIGALRM``: it interrupts blocking calls too, but works on the main thread only.
:class:`ThreadLimit` sets an asynchronous exception from one timer thread: it works on any thread, but the exception
is only raised when the thread next runs Python code.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any, TypeVar

from dray.core.clock import Clock
from dray.core.errors import SoftTimeLimitExceeded

RETRY_S = 0.001
"""How soon a limit that came at a bad moment is tried again."""

T = TypeVar("T")

_set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_async_exception.argtypes = (ctypes.c_ulong, ctypes.py_object)
_clear_async_exception = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)


class SignalLimit:
    """The soft limit of the task that runs on the main thread.

    ``guarded`` are the pool's own functions through which a task begins and ends: an alarm that interrupts one of them
    is put off, so that it is either raised inside the task or, when the task has ended meanwhile, never. Python runs
    signal handlers between bytecodes of this same thread, so nothing here needs a lock.
    """

    def __init__(self, *guarded: Callable[..., Any]) -> None:
        own: tuple[Any, ...] = (SignalLimit.arm, SignalLimit.disarm, *guarded)
        self._guarded = frozenset(each.__code__ for each in own if isinstance(each, FunctionType))
        self._message = ""
        self._held = False
        self._previous: Any = None
        self.armed = False

    def arm(self, task: str, soft_s: float) -> None:
        """Raise in ``soft_s`` seconds. Takes ``SIGALRM`` over from whoever had it."""
        self._message = f"the soft time limit of {soft_s:g} s of {task} is over"
        previous = signal.signal(signal.SIGALRM, self._fire)
        if self._previous is None:
            self._previous = previous
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, max(soft_s, RETRY_S))  # 0 would switch it off

    def disarm(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def shield(self, call: Callable[[T], None], argument: T) -> None:
        """Do this for the task without being cut in two."""
        self._held = True
        try:
            call(argument)
        finally:
            self._held = False

    def close(self) -> None:
        """Give ``SIGALRM`` back."""
        if self._previous is not None:
            signal.signal(signal.SIGALRM, self._previous)
            self._previous = None

    def _fire(self, _signum: int, frame: FrameType | None) -> None:
        if not self.armed:
            return
        if self._held or (frame is not None and frame.f_code in self._guarded):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
            return
        self.armed = False
        raise SoftTimeLimitExceeded(self._message)


class ThreadLimit:
    """The soft limit of the task that runs on one thread of many; that thread arms and disarms it.

    The lock makes "is it still due?" and "raise it" one step for the timer, and "is over" one step for the thread: once
    :meth:`disarm` has returned, nothing is pending any more. An exception that strikes in the moment before is
    swallowed there, or, before ``disarm`` runs its first instruction, raised out of it.
    """

    def __init__(self, alarms: ThreadAlarms) -> None:
        self._alarms = alarms
        self._ident = 0
        self._lock = threading.Lock()
        self._turn = 0
        self._fired = False
        self._held = False
        self.armed = False

    def arm(self, task: str, soft_s: float) -> None:
        """Raise in ``soft_s`` seconds."""
        del task  # an asynchronous exception carries no text
        with self._lock:
            self._ident = threading.get_ident()
            self._turn += 1
            self._fired = self._held = False
            self.armed = True
        self._alarms.add(self, self._turn, soft_s)

    def disarm(self) -> None:
        while self.armed:
            try:
                with self._lock:
                    if self._fired:
                        _clear_async_exception(self._ident, None)
                    self.armed = False
            except SoftTimeLimitExceeded:
                continue

    def shield(self, call: Callable[[T], None], argument: T) -> None:
        """Do this for the task without being cut in two."""
        with self._lock:  # an exception that is pending already is raised when this block is left
            self._held = True
        try:
            call(argument)
        finally:
            self._held = False

    def close(self) -> None:
        """There is nothing to give back."""

    def fire(self, turn: int) -> bool:
        """Raise it if it is still due; False: a bad moment, come again. Called by the timer."""
        with self._lock:
            if not self.armed or self._turn != turn or self._fired:
                return True
            if self._held:
                return False
            self._fired = True
            _set_async_exception(self._ident, SoftTimeLimitExceeded)
            return True


class ThreadAlarms:
    """The timer of a pool's :class:`ThreadLimit` objects: one thread, made when the first limit is armed.

    It keeps one due time per limit, the latest: what was disarmed costs nothing and is simply overwritten.
    """

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock = clock
        self._name = name
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._due: dict[ThreadLimit, tuple[float, int]] = {}
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, limit: ThreadLimit, turn: int, after_s: float) -> None:
        due = self.clock.monotonic() + after_s
        with self._lock:
            if self._closed:
                return
            self._due[limit] = (due, turn)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.set()

    def close(self) -> None:
        """End the timer thread. Idempotent."""
        with self._lock:
            self._closed = True
            self._due.clear()
            self._changed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                self._changed.clear()
                now = self.clock.monotonic()
                ripe = [(limit, turn) for limit, (due, turn) in self._due.items() if due <= now]
                for limit, _ in ripe:
                    del self._due[limit]
                self._wakes_at = min((due for due, _ in self._due.values()), default=now + 3600.0)
            for limit, turn in ripe:
                if not limit.fire(turn):
                    self.add(limit, turn, RETRY_S)
            if not ripe:
                self.clock.wait(self._changed, self._wakes_at - now)
