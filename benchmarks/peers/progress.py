"""The counters of ``dray bench``, loaded from their file: the peers' environments have no dray."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

WHEEL = Path(__file__).resolve().parents[2] / "dray" / "cli"


def load(name: str) -> ModuleType:
    """A module of dray's command line that imports nothing of dray itself."""
    spec = importlib.util.spec_from_file_location(name, WHEEL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_progress = load("bench_progress")
Counter, Reader = bench_progress.Counter, bench_progress.Reader
