"""Counts executed tasks across worker processes in shared memory, so that watching them costs the worker no I/O.

Standard library only: the peers import it from environments in which dray is not installed.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

CELL_BYTES = 8


class Counter:
    """The worker's side: one small mapped file for each process, opened at its first task (again after a fork)."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._cell: memoryview | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._cell = None

    def _open(self) -> memoryview:
        with open(self._folder / str(os.getpid()), "w+b") as file:
            file.truncate(CELL_BYTES)
            self._cell = memoryview(mmap.mmap(file.fileno(), CELL_BYTES)).cast("Q")
        return self._cell

    def tick(self) -> None:
        cell = self._cell or self._open()
        cell[0] += 1


class Reader:
    """The observer's side: the sum over all processes, those that have died included."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._cells: dict[str, memoryview] = {}

    def total(self) -> int:
        for name in os.listdir(self._folder):
            if name not in self._cells:
                self._map(name)
        return sum(cell[0] for cell in self._cells.values())

    def _map(self, name: str) -> None:
        with open(self._folder / name, "r+b") as file:
            if os.fstat(file.fileno()).st_size == CELL_BYTES:  # else it is just being made: next time
                self._cells[name] = memoryview(mmap.mmap(file.fileno(), CELL_BYTES)).cast("Q")
