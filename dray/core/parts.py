"""What a worker is made of, as one value that its pieces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dray.core.clock import Clock, Random
from dray.core.contracts import Durability, Pool, ResultBackend, Transport
from dray.core.executor import TaskExecutor
from dray.core.fallback import Fallback
from dray.core.faults import Faults
from dray.core.hooks import Hooks
from dray.core.settler import Settler


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of."""

    name: str
    queues: Sequence[str]
    transport: Transport
    backend: ResultBackend
    pool: Pool
    executor: TaskExecutor
    settler: Settler
    fallback: Fallback
    hooks: Hooks
    clock: Clock
    random: Random
    faults: Faults | None
    shutdown_timeout_s: float
    max_deliveries: Mapping[str, int] = field(default_factory=dict)
    max_deliveries_default: int = 5
    require_durability: Durability | None = None
    on_ready: Callable[[], None] = lambda: None
    """Called on the main thread once connections are open and tasks are taken."""
