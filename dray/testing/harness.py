"""What the conformance kits share: how a test names the ability it needs, contexts, threads that tell their errors."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dray.core.clock import Clock
from dray.core.contracts import PluginContext
from dray.testing.clock import FakeClock

PROMPT_S = 5.0
"""What "at once" means to a test that runs on a busy machine."""
CHILD_S = 30.0
"""How long a child process of a test may live."""
ODD_NAMES = [
    "../x",
    "a/b",
    "a//b",
    "/etc/passwd",
    ".",
    "..",
    ".hidden",
    "...",
    "con",
    "NUL.txt",
    "é",
    "e\u0301",
    "日本語",
    "two words",
    " ",
    "a%2Fb",
    "%",
    "A",
    "a",
    "x" * 200,
    "ü" * 100,
    "it's; DROP TABLE messages --",
    'quo"te',
    "a:b",
    "a*?[b]",
    "{a}",
    "-rf",
    "~",
    "tab\there",
    "ready",
    "leased",
    "delayed",
    "dead",
    "waiters",
    "messages",
    "sqlite_master",
    "__init__",
    "queue",
    "None",
    "0",
]
"""Names that a store could take for something else: paths, wildcards, quotes, its own internals."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def needs(*abilities: str) -> Callable[[_Function], _Function]:
    """Mark a test of a kit as one for plugins that declare all of these abilities."""

    def mark(function: _Function) -> _Function:
        function.__dict__["dray_needs"] = abilities
        return function

    return mark


def plugin_context(name: str, clock: Clock | None = None, base: Path | None = None) -> PluginContext:
    """A context to build a plugin with: a fake clock, seeded randomness, ``base`` or the working directory."""
    return PluginContext(
        name=name,
        logger=logging.getLogger(f"dray.{name}"),
        clock=clock or FakeClock(),
        random=random.Random(0),
        base=base or Path.cwd(),
    )


class Background:
    """Runs functions in threads; ``join`` raises what the first of them raised, or that one is still running."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, timeout_s: float = 30.0) -> None:
        for thread in self._threads:
            thread.join(timeout_s)
        if self._errors:
            raise self._errors[0]
        if any(thread.is_alive() for thread in self._threads):
            raise AssertionError(f"a thread of the test still runs after {timeout_s} s")

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:
            self._errors.append(error)


def in_child(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> int:
    """Run ``work`` in a forked child, ``meanwhile`` here; how the child ended: 0, 1 after an exception, -signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what this is about
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        meanwhile()
        deadline = time.monotonic() + CHILD_S
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pid = 0
                return os.waitstatus_to_exitcode(status)
            threading.Event().wait(0.005)
        raise AssertionError(f"the child process still runs after {CHILD_S:g} s")
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
