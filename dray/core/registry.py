"""Task name -> task; and the modules that define them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dray.core.errors import ConfigError, UnknownTask
from dray.core.task import Task

if TYPE_CHECKING:
    from pathlib import Path


class Registry:
    """The tasks of one app. Filled while modules are imported, then only read."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task[..., Any]] = {}
        self.get = self._tasks.get

    def add(self, task: Task[..., Any]) -> None:
        """Raises ``ConfigError`` when another function has the name already."""
        known = self._tasks.get(task.name)
        if known is not None and _origin(known) != _origin(task):
            raise ConfigError(
                f"two tasks are named {task.name!r}: {_where(known)} and {_where(task)}; give one a name: "
                "@app.task(name='...')"
            )
        self._tasks[task.name] = task

    def __getitem__(self, name: str) -> Task[..., Any]:
        task = self._tasks.get(name)
        if task is None:
            raise UnknownTask(f"no task {name!r} is registered{self.hint(name)}")
        return task

    def __iter__(self) -> Iterator[Task[..., Any]]:
        return iter(list(self._tasks.values()))

    def __len__(self) -> int:
        return len(self._tasks)

    def hint(self, name: str) -> str:
        """The nearest known name, as the end of a sentence."""
        import difflib

        near = difflib.get_close_matches(name, self._tasks, 1)
        if near:
            return f"; did you mean {near[0]!r}?"
        if not self._tasks:
            return "; none is: is the module that defines it listed under 'imports'?"
        return f"; known: {', '.join(sorted(self._tasks)[:10])}"


def import_modules(names: Sequence[str], base: Path) -> None:
    """Import the modules that define tasks, also from ``base``. Raises ``ConfigError`` when one is not there."""
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(f"imports: no module {name!r} (looked in {base} and the Python path)") from error
            raise


def _origin(task: Task[..., Any]) -> tuple[str, str]:
    code = getattr(task.fn, "__code__", None)
    return (task.fn.__qualname__, code.co_filename if code is not None else "")


def _where(task: Task[..., Any]) -> str:
    code = getattr(task.fn, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(task.fn)
