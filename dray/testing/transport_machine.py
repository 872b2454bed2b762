"""Random calls to a transport, faults and restarts among them; a model knows what must, may and must not be there.

Run by :class:`~dray.testing.transports.TransportConformance` as ``test_state_machine``. The environment variable
``DRAY_CONFORMANCE_EXAMPLES`` sets how many runs to try, with fresh randomness each time.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dray.core.contracts import Consumer
from dray.core.errors import Unavailable, Uncertain
from dray.core.faults import Faults
from dray.core.message import Action, Delivery, Outgoing, Settlement
from dray.testing.kit import EXAMPLES_VARIABLE
from dray.testing.transport_model import Model

if TYPE_CHECKING:
    from dray.testing.transports import TransportHarness

EXAMPLES = 40
STEPS = 30
QUEUES = ("a", "b")
LEASE_S = 10.0
"""The unit of time where there are no leases."""
_Result = TypeVar("_Result")

_picks = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True)
_actions = st.sampled_from([Action.ACK, Action.ACK, Action.DEAD, Action.RELEASE])
_delays = st.sampled_from([None, None, -1.0, 0.4, 0.4, 2.0])
_drafts = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.sampled_from([0, 0, 9]), _delays, st.booleans()),
    min_size=1,
    max_size=3,
)
_follow_ups = st.lists(st.sampled_from(["retry", "later", "other"]), max_size=2)


def run_machine(kit: TransportHarness, examples: int | None = None, phases: Sequence[Phase] | None = None) -> None:
    """Try ``examples`` random runs against the transports that ``kit`` makes; raises what the first failing one did."""
    asked = os.environ.get(EXAMPLES_VARIABLE)
    machine = type("Machine", (TransportMachine,), {"kit": kit, "runs": itertools.count()})
    chosen = settings(
        max_examples=examples or (int(asked) if asked else kit.machine_examples),
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=not asked,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases or (Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=chosen)


class _NotBegun(Unavailable):
    """The fault switch: the call was not made."""


class _Unanswered(Uncertain):
    """The fault switch: the call was made, and its answer lost."""


class Client:
    """One instance of the transport with a consumer: stands for a process."""

    def __init__(self, kit: TransportHarness, queues: Sequence[str]) -> None:
        self._kit = kit
        self._queues = queues
        self.transport: Any = kit.open()
        self.consumer: Consumer = kit.consume(self.transport, *queues)
        self.deliveries: list[Delivery] = []

    def reconsume(self) -> None:
        self.consumer.close()
        self.consumer = self._kit.consume(self.transport, *self._queues)

    def close(self) -> None:
        self.consumer.close()
        self.transport.close()


class TransportMachine(RuleBasedStateMachine):
    """Two clients of one store.

    - sends, receives, settles, extends, buries, lets time pass, restarts clients and the store
    - a fault switch before each call: it fails before it begins, or its answer is lost, or (where a settlement has two
      steps) it fails between them
    - at the end drains all queues and accounts for every message
    """

    kit: ClassVar[TransportHarness]
    runs: ClassVar[Iterator[int]]

    def __init__(self) -> None:
        super().__init__()
        kit, run = self.kit, next(self.runs)
        self._prefix = f"{run}-"
        self._queues = [self._prefix + name for name in QUEUES]
        self._bodies = (f"{run}/{number}".encode() for number in itertools.count())
        self._clients = [Client(kit, self._queues) for _ in range(2)]
        self._features = self._clients[0].transport.features
        self._can = kit.abilities()
        self._unit_s = self._features.lease_s or LEASE_S
        self._slack_s = kit.patience_s + 0.001
        self._model = Model(self._features, self._slack_s)
        self._fault: str | None = None
        self._unanswered: tuple[Client, list[Settlement]] | None = None
        self._marks: dict[str, str] | None = {}

    # --- rules ---------------------------------------------------------------------------------------------

    @initialize(drafts=_drafts)
    def begin(self, drafts: list[Any]) -> None:
        self._send(0, drafts)

    @rule(client=st.integers(0, 1), drafts=_drafts)
    def send(self, client: int, drafts: list[Any]) -> None:
        self._send(client, drafts)

    @rule(client=st.integers(0, 1), limit=st.sampled_from([1, 2, 50]))
    def receive(self, client: int, limit: int) -> None:
        self._receive(client, limit)

    @rule(client=st.integers(0, 1))
    def take_over(self, client: int) -> None:
        """Leases that nobody extends end, and somebody else takes what they guarded."""
        self.kit.advance(1.1 * self._unit_s)
        self._receive(client, 50)

    def _receive(self, client: int, limit: int) -> None:
        one = self._clients[client]
        found: list[Delivery] = []
        try:
            self._call(lambda: found.extend(self._take(one.consumer, limit)))
        except _NotBegun:
            return
        except _Unanswered:  # the link went while the answer came: they are out, and nobody has them
            self._received(found, limit)
            self._model.abandoned(found)
            if self._features.lease_s is None:
                self._restart_client(client)
            else:
                one.reconsume()
            return
        self._received(found, limit)
        one.deliveries += found

    @precondition(lambda self: self._model.live)
    @rule(client=st.integers(0, 1), picks=_picks, action=_actions, then=_follow_ups)
    def settle(self, client: int, picks: list[int], action: Action, then: list[str]) -> None:
        one, chosen = self._choose(client, picks)
        action = self.kit.possible(action)
        if action is Action.RELEASE:
            then = []
        self._settle(
            one,
            [
                Settlement(delivery, action, tuple(self._follow_ups(delivery, then) if at == 0 else ()), "why")
                for at, delivery in enumerate(chosen)
            ],
        )

    @precondition(lambda self: self._unanswered is not None)
    @rule()
    def settle_again(self) -> None:
        """An answer was lost: the same batch comes again."""
        assert self._unanswered is not None
        self._settle(*self._unanswered)

    @precondition(lambda self: self._model.live)
    @rule(client=st.integers(0, 1), picks=_picks, factor=st.sampled_from([0.5, 1.0, 3.0]))
    def extend(self, client: int, picks: list[int], factor: float) -> None:
        one, chosen = self._choose(client, picks)
        lease_s = self._unit_s * factor
        now = self._now()
        try:
            lost = self._call(lambda: one.transport.extend(chosen, lease_s))
        except _NotBegun:
            return
        except _Unanswered:
            for delivery in chosen:
                self._model.maybe_extended(delivery, now + lease_s)
            return
        for delivery in chosen:
            self._model.extended(delivery, delivery in lost, now + lease_s, now)

    @rule(units=st.sampled_from([None, None, 0.05, 0.3, 0.7, 3.3]))
    def advance(self, units: float | None) -> None:
        """Let time pass; without a length until just before the next message is due or the next lease ends."""
        if units is None:
            left_s = self._model.next_change(self._now()) - self._now()
            self.kit.advance(left_s * 0.95 if left_s < math.inf else 0.0)
        else:
            self.kit.advance(units * self._unit_s)

    @precondition(lambda self: self._can["tombstones"])
    @rule(numbers=st.sets(st.integers(0, 6), min_size=1, max_size=2), hasten=st.booleans(), forget=st.booleans())
    def bury(self, numbers: set[int], hasten: bool, forget: bool) -> None:
        marks = {self._id(number): f"mark {number}" for number in numbers}
        expires_at = self._now() + 10**6
        transport = self._clients[0].transport
        try:
            self._call(lambda: transport.bury(marks, expires_at, hasten=hasten))
        except _NotBegun:
            return
        except _Unanswered:
            self._marks = None
            if hasten:
                self._model.hastened(marks, answered=False)
            return
        if self._marks is not None:
            self._marks |= marks
        if hasten:
            self._model.hastened(marks, answered=True)
        if forget:
            gone = next(iter(marks))
            self._clients[1].transport.exhume([gone])
            if self._marks is not None:
                del self._marks[gone]

    @rule(trouble=st.sampled_from(["before", "after", "between", "client", "all"]))
    def trouble(self, trouble: str) -> None:
        """The next call goes wrong; or a client restarts, or both and the store do, with all that is outstanding."""
        if trouble == "client":
            self._restart_client(0)
        elif trouble != "all":
            self._fault = trouble
        elif self._can["durable"]:
            for one in self._clients:
                one.close()
                self._model.abandoned(one.deliveries)
            self.kit.restart()
            self._clients = [Client(self.kit, self._queues) for _ in range(2)]
            self._unanswered = None

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else a rule failed, and that is what to tell
                self._drain()
        finally:
            for one in self._clients:
                one.close()
            self.kit.forget_transports()

    # --- steps ---------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self.kit.clock.time()

    def _id(self, number: int) -> str:
        return f"{self._prefix}m{number}"

    def _call(self, function: Callable[[], _Result]) -> _Result:
        """Every call goes through the fault switch."""
        fault, self._fault = self._fault, None
        if fault == "before":
            raise _NotBegun("the machine's fault")
        result = function()
        if fault == "after":
            raise _Unanswered("the machine's fault")
        return result

    def _send(self, client: int, drafts: Iterable[Any]) -> None:
        now, messages = self._now(), []
        for queue, number, priority, delay, expires in drafts:
            delayed = delay is not None and (delay < 0 or self._can["delays"])
            messages.append(
                Outgoing(
                    self._queues[queue],
                    self._id(number),
                    next(self._bodies),
                    {"task": "t", "number": str(number)},
                    priority if self._can["priorities"] else 0,
                    now + delay * self._unit_s if delayed else None,
                    now + self._unit_s if expires else None,
                )
            )
        copies = [self._model.add(message) for message in messages]
        try:
            self._call(lambda: self._clients[client].transport.send(messages))
        except _NotBegun:
            return
        except _Unanswered:
            for copy in copies:
                copy.exists = None
            return
        for copy in copies:
            copy.exists = True

    def _take(self, consumer: Consumer, limit: int) -> list[Delivery]:
        found = self.kit.take(consumer, limit)
        assert len(found) <= limit, f"{len(found)} deliveries came, {limit} were asked for"
        return found

    def _received(self, found: Sequence[Delivery], limit: int) -> None:
        now = self._now()
        copies = [self._model.delivered(delivery, now) for delivery in found]
        left = [copy for copy in self._model.copies.values() if copy.is_ready(now, self._slack_s)]
        if len(found) < limit and not self._can["push"]:
            assert not left, f"ready and not delivered: {[copy.message.body.decode() for copy in left]}"
        if self._can["priorities"] and not self._can["push"]:
            for queue in self._queues:
                order = [copy.message.priority for copy in copies if copy.message.queue == queue]
                assert order == sorted(order, reverse=True), f"priorities {order} in this order"
                urgent = [copy for copy in left if copy.message.queue == queue and copy.message.priority == 9]
                assert 0 not in order or not urgent, "a low priority came before a high one"

    def _choose(self, client: int, picks: Iterable[int]) -> tuple[Client, list[Delivery]]:
        """Deliveries of one client, newest first, also such as it has settled or lost long since."""
        one = self._clients[client] if self._clients[client].deliveries else self._clients[1 - client]
        count = len(one.deliveries)
        return one, [one.deliveries[at] for at in dict.fromkeys(count - 1 - pick % count for pick in picks)]

    def _follow_ups(self, delivery: Delivery, kinds: Iterable[str]) -> Iterator[Outgoing]:
        """A retry with the same id, now or later, and a message for another queue."""
        for kind in kinds:
            due = self._now() + self._unit_s / 2 if kind == "later" and self._can["delays"] else None
            queue = self._queues[1] if kind == "other" else delivery.queue
            message = Outgoing(queue, delivery.id, next(self._bodies), delivery.headers, 0, due)
            self._model.add(message)
            yield message

    def _settle(self, one: Client, batch: list[Settlement]) -> None:
        now, stepwise = self._now(), self._can["stepwise_then"]
        self._unanswered = None
        in_half = self._fault == "between" and stepwise and any(settlement.then for settlement in batch)
        if in_half:
            one.transport.context = replace(one.transport.context, faults=Faults({"follow_ups_sent": ("uncertain", 1)}))
        try:
            lost = self._call(lambda: one.transport.settle(batch))
        except _NotBegun:
            return
        except Uncertain as error:
            assert in_half or isinstance(error, _Unanswered), "a transport that nobody disturbed is not certain"
            for settlement in batch:
                self._model.maybe_settled(settlement, now, in_half=in_half)
            self._unanswered = (one, batch)
            return
        finally:
            one.transport.context = replace(one.transport.context, faults=None)
        for settlement in batch:
            self._model.settled(settlement, settlement.delivery in lost, now)

    def _restart_client(self, client: int) -> None:
        one = self._clients[client]
        one.close()
        self._model.abandoned(one.deliveries)
        self._clients[client] = Client(self.kit, self._queues)
        self._unanswered = None

    # --- the end -------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take all that is there until nothing comes any more; then every message must be accounted for."""
        self._fault = None
        if self._marks is not None and self._can["tombstones"]:
            ids = [self._id(number) for number in range(7)]
            assert self._clients[1].transport.buried(ids) == self._marks
        if self._features.lease_s is None:  # else what is outstanding stays so
            for client in range(2):
                self._restart_client(client)
        self._clients[1].consumer.close()
        drained: set[bytes] = set()
        idle = 0
        while idle < 2:
            self.kit.advance(self._model.quiet_at(self._now()) - self._now() + self._unit_s / 10 + self._slack_s)
            one = self._clients[0]
            found = self._take(one.consumer, 1000)
            self._received(found, 1000)
            self._settle(one, [Settlement(delivery, Action.ACK) for delivery in found])
            drained |= {delivery.body for delivery in found}
            idle = 0 if found else idle + 1
            assert len(drained) <= len(self._model.copies)
        transport = self._clients[1].transport
        letters = transport.dead_get([self._id(number) for number in range(7)]) if self._can["dead_letter"] else []
        lost = self._model.lost(drained, letters, self._now())
        assert not lost, f"lost: {', '.join(lost)}"
        if self._can["inspectable"]:
            for queue, stats in transport.stats(self._queues).items():
                assert not any(stats[:3]), f"nothing is left in {queue}, but it is not empty: {stats}"
