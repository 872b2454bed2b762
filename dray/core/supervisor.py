"""Worker processes: signals to warm and cold stop, and several workers kept alive within a restart budget."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from dray.core.worker import EXIT_FAILED, EXIT_WARM, Worker

log = logging.getLogger(__name__)
EXIT_USAGE = 2
"""A mistake in the configuration or the command line: starting again would not help."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LIFELINE = "DRAY_LIFELINE"
"""Environment variable: a file descriptor whose end of file means: stop warm. So does the supervisor's death."""
RESTARTS, RESTARTS_WINDOW_S = 5, 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


def run_with_signals(worker: Worker) -> int:
    """Run a worker on the main thread. First TERM or INT: warm stop; second, or QUIT: cold. Returns its exit code."""
    received = 0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal received
        received += 1 if number != signal.SIGQUIT else 2
        if received == 1:
            log.warning("%s: warm stop; once more to stop at once", signal.Signals(number).name)
            worker.stop()
        else:
            worker.stop_cold()

    previous = {number: signal.signal(number, handle) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
    try:
        return worker.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def watch_lifeline(worker: Worker, environ: Mapping[str, str]) -> None:
    """Stop warm when the supervisor says so, or dies. Call once the worker has forked what it forks (``on_ready``)."""
    if (fd := environ.get(LIFELINE, "")).isdigit():
        threading.Thread(target=_await_end, args=(int(fd), worker), name="dray-lifeline", daemon=True).start()


def _await_end(fd: int, worker: Worker) -> None:
    with contextlib.suppress(OSError):
        while os.read(fd, 1):
            pass
    log.warning("the supervisor stops, or is gone: warm stop")
    worker.stop()


@dataclass(slots=True)
class _Child:
    """One supervised worker process."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    starts: deque[float] = field(default_factory=deque)
    pause_s: float = FIRST_PAUSE_S
    pausing: bool = False


class Supervisor:
    """Keeps one process per worker alive.

    A process that ends by itself is started again, after a pause that doubles; more than five restarts within a minute
    are one worker's end, and with it everybody's. The processes stop warm on TERM or INT, cold on the second, and when
    this process dies.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._children = [_Child(name, command) for name, command in commands.items()]
        self._events: queue.SimpleQueue[_Child | int] = queue.SimpleQueue()
        self._signals = 0
        self._code = EXIT_WARM
        self._lifeline = os.pipe()
        """Held open for as long as the workers are to work."""

    def run(self) -> int:
        """Start all, wait until all have ended; on the main thread. Returns the worst of their exit codes."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _: self._events.put(number))
        for child in self._children:
            self._start(child)
        while any(child.process is not None or child.pausing for child in self._children):
            try:
                event = self._events.get(timeout=1.0)  # a signal that another thread was given is handled in between
            except queue.Empty:
                continue
            if isinstance(event, _Child):
                self._ended(event)
            else:
                self._stop()
        os.close(self._lifeline[0])
        if not self._signals:
            os.close(self._lifeline[1])
        return self._code

    def _start(self, child: _Child) -> None:
        reader = self._lifeline[0]
        child.starts.append(time.monotonic())
        child.process = subprocess.Popen(  # noqa: S603  (our own command line)
            child.command,
            pass_fds=(reader,),
            env={**os.environ, LIFELINE: str(reader)},
            start_new_session=True,  # a terminal's Ctrl-C reaches us only, and we pass on what it means
        )
        log.info("worker %s: pid %d", child.name, child.process.pid)
        threading.Thread(target=self._watch, args=(child, child.process), daemon=True).start()

    def _watch(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._events.put(child)

    def _stop(self) -> None:
        """First warm, by the lifeline: a worker that got the same signal as we must not take it for a second one."""
        self._signals += 1
        if self._signals == 1:
            os.close(self._lifeline[1])
        for child in self._children:
            child.pausing = False
            if child.process is not None and self._signals > 1:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(signal.SIGQUIT)

    def _ended(self, child: _Child) -> None:
        if child.process is None:  # its pause is over; it may have been cut short by a stop
            child.pausing = False
            if not self._signals:
                self._start(child)
            return
        code, child.process = child.process.returncode, None
        if self._signals or code == EXIT_WARM:
            self._code = max(self._code, code if code >= 0 else EXIT_FAILED)
            return
        now = time.monotonic()
        while child.starts and now - child.starts[0] > RESTARTS_WINDOW_S:
            child.starts.popleft()
        if code == EXIT_USAGE or len(child.starts) > RESTARTS:
            log.critical("worker %s ended with code %d and is not started again; all stop", child.name, code)
            self._code = EXIT_USAGE if code == EXIT_USAGE else EXIT_FAILED
            self._stop()
            return
        child.pause_s = FIRST_PAUSE_S if len(child.starts) <= 1 else min(child.pause_s * 2, LONGEST_PAUSE_S)
        log.error("worker %s ended with code %d; started again in %.1f s", child.name, code, child.pause_s)
        timer = threading.Timer(child.pause_s, self._events.put, args=(child,))
        timer.daemon = True
        timer.start()
        child.pausing = True
