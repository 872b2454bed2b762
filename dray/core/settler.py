"""Outcomes to durable facts, in batches: results, then follow-ups, then acknowledgement. And it keeps the leases."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from dray.core.clock import Clock, Random
from dray.core.contracts import ResultBackend, Tombstones, Transport
from dray.core.errors import CodecError, TransportError
from dray.core.failure import brief
from dray.core.fallback import Fallback
from dray.core.faults import Faults
from dray.core.message import Action, Delivery, Outcome, Settlement, StoredResult

log = logging.getLogger(__name__)
BATCH = 1000
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
NOTHING_TO_DO = float("inf")


class Settler:
    """Settles what the pool has done.

    Responsibilities: know what is in flight; write each batch of outcomes in the one order that loses nothing (promise
    G3); keep a batch, with growing pauses, while a store is away, and give it back when the result store stays away for
    too long; extend leases (G5); forget deliveries whose lease was lost.

    ``step`` and ``renew`` make one attempt each and never sleep: whoever calls them (the worker's threads, a simulator)
    owns time. ``collect``, ``report`` and ``track`` may be called from any thread.
    """

    def __init__(
        self,
        transport: Transport,
        backend: ResultBackend,
        fallback: Fallback,
        clock: Clock,
        random: Random,
        faults: Faults | None,
        *,
        store_timeout_s: float,
        remember_ended_s: float | None,
        undeliverable: Callable[[Delivery, str], Outcome],
        verify: Callable[[Delivery], None] = lambda _: None,
    ) -> None:
        self._transport = transport
        self._backend = backend
        self._fallback = fallback
        self._clock = clock
        self._random = random
        self._faults = faults
        self._store_timeout_s = store_timeout_s
        self._undeliverable = undeliverable
        self._remember_ended_s = remember_ended_s  # set when messages are signed: a replay must not run again
        self._verify = verify
        self._lock = threading.Lock()  # guards what follows
        self._waiting: deque[Outcome] = deque()
        self._reports: dict[str, StoredResult] = {}
        self._in_flight: dict[int, Delivery] = {}
        self._wire = threading.Lock()  # settle and extend never run together
        self._batch: list[Outcome] = []
        self._stored = False
        self._failing_since: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self.wake = threading.Event()
        """Set when there is something for :meth:`step`."""
        self.settled = 0
        """How many deliveries were settled so far."""
        self.store_is_away = False
        """Tasks were given back because results could not be stored: no more should be taken until it answers again."""

    # --- what comes in -------------------------------------------------------------------------------------

    def track(self, deliveries: Sequence[Delivery]) -> None:
        """These are ours now: keep their leases."""
        with self._lock:
            self._in_flight.update(zip(map(id, deliveries), deliveries, strict=True))

    def collect(self, outcomes: Iterable[Outcome]) -> None:
        """Settle these soon. Outcomes of deliveries that are no longer in flight (lost leases) are dropped."""
        with self._lock:
            self._waiting.extend(outcomes)
        self.wake.set()

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Release these soon: they were not begun, or are to be run by somebody else."""
        self.collect([Outcome(Settlement(delivery, Action.RELEASE), None) for delivery in deliveries])

    def report(self, results: Sequence[StoredResult]) -> None:
        """Store these interim states soon; only the newest of a task counts."""
        with self._lock:
            self._reports.update((result.id, result) for result in results)
        self.wake.set()

    def in_flight(self) -> list[Delivery]:
        """All deliveries that are tracked and not settled yet."""
        with self._lock:
            return list(self._in_flight.values())

    @property
    def backlog(self) -> int:
        """Outcomes that are not settled yet."""
        return len(self._waiting) + len(self._batch)

    # --- one attempt ---------------------------------------------------------------------------------------

    def step(self) -> float:
        """Write one batch, or try the failed one again. Returns the seconds to wait before the next call.

        0: there may be more; :data:`NOTHING_TO_DO`: until :attr:`wake` is set.
        """
        if not self._batch:
            self.wake.clear()
            reports = self._take()
            if not self._batch and not reports:
                return self._look_for_store() if self.store_is_away else NOTHING_TO_DO
            self._store_reports(reports)
            if not self._batch:
                return 0.0
        try:
            self._write()
        except TransportError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("a batch of %d outcomes could not be settled", len(self._batch))
            return self._isolate(error)
        self._done(self._batch)
        return 0.0

    def _take(self) -> list[StoredResult]:
        with self._lock:
            waiting, in_flight = self._waiting, self._in_flight
            taken = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            self._batch = [outcome for outcome in taken if id(outcome.settlement.delivery) in in_flight]
            self._stored = False
            if not self._reports:
                return []
            for outcome in self._batch:
                self._reports.pop(outcome.settlement.delivery.id, None)
            reports, self._reports = list(self._reports.values()), {}
            return reports

    def _store_reports(self, reports: list[StoredResult]) -> None:
        if reports:
            try:
                self._backend.store(reports)
            except Exception as error:  # one that is too large, for instance: reports are no reason to stop
                log.debug("%d progress reports were dropped: %s", len(reports), error)

    def _write(self) -> None:
        batch = self._batch
        if not self._stored:
            results = [outcome.result for outcome in batch if outcome.result is not None]
            if results:
                self._backend.store(results)
            self._stored = True
            if self._faults is not None:
                self._faults.hit("stored")
        self._remember_ended()
        settlements = [outcome.settlement for outcome in batch]
        if not self._fallback.native:
            settlements = [self._fallback.settlement(settlement) for settlement in settlements]
        with self._wire:
            lost = self._transport.settle(settlements)
        if lost and self._failing_since is not None:
            log.info(
                "%d deliveries are not ours any more: the attempt that failed had settled them, or others run them",
                len(lost),
            )
        elif lost:
            log.warning(
                "%d deliveries were no longer ours when they ended; they run again; first: %s", len(lost), lost[0].id
            )
        if self._faults is not None:
            self._faults.hit("acknowledged")

    def _remember_ended(self) -> None:
        if self._remember_ended_s is None or not isinstance(self._transport, Tombstones):
            return
        ended: dict[str, str] = {}
        for settlement, _ in self._batch:
            if settlement.action is Action.ACK and not settlement.then:
                ended[settlement.delivery.id] = "ended"
            elif settlement.action is Action.DEAD and self._is_genuine(settlement.delivery):
                ended[settlement.delivery.id] = "dead"
        if ended:
            # A copy of a revoked task may run elsewhere: its worker has to see that it was revoked.
            marks = self._transport.buried(list(ended))
            ended |= {id_: mark for id_, mark in marks.items() if mark in ("revoked", "terminate")}
            self._transport.bury(ended, self._clock.time() + self._remember_ended_s)

    def _is_genuine(self, delivery: Delivery) -> bool:
        """False for a message with a bad signature: it must not make the genuine one of the same id count as ended."""
        try:
            self._verify(delivery)
        except CodecError:
            return False
        return True

    def _done(self, batch: list[Outcome]) -> None:
        with self._lock:
            for outcome in batch:
                self._in_flight.pop(id(outcome.settlement.delivery), None)
        self.settled += len(batch)
        self._batch = []
        self._failing_since, self._pause_s = None, FIRST_PAUSE_S

    # --- when it fails -------------------------------------------------------------------------------------

    def _failed(self, error: TransportError) -> float:
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            what = "the transport" if self._stored else "the result back end"
            log.warning("%s failed; %d outcomes wait: %s", what, self.backlog, error)
        if not self._stored and now - self._failing_since > self._store_timeout_s:
            log.error(
                "the result back end is away for %.0f s: %d tasks are given back",
                self._store_timeout_s,
                len(self._batch),
            )
            self._batch = [
                outcome
                if outcome.result is None
                else Outcome(Settlement(outcome.settlement.delivery, Action.RELEASE), None)
                for outcome in self._batch
            ]
            self._stored = self.store_is_away = True
            return 0.0
        pause_s = self._pause_s * self._random.uniform(0.5, 1.0)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause_s

    def _look_for_store(self) -> float:
        try:
            self._backend.fetch(["dray"])
        except TransportError:
            return LONGEST_PAUSE_S
        self.store_is_away = False
        log.warning("the result back end is back")
        return NOTHING_TO_DO

    def _isolate(self, error: Exception) -> float:
        """An error that is not the store's state: find the outcome that causes it, and put that message aside."""
        batch = self._batch
        if len(batch) > 1:
            half = len(batch) // 2
            with self._lock:
                self._waiting.extendleft(reversed(batch[half:]))
            self._batch = batch[:half]
            return 0.0
        (delivery, action, then, reason), result = batch[0]
        if action is not Action.DEAD or then:
            self._batch, self._stored = (
                [self._undeliverable(delivery, f"its outcome could not be written: {brief(error)}")],
                False,
            )
        elif result is not None:
            self._batch = [Outcome(Settlement(delivery, Action.DEAD, (), reason), None)]
        else:
            log.error("task %s cannot even be dead-lettered; its lease is left to run out", delivery.id)
            self._done(batch)
        return 0.0

    # --- leases --------------------------------------------------------------------------------------------

    def renew(self) -> list[Delivery]:
        """Extend all leases; returns the deliveries that were lost: they are forgotten, their outcomes dropped."""
        lease_s, deliveries = self._transport.features.lease_s, self.in_flight()
        if lease_s is None or not deliveries:
            return []
        with self._wire:
            lost = self._transport.extend(deliveries, lease_s)
        current = {delivery.receipt: delivery for delivery in self.in_flight()} if lost else {}
        still = [current[delivery.receipt] for delivery in lost if delivery.receipt in current]
        with self._lock:
            for delivery in still:
                self._in_flight.pop(id(delivery), None)
        return still
