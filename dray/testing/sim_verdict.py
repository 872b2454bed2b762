"""What must be true of a simulated world once everything has come to rest."""

from __future__ import annotations

from dray.core.fallback import DEAD_SUFFIX
from dray.core.message import TERMINAL, State
from dray.plugins._memory import MemoryStore
from dray.testing.sim_audit import CRASHES_MAX, MAX_DELIVERIES, Audit, Entry
from dray.testing.sim_script import KINDS


def judge(audit: Audit, store: MemoryStore, *, poor: bool) -> None:
    """Adds to ``audit.violations``."""
    held = [holding.entry.id for holding in audit.holdings.values()]
    audit.expect(not held and not store.leases, "G2", f"still leased: {held}")
    for name, queue in store.queues.items():
        left = [message.id for message in queue.waiting()]
        audit.expect(not left or name.endswith(DEAD_SUFFIX), "G2", f"never came to rest in {name}: {left}")
    letters = [
        message.id for name, queue in store.queues.items() if name.endswith(DEAD_SUFFIX) for message in queue.waiting()
    ]
    if not poor:
        letters = [letter.id for letter in store.dead.values()]
    for entry in audit.entries.values():
        if entry.copies:
            _judge_task(audit, entry, entry.id in letters)
        audit.expect(not entry.active, "G2", f"{entry.id} still runs")


def _judge_task(audit: Audit, entry: Entry, is_letter: bool) -> None:
    name, kind, result = entry.id, KINDS[entry.kind], entry.result
    ended = result is not None and result.state in TERMINAL
    silent_end = not entry.keeps_result and (entry.completed > 0 or entry.barred or not entry.wants_run)
    audit.expect(ended or is_letter or bool(silent_end), "G2", f"{name} was confirmed and has no end; {entry}")
    audit.expect(is_letter == bool(entry.dead) or bool(entry.barred), "G2", f"{name}: its dead letter is gone")
    ill_fated = entry.crashes >= CRASHES_MAX or entry.charges >= MAX_DELIVERIES  # nothing is wrong with it
    if entry.wants_run and not ill_fated:
        audit.expect(entry.completed > 0, "G2", f"{name} never ran to its end: {entry}")
        audit.expect(
            not entry.keeps_result or (result is not None and result.state is State.SUCCESS), "G2", f"{name}: {result}"
        )
    if not kind.succeeds and not entry.barred and entry.keeps_result:
        audit.expect(result is not None and result.state is State.FAILURE, "G8", f"{name} should have failed: {result}")
    if kind.how in ("broken", "refused", "unfit", "unknown") and not entry.barred:
        audit.expect(is_letter and not entry.runs, "G8", f"{name} cannot be understood, and is no dead letter: {entry}")
    if entry.revoked and not entry.runs and entry.barred in ("revoked", "terminate") and not entry.dead:
        revoked = result is not None and result.state in (State.REVOKED, State.FAILURE)
        audit.expect(revoked or not entry.keeps_result, "G7", f"{name} was revoked, and nobody can see it: {result}")
    if result is not None and result.state is State.REVOKED:
        audit.expect(entry.revoke_asked, "G7", f"{name} is REVOKED, and nobody revoked it")
