"""What ``dray bench`` runs: a task that counts itself and does nothing else."""

from __future__ import annotations

from pathlib import Path

from dray.cli.bench_progress import Counter
from dray.core.app import Dray
from dray.core.task import Task

QUEUE = "dray-bench"
"""The queue of all measurements; emptied before and after each."""
RAN, SENT = "ran", "sent"
"""The files, beside the configuration, in which executed and queued tasks are counted."""


def register(app: Dray) -> Task[[], None]:
    """Give ``app`` the task that is measured. Where it counts is known once the configuration is."""
    counter: list[Counter] = []

    def nothing() -> None:
        if not counter:
            counter.append(Counter(Path(app.config.base) / RAN))
        counter[0].tick()

    return app.task(name="dray.bench.nothing")(nothing)


app = Dray()
register(app)
