"""What gets past the executor: exceptions that are made to end a program, in a pool that must go on."""

from __future__ import annotations

from dray.core.contracts import Executor
from dray.core.errors import WorkerLost
from dray.core.message import Delivery, Outcome


def outcome_of_escape(executor: Executor, delivery: Delivery, error: BaseException) -> Outcome:
    """The outcome of a delivery whose run let ``error`` (``SystemExit``, ``KeyboardInterrupt``) through."""
    if not isinstance(error, Exception):
        error = WorkerLost(f"the task raised {type(error).__name__}({error}) past everything that handles errors")
    return executor.lost(delivery, error)
