"""Hooks: what others may listen to. Specified with pluggy; free when nobody listens.

A hook plugin is an object with methods of the names in :class:`Specification`, each marked with :data:`hookimpl`; a
method takes those of the arguments that it wants, by name. Hooks observe; one that fails is logged, the others are
still called, and no task fails by it. They run where the thing happens: on the caller's thread (``enqueue``), in the
slot that runs the task (``task_started`` to ``task_retried``; in a process pool that is a child process), or in the
worker (the rest). So they have to be quick.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, overload

from dray.core.errors import ConfigError

if TYPE_CHECKING:
    import pluggy

F = TypeVar("F", bound=Callable[..., object])
Hook = Callable[..., None]

_PROJECT = "dray"

_log = logging.getLogger(__name__)


@overload
def hookimpl(function: F) -> F: ...
@overload
def hookimpl(*, tryfirst: bool = ..., trylast: bool = ...) -> Callable[[F], F]: ...
def hookimpl(function: F | None = None, *, tryfirst: bool = False, trylast: bool = False) -> F | Callable[[F], F]:
    """Marks a method as the implementation of the hook of its name."""
    import pluggy  # here, so that the marker costs those who mark nothing no import

    marker = pluggy.HookimplMarker(_PROJECT)
    return marker(function, tryfirst=tryfirst, trylast=trylast)


class Specification:
    """Every hook and its arguments. Times in seconds; ``attempt`` counts from 0 and rises with each retry."""

    def enqueue(self, task: str, id: str, queue: str, headers: dict[str, str], not_before: float | None) -> None:  # noqa: A002
        """A task is about to be sent. What a hook puts into ``headers`` travels with it (tracing)."""

    def task_received(self, task: str, id: str, queue: str, attempt: int, delivery_count: int) -> None:  # noqa: A002
        """The worker got a delivery."""

    def task_started(self, task: str, id: str, queue: str, attempt: int, headers: dict[str, str]) -> None:  # noqa: A002
        """The function of a task is about to be called."""

    def task_succeeded(self, task: str, id: str, queue: str, attempt: int, duration_s: float) -> None:  # noqa: A002
        """It returned."""

    def task_failed(
        self,
        task: str,
        id: str,  # noqa: A002
        queue: str,
        attempt: int,
        duration_s: float,
        error: BaseException,
    ) -> None:
        """It raised, and will not be tried again."""

    def task_retried(
        self,
        task: str,
        id: str,  # noqa: A002
        queue: str,
        attempt: int,
        duration_s: float,
        delay_s: float,
        error: BaseException,
    ) -> None:
        """It raised, and is sent again, to run ``delay_s`` seconds from now."""

    def task_dead(self, task: str, id: str, queue: str, attempt: int, reason: str) -> None:  # noqa: A002
        """It was put among the dead letters."""

    def worker_started(self, worker: str, queues: Sequence[str]) -> None:
        """The worker is about to take its first task."""

    def worker_stopping(self, worker: str) -> None:
        """The worker takes no more tasks."""

    def worker_stopped(self, worker: str) -> None:
        """The worker has given back what it did not run, and is about to end."""


NAMES = tuple(name for name in vars(Specification) if not name.startswith("_"))
"""The names of all hooks."""


class Hooks:
    """The hooks that somebody listens to, as one attribute each.

    An attribute is None when nobody does, so that a caller pays one check: ``if hooks.enqueue is not None:
    hooks.enqueue(task=..., ...)``. Arguments go by name. Thread-safe, and immutable after it is built.
    """

    __slots__ = NAMES

    enqueue: Hook | None
    task_received: Hook | None
    task_started: Hook | None
    task_succeeded: Hook | None
    task_failed: Hook | None
    task_retried: Hook | None
    task_dead: Hook | None
    worker_started: Hook | None
    worker_stopping: Hook | None
    worker_stopped: Hook | None

    def __init__(self, listeners: Iterable[object] = (), logger: logging.Logger = _log) -> None:
        """Takes objects, and classes that need no arguments; raises ``ConfigError`` for what fits no specification."""
        found = [listener() if isinstance(listener, type) else listener for listener in listeners]
        manager = _manager(found) if found else None
        for name in NAMES:
            hookimpls = getattr(manager.hook, name).get_hookimpls() if manager else []
            setattr(self, name, _caller(name, hookimpls, logger) if hookimpls else None)


def _manager(listeners: Iterable[object]) -> pluggy.PluginManager:
    """pluggy's manager with the specification and the listeners, all of them checked."""
    import pluggy

    mark = pluggy.HookspecMarker(_PROJECT)
    for name in NAMES:
        mark(getattr(Specification, name))
    manager = pluggy.PluginManager(_PROJECT)
    manager.add_hookspecs(Specification)
    try:
        for listener in listeners:
            manager.register(listener)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise ConfigError(f"hooks: {' '.join(str(error).split())}; the hooks are {', '.join(NAMES)}") from error
    return manager


def _caller(name: str, hookimpls: Sequence[pluggy.HookImpl], logger: logging.Logger) -> Hook:
    """One call for all listeners of a hook: each gets what it asks for, and none can hurt another."""
    if any(hookimpl.wrapper or hookimpl.hookwrapper for hookimpl in hookimpls):
        raise ConfigError(f"hooks: {name} is implemented as a wrapper; hooks observe, there is nothing to wrap")
    targets = [(item.function, item.argnames) for item in reversed(hookimpls)]

    def call(**arguments: object) -> None:
        for function, wanted in targets:
            try:
                function(*[arguments[argument] for argument in wanted])
            except Exception:
                logger.exception("the hook %s of %r failed", name, getattr(function, "__self__", function))

    return call


NO_HOOKS = Hooks()
"""Nobody listens."""
