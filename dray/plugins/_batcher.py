"""How pools inside the worker's process pass outcomes on: in batches under load, at once otherwise."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from logging import Logger

from dray.core.clock import Clock
from dray.core.message import Outcome

HOLD_S = 0.001
"""While more work waits, outcomes are passed on this often."""
_WATCH_S = 0.010
_IDLE_TURNS = 20


class Batcher:
    """Collects outcomes and passes them on in order. Any thread.

    An outcome is only held back while more work waits. Should the next task turn out to be a long one, a watching
    thread passes on what is held after 10 ms; it sleeps while nothing is.
    """

    def __init__(self, done: Callable[[Sequence[Outcome]], None], clock: Clock, logger: Logger, name: str) -> None:
        self._done = done
        self._clock = clock
        self._monotonic = clock.monotonic
        self._logger = logger
        self._name = name
        self._held: deque[Outcome] = deque()
        self._passed_at = 0.0
        self._watch = threading.Event()
        self._watched = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()

    def add(self, outcome: Outcome, more: bool) -> None:
        """Pass this on soon if ``more`` work waits, else now."""
        self._held.append(outcome)
        if not more or self._monotonic() - self._passed_at > HOLD_S:
            self.flush()
        elif not self._watched:
            self._wake_watcher()

    def flush(self) -> None:
        """Pass on all that is held."""
        self._passed_at = self._monotonic()
        held = self._held
        batch = []
        try:
            while True:
                batch.append(held.popleft())  # one by one: another thread may add or flush meanwhile
        except IndexError:
            pass
        if not batch:
            return
        try:
            self._done(batch)
        except Exception:
            self._logger.exception("what pool %s reports to the worker was not taken", self._name)

    def close(self) -> None:
        """Pass on what is held and end the watcher. Idempotent."""
        self._closed.set()
        self._watch.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _wake_watcher(self) -> None:
        with self._start:
            self._watched = True
            self._watch.set()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name=f"dray-batcher-{self._name}", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        idle = 0
        while not self._clock.wait(self._closed, _WATCH_S):
            if self._held:
                idle = 0
                if self._monotonic() - self._passed_at > _WATCH_S:
                    self.flush()
                continue
            idle += 1
            if idle > _IDLE_TURNS:
                with self._start:
                    self._watched = False
                    self._watch.clear()
                if not self._held:  # else it was added just before, by someone who saw us awake
                    self._watch.wait()
                idle = 0
