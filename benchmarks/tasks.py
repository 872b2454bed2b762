"""The tasks that are measured: they count themselves in shared memory and do nothing else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from progress import Counter

from dray import Dray

app = Dray()
counter = Counter(os.environ.get("BENCH_PROGRESS", "."))


@app.task
def noop() -> int:
    counter.tick()
    return 1


@app.task
def nap(seconds: float) -> int:
    """Short for 0, long for 60: the same task, so that nothing can be told from its name."""
    counter.tick()
    if seconds:
        time.sleep(seconds)
    return 1
