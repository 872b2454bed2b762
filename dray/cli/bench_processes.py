"""What processes use, as Linux tells it; None elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
TICKS_S = os.sysconf("SC_CLK_TCK")
PAGES_OF = "smaps_rollup"


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    below: dict[int, list[int]] = {}
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:
        found.extend(below.get(member, ()))
    return found


def cpu_s(pids: Iterable[int]) -> float | None:
    """Processor time that these processes used, and children of theirs that have ended."""
    used = [sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))]
    return sum(used) / TICKS_S if used else None


def pss_mb(pids: Iterable[int]) -> float | None:
    """Their memory; a page that several processes share counts once in all."""
    sizes = []
    for pid in pids:
        try:
            text = (PROC / str(pid) / PAGES_OF).read_text()
        except OSError:
            continue
        sizes += [int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")]
    return sum(sizes) / 1024 if sizes else None


def processor() -> str | None:
    """The processor's name."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on; the name before it may hold anything."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
