"""What is known, from outside, of every task of a simulated world, and the promises that it must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dray.core.codec import float_header, int_header
from dray.core.message import TERMINAL, Action, Delivery, Outgoing, Settlement, State, StoredResult
from dray.testing.sim_kernel import EPOCH, Kernel, Process

CRASHES_MAX = 3
MAX_DELIVERIES = 5
LOOK_S = 3.0
"""A worker without troubles ends what was revoked within this, in seconds."""


@dataclass(slots=True)
class Entry:
    """One task."""

    id: str
    kind: str
    keeps_result: bool = True
    wants_run: bool = True
    """Nothing was asked that could keep it from running: no expiry, no revoke, and it can be understood."""
    confirmed: bool = False
    revoke_asked: bool = False
    revoked: bool = False
    """A producer's revoke of it was confirmed."""
    copies: int = 0
    """How often it was stored as a new message."""
    charges: int = 0
    """Faults that justify one more run each."""
    crashes: int = 0
    overlap: bool = False
    """A lease of it was lost, or there are two messages of it: runs may overlap."""
    runs: Counter[int] = field(default_factory=Counter)
    """Attempt -> how often it was begun."""
    active: list[Process] = field(default_factory=list)
    completed: int = 0
    barred: str = ""
    """Why it must not start any more: it was revoked, or (signed) has ended."""
    barred_at: float = float("inf")
    finished_at: float = float("inf")
    """When its message was removed for good."""
    store_failed: bool = False
    result: StoredResult | None = None
    dead: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Holding:
    """One lease."""

    process: Process
    entry: Entry
    claimed_at: float
    begun: bool = False
    charged: bool = False


class Audit:
    """Keeps the ledger of a simulated world, and a list of broken promises.

    The wrappers of transport, result back end and pool tell it of each effect at the moment it takes place.
    """

    def __init__(self, kernel: Kernel, signed: bool) -> None:
        self._kernel = kernel
        self._signed = signed
        self.entries: dict[str, Entry] = {}
        self.holdings: dict[int, Holding] = {}
        self.violations: list[str] = []

    def broken(self, promise: str, what: str) -> None:
        """Note a broken promise."""
        self.violations.append(f"{promise}: {what} (t={self._kernel.now:.3f})")
        self._kernel.note(f"BROKEN {promise}: {what}")

    def expect(self, holds: bool, promise: str, what: str) -> None:
        if not holds:
            self.broken(promise, what)

    # --- messages ------------------------------------------------------------------------------------------

    def published(self, messages: Iterable[Outgoing]) -> None:
        """A producer's messages were stored."""
        for message in messages:
            entry = self.entries[message.id]
            entry.copies += 1
            if entry.copies > 1:
                self.doubled(message.id)

    def confirmed(self, ids: Iterable[str]) -> None:
        """A producer was told that these are stored."""
        for task_id in ids:
            entry = self.entries[task_id]
            entry.confirmed = True
            self.expect(entry.copies > 0, "G1", f"{task_id} was confirmed and never stored")

    def revoked(self, ids: Iterable[str]) -> None:
        """A producer was told that these are revoked."""
        for task_id in ids:
            self.entries[task_id].revoked = True
            self.expect(bool(self.entries[task_id].barred), "G7", f"the revoke of {task_id} was confirmed, not stored")

    def doubled(self, task_id: str) -> None:
        """There may be two messages of this task now."""
        entry = self.entries[task_id]
        entry.charges += 1
        entry.overlap = True

    def claimed(self, process: Process, deliveries: Sequence[Delivery]) -> None:
        now = self._kernel.now
        for delivery in deliveries:
            self.holdings[delivery.receipt] = Holding(process, self.entries[delivery.id], now)

    def orphaned(self, deliveries: Iterable[Delivery]) -> None:
        """These were handed out, and nobody heard of it."""
        for delivery in deliveries:
            self._charge(self.holdings[delivery.receipt])

    def expired(self, receipts: Iterable[int]) -> None:
        """These leases ended without being settled."""
        for receipt in receipts:
            holding = self.holdings.pop(receipt)
            process, entry = holding.process, holding.entry
            if not holding.charged:
                excused = process.troubled_at > self._kernel.now - 14.0
                self.expect(excused, "G5", f"the lease of {entry.id} expired, its worker {process.name} lives")
            self._charge(holding)
            entry.overlap = True

    def died(self, process: Process) -> None:
        """The process was killed, or ended: what it held comes back when the leases end."""
        for holding in self.holdings.values():
            if holding.process is process:
                self._charge(holding)
        for entry in self.entries.values():
            if process in entry.active:
                entry.active = [other for other in entry.active if other is not process]

    def settled(self, settlement: Settlement, stopping: bool) -> None:
        """A delivery was swapped for its follow-ups."""
        delivery, action, then, reason = settlement
        holding = self.holdings.pop(delivery.receipt)
        entry = holding.entry
        emulated = any(message.headers == delivery.headers and message.queue == delivery.queue for message in then)
        if action is Action.RELEASE or emulated:
            if holding.begun:
                why = stopping or entry.store_failed
                self.expect(why, "G4", f"{entry.id} was begun and given back for no reason")
                self._charge(holding)
        elif action is Action.DEAD:
            self._put_aside(entry, reason or "")
        elif not then:
            has_result = entry.result is not None and entry.result.state in TERMINAL
            self.expect(
                has_result or not entry.keeps_result, "G3", f"{entry.id} was acknowledged before its result was stored"
            )
            entry.finished_at = min(entry.finished_at, self._kernel.now)

    def put_aside(self, message: Outgoing) -> None:
        """A dead letter that is a message of another queue."""
        self._put_aside(self.entries[message.id], message.headers.get("x-dead-reason", ""))

    def _put_aside(self, entry: Entry, reason: str) -> None:
        entry.dead.append(reason)
        self.expect(bool(reason), "G8", f"{entry.id} is dead for no reason")
        stored = entry.result is not None and entry.result.state in TERMINAL
        self.expect(stored or not entry.keeps_result, "G3", f"{entry.id} was put aside before its result was stored")
        if "max_deliveries" in reason:
            self.expect(entry.charges >= MAX_DELIVERIES, "G4", f"{entry.id} had {entry.charges} faults: {reason}")
        if "poison" in reason:
            self.expect(entry.crashes >= CRASHES_MAX, "G4", f"{entry.id} crashed {entry.crashes} times: {reason}")

    def barred(self, marks: Mapping[str, str]) -> None:
        """Tombstones were written."""
        for task_id, mark in marks.items():
            entry = self.entries.get(task_id)
            if entry is None:
                continue
            entry.revoke_asked = entry.revoke_asked or mark in ("revoked", "terminate")
            if not entry.barred:
                entry.barred, entry.barred_at = mark, self._kernel.now

    def _charge(self, holding: Holding) -> None:
        if not holding.charged:
            holding.charged = True
            holding.entry.charges += 1

    # --- results -------------------------------------------------------------------------------------------

    def store_failed(self, results: Iterable[StoredResult]) -> None:
        for result in results:
            self.entries[result.id].store_failed = True

    def stored(self, now_there: Mapping[str, StoredResult]) -> None:
        """These results are in the back end now."""
        for task_id, result in now_there.items():
            entry = self.entries[task_id]
            before, entry.result = entry.result, result
            if before is not None and before.state in TERMINAL:
                self.expect(result == before, "G9", f"the terminal result of {task_id} changed")
            elif result.state is State.SUCCESS:
                self.expect(entry.completed > 0, "G2", f"{task_id} succeeded without a complete run")

    # --- runs ----------------------------------------------------------------------------------------------

    def began(self, process: Process, delivery: Delivery, picked_at: float) -> None:
        """The user's function starts; ``picked_at``: when the slot took the delivery."""
        entry, headers = self.entries[delivery.id], delivery.headers
        holding = self.holdings.get(delivery.receipt)
        self._kernel.note(f"run {entry.id} attempt {headers.get('attempt', '0')} delivery {delivery.delivery_count}")
        attempt = int_header(headers, "attempt", 0)
        entry.runs[attempt] += 1
        runs, name = entry.runs[attempt], entry.id
        self.expect(runs <= 1 + entry.charges, "G4", f"{name} attempt {attempt}: run {runs}, faults {entry.charges}")
        self.expect(delivery.delivery_count <= MAX_DELIVERIES, "G4", f"{name}: delivery {delivery.delivery_count}")
        self.expect(int_header(headers, "crashes", 0) < CRASHES_MAX, "G4", f"{name} runs after {CRASHES_MAX} crashes")
        eta, expires = float_header(headers, "eta"), float_header(headers, "expires")
        self.expect(eta is None or eta <= EPOCH + picked_at, "G6", f"{name} runs early")
        self.expect(expires is None or expires > EPOCH + picked_at, "G2", f"{name} runs after it expired")
        if entry.active and not entry.overlap:
            others = [other.name for other in entry.active]
            self.broken("G4", f"{name} runs on {process.name} while it runs on {others}")
        entry.active.append(process)
        if holding is not None:
            holding.begun = True
            self._check_barred(holding, picked_at)
            replayed = self._signed and holding.claimed_at > entry.finished_at
            self.expect(not replayed, "G9", f"{name} has ended, and a copy of its signed message runs")

    def _check_barred(self, holding: Holding, picked_at: float) -> None:
        entry, process = holding.entry, holding.process
        if picked_at <= entry.barred_at:
            return
        promise = "G7" if entry.barred in ("revoked", "terminate") else "G9"
        fresh = holding.claimed_at > entry.barred_at
        self.expect(not fresh, promise, f"{entry.id} was taken and run after it was marked {entry.barred}")
        if promise == "G7" and not fresh:
            self._check_prompt(entry, process, picked_at, "begun")

    def _check_prompt(self, entry: Entry, process: Process, moment: float, what: str) -> None:
        """A worker that could look for revocations did."""
        if max(process.troubled_at, process.blind_at) < entry.barred_at - 1.0:
            late_s = moment - entry.barred_at
            self.expect(late_s <= LOOK_S, "G7", f"{entry.id} was {what} {late_s:.1f} s after it was revoked")

    def ended(self, process: Process, delivery: Delivery, complete: bool) -> None:
        """The user's function returned (``complete``), raised, or its slot died."""
        entry = self.entries[delivery.id]
        entry.completed += complete
        if entry.barred == "terminate" and delivery.receipt in self.holdings:
            self._check_prompt(entry, process, self._kernel.now, "still running")
        if process in entry.active:
            entry.active.remove(process)

    def crashed(self, task_id: str) -> None:
        """The slot under a task died."""
        entry = self.entries[task_id]
        entry.crashes += 1
        entry.charges += 1
