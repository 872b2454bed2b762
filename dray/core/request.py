"""What a running task can know of itself: ``dray.current()``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from dray.core.errors import DrayError


class Request(NamedTuple):
    """The running task's call. One per run; used by that task only."""

    id: str
    task: str
    queue: str
    attempt: int
    """0 at the first run, then the number of retries so far."""
    delivery_count: int
    """How often the message was handed to a worker; over ``attempt + 1`` after a worker was lost."""
    deadline: float | None
    """When the hard time limit ends this run (seconds since the epoch), None without one."""
    headers: Mapping[str, str]
    """The headers that the caller gave."""
    report: Callable[[Mapping[str, Any]], None]
    """Where :meth:`progress` goes."""

    def progress(self, done: float, total: float | None = None, **note: Any) -> None:
        """Tell callers how far this is: they see it as ``result.info`` while it runs.

        ``note`` is plain data. Reports that follow each other within 0.1 s are dropped, the last (``done == total``)
        never is. Costs nothing when no results are kept.
        """
        self.report({"done": done, "total": total, **note})


class Run(Protocol):
    """What runs a task: it makes the request when the task first asks for it, because few do."""

    @property
    def request(self) -> Request: ...


current_run: ContextVar[Run | None] = ContextVar("dray_run", default=None)


def current() -> Request:
    """The call of the task that runs here. Raises ``DrayError`` outside a task."""
    run = current_run.get()
    if run is None:
        raise DrayError("dray.current() is for code that a worker runs; no task runs here")
    return run.request
