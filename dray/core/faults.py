"""Named failpoints: a test arms one and something goes wrong exactly there.

They sit at the steps that a task passes. Unarmed there is no ``Faults`` object at all, and a step costs one
``is not None``. Armed through ``DRAY_FAILPOINTS`` they reach every process of a worker::

    DRAY_FAILPOINTS="stored=kill@3;confirmed=raise"     # the third time a result was stored: SIGKILL to ourselves

Actions: ``raise`` (an ``Unavailable``), ``uncertain`` (an ``Uncertain``), ``kill`` (SIGKILL), ``stop`` (SIGSTOP),
``exit`` (``os._exit(70)``). ``@N`` is the N-th hit in that process (default 1). With ``DRAY_FAILPOINTS_LOG`` set to a
path, each fault that fires appends a line ``name action pid``, so that a test can assert that it did.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from dray.core.errors import ConfigError, Unavailable, Uncertain

POINTS = (
    "before_publish",
    "confirmed",
    "received",
    "handed_over",
    "running",
    "encoded",
    "stored",
    "follow_ups_sent",
    "acknowledged",
    "draining",
)
ACTIONS = ("raise", "uncertain", "kill", "stop", "exit")


class Faults:
    """Armed failpoints. ``hit`` may be called from any thread."""

    def __init__(self, plan: Mapping[str, tuple[str, int]], log: str | None = None) -> None:
        self._plan = dict(plan)
        self._hits = dict.fromkeys(self._plan, 0)
        self._log = log
        self.callbacks: dict[str, Callable[[], None]] = {}
        """For tests in one process: called at each hit of the point of this name."""

    @classmethod
    def parse(cls, text: str, log: str | None = None) -> Faults:
        """``point=action[@n]`` items separated by ``;``."""
        plan: dict[str, tuple[str, int]] = {}
        for item in filter(None, (part.strip() for part in text.split(";"))):
            name, _, rest = item.partition("=")
            action, _, nth = rest.partition("@")
            if name not in POINTS or action not in ACTIONS or (nth and not nth.isdigit()):
                raise ConfigError(
                    f"DRAY_FAILPOINTS: {item!r} is not point=action[@n]; points: {', '.join(POINTS)}; "
                    f"actions: {', '.join(ACTIONS)}"
                )
            plan[name] = (action, int(nth or 1))
        return cls(plan, log)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Faults | None:
        """The faults that ``DRAY_FAILPOINTS`` arms, None when it is not set."""
        text = environ.get("DRAY_FAILPOINTS")
        return cls.parse(text, environ.get("DRAY_FAILPOINTS_LOG")) if text else None

    def hit(self, name: str) -> None:
        """The step ``name`` is passed: fail here if a fault is armed for this hit."""
        callback = self.callbacks.get(name)
        if callback is not None:
            callback()
        armed = self._plan.get(name)
        if armed is None:
            return
        self._hits[name] += 1
        action, nth = armed
        if self._hits[name] != nth:
            return
        if self._log:
            fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(fd, f"{name} {action} {os.getpid()}\n".encode())
            os.close(fd)
        if action == "raise":
            raise Unavailable(f"failpoint {name}")
        if action == "uncertain":
            raise Uncertain(f"failpoint {name}")
        if action == "exit":
            os._exit(70)
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
