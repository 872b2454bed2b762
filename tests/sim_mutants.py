"""Ways to break the core that the simulator must notice: name -> what to patch, and with what."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from dray.core import executor as executor_module
from dray.core.executor import TaskExecutor
from dray.core.fallback import Fallback
from dray.core.intake import Intake
from dray.core.keeper import Keeper
from dray.core.message import Outcome
from dray.core.settler import Settler
from dray.testing import sim_world
from dray.testing.sim_threading import SimLock


def _acknowledges_first(self: Settler) -> None:
    self._transport.settle([self._fallback.settlement(outcome.settlement) for outcome in self._batch])
    self._backend.store([outcome.result for outcome in self._batch if outcome.result is not None])


def _drops_the_batch(self: Settler, error: Exception) -> float:
    self._done(self._batch)
    return 0.0


_failed, _again, _collect, _revoked = Settler._failed, TaskExecutor._again, Settler.collect, TaskExecutor.revoked


def _forgets_the_attempt(self: TaskExecutor, delivery: Any, call: Any, error: Any, delay_s: float) -> Outcome:
    return _again(self, delivery, call._replace(retries=call.retries - 1), error, delay_s)


def _loses_follow_ups(self: Settler, outcomes: Any) -> None:
    _collect(self, [Outcome(o.settlement._replace(then=()), o.result) for o in outcomes])


def _tells_nobody(self: TaskExecutor, delivery: Any) -> Outcome:
    return _revoked(self, delivery)._replace(result=None)


def _gives_up_at_once(self: Settler, error: Exception) -> float:
    self._failing_since = -1e9
    return _failed(self, error)


def _nothing(*_: Any) -> None:
    return


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "acknowledges before the result is stored": (Settler, "_write", _acknowledges_first),
    "drops a batch that could not be settled": (Settler, "_failed", _drops_the_batch),
    "loses follow-ups": (Settler, "collect", _loses_follow_ups),
    "gives nothing back": (Settler, "give_back", _nothing),
    "remembers no ended task": (Settler, "_remember_ended", _nothing),
    "renews no lease": (Keeper, "_renew", _nothing),
    "looks for no revocation": (Keeper, "_revoke", _nothing),
    "does not ask what was revoked": (Intake, "_buried", _nothing),
    "counts as held what came back": (Intake, "returned", _nothing),
    "hands out for ever": (sim_world, "MAX_DELIVERIES", 99),
    "counts no crash": (executor_module, "CRASHES_MAX", 99),
    "forgets to count the attempt": (TaskExecutor, "_again", _forgets_the_attempt),
    "stores nothing for what was revoked": (TaskExecutor, "revoked", _tells_nobody),
    "runs what came early": (Fallback, "early", _nothing),
    "settles and extends at once": (SimLock, "__enter__", _nothing),
}


def mutated(name: str) -> Any:
    """A context in which the core is broken in this way."""
    target, attribute, replacement = MUTANTS[name]
    return patch.object(target, attribute, replacement)
