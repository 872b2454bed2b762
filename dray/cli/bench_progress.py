"""Counts tasks across processes in shared memory, so that watching them costs those processes no I/O.

Standard library only, and nothing of dray: the project's benchmarks load this file where dray is not installed.
"""

from __future__ import annotations

import fcntl
import mmap
import os

CELL_BYTES = 8
CELLS = 65_536


class Counter:
    """The side that counts. Takes a cell of the file for its process at the first tick, another one after a fork."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._cell: memoryview | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._cell = None

    def _claim(self) -> memoryview:
        """The first cell of the file holds how many are taken."""
        with open(self._path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cells = memoryview(mmap.mmap(file.fileno(), CELL_BYTES * CELLS)).cast("Q")
            cells[0] += 1
            at = cells[0]
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not do it: the mapping keeps a duplicate of the descriptor
        self._cell = cells[at : at + 1]
        return self._cell

    def tick(self, count: int = 1) -> None:
        """Count; the interpreter does not change threads within the addition."""
        cell = self._cell
        if cell is None:
            cell = self._claim()
        cell[0] += count


class Reader:
    """The side that watches: makes the file, and sums over all processes, those that have died included."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "w+b") as file:
            file.truncate(CELL_BYTES * CELLS)
            self._cells = memoryview(mmap.mmap(file.fileno(), CELL_BYTES * CELLS)).cast("Q")

    def total(self) -> int:
        """How many were counted so far."""
        return sum(self._cells[1 : self._cells[0] + 1])
