"""The part of the transport kit for transports that speak to a server: what a network does to a message.

For a kit class that gives ``address`` and ``through``. Each call is made through a
:class:`~dray.testing.chaos.ChaosProxy`; what became of the messages is then looked at without it. What a caller was
told must be true: "done" is never lost, "certainly not done" (``Unavailable``) is never there, only ``Uncertain`` may
be either; and nothing is there more than once too often.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from dray.core.errors import DrayError, TransportError, Unavailable, Uncertain
from dray.core.message import Action, Delivery, Settlement
from dray.testing.chaos import ChaosProxy
from dray.testing.harness import needs
from dray.testing.network import MARGIN_S, RECOVERY_S, RESETS, Answer, closed_port
from dray.testing.transport_reader import Reader

if TYPE_CHECKING:
    from dray.core.contracts import Transport
    from dray.testing.transports import TransportHarness
else:
    TransportHarness = object

QUEUES = ("q", "next", "warm")
WAY = pytest.mark.parametrize("way", ["up", "down"])


class NetworkTests(TransportHarness):
    """What every networked transport does when the network misbehaves."""

    # --- a bad line ----------------------------------------------------------------------------------------

    @needs("networked")
    def test_a_slow_link_changes_nothing_but_time(self) -> None:
        self._whole_life(latency=0.01, jitter=0.01, rate=100_000)

    @needs("networked")
    def test_a_link_of_single_bytes_changes_nothing(self) -> None:
        self._whole_life(slice=1)

    def _whole_life(self, **trouble: float) -> None:
        proxy = self.proxy()
        proxy.set(**trouble)
        transport = self._linked(proxy)
        transport.send([self.message(f"m{number}", body=b"\r\n\x00\xce" * 20) for number in range(5)])
        reader = Reader(self, transport)
        for number in range(5):
            delivery = reader.one()
            assert (delivery.id, delivery.body) == (f"m{number}", b"\r\n\x00\xce" * 20)
            assert transport.extend([delivery], transport.features.lease_s or 1) == []
            assert self.settle(transport, [delivery], Action.ACK, self.message(f"n{number}", "next")) == []
        reader.close()
        found = self._left(transport, "next", {f"n{number}" for number in range(5)})
        assert found == {f"n{number}": 1 for number in range(5)}
        assert self._left(transport, "q", ()) == {}

    # --- cut ------------------------------------------------------------------------------------------------

    @needs("networked")
    @WAY
    def test_a_cut_at_any_byte_of_a_send_is_told(self, way: str) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        points = self.cut_points(self.size(proxy, way, lambda: transport.send([self.message("measured")])))
        answers = {"measured": Answer.YES}
        for point in points:
            with_cut = self.message(f"cut-{point:04}")
            proxy.set(**{f"cut_{way}_after": point})
            answers[with_cut.id] = self.ask(lambda: transport.send([with_cut]))  # noqa: B023
            proxy.heal()
            self.until_it_works(lambda: transport.send([self.message("warm", "warm")]), "sending")
        assert proxy.connections > len(points), "the link was not cut"
        self._true(answers, self._left(transport, "q", said_yes(answers)))

    @needs("networked")
    @WAY
    def test_a_cut_at_any_byte_of_an_acknowledgement_loses_nothing(self, way: str) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        reader, charged, strict = Reader(self, transport), Counter[str](), transport.features.lease_s is not None
        transport.send([self.message("m0")])
        delivery = reader.one()
        points = self.cut_points(self.size(proxy, way, lambda: self._swap(transport, delivery)))
        ids = [f"m{number}" for number in range(len(points) + 1)]
        transport.send([self.message(id_) for id_ in ids[1:]])
        for point in points:
            settlement = self._swapping(reader.one())
            proxy.set(**{f"cut_{way}_after": point})
            answer = self.ask(lambda: transport.settle([settlement]))  # noqa: B023
            proxy.heal()
            if answer is not Answer.YES:
                self.until_it_works(lambda: transport.settle([settlement]), "settling")  # noqa: B023
            # Without leases an acknowledgement has no answer: it may be lost with the link, and nobody can know.
            charged[settlement.delivery.id] += answer is not Answer.YES or not strict
        reader.close()
        self._accounted(transport, reader, charged, ids)

    @needs("networked")
    def test_the_first_message_after_the_link_broke_is_not_lost(self) -> None:
        """Whether the transport has noticed or not."""
        proxy = self.proxy()
        transport = self._linked(proxy)
        answers: dict[str, Answer] = {}
        for number in range(6):
            proxy.reset_all()
            if number % 2:
                time.sleep(0.1)  # time to notice
            for id_ in (f"first-{number}", f"second-{number}"):
                answers[id_] = self.ask(lambda: transport.send([self.message(id_)]))  # noqa: B023
            self.until_it_works(lambda: transport.send([self.message("warm", "warm")]), "sending")
        self._true(answers, self._left(transport, "q", said_yes(answers)))

    @needs("networked")
    def test_resets_in_a_row_lose_nothing_and_it_goes_on(self) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        reader, answers = Reader(self, transport), dict[str, Answer]()
        for number in self.resets(proxy):
            id_ = f"m{len(answers)}-{number}"
            answers[id_] = self.ask(lambda: transport.send([self.message(id_)]))  # noqa: B023
            try:
                found = reader.receive(10, 0.01)
            except TransportError:
                continue
            self.ask(lambda: self.settle(transport, found))  # noqa: B023
        self.until_it_works(lambda: transport.send([self.message("after")]), "sending")
        reader.until("after", transport)
        reader.close()
        left = self._left(transport, "q", said_yes(answers) - reader.seen.keys())
        everything = reader.seen + left
        lost = said_yes(answers) - everything.keys()
        assert not lost, f"confirmed and lost: {sorted(lost)}"
        assert not {id_ for id_, answer in answers.items() if answer is Answer.NO} & everything.keys()
        # Each reset may have taken the answer of one send and of one settlement with it.
        assert everything.total() <= len(answers) + 1 + 2 * RESETS + len(left), everything.most_common(5)

    # --- answers that do not come ---------------------------------------------------------------------------

    @needs("networked")
    def test_a_lost_confirmation_is_told_as_uncertain(self) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        proxy.set(swallow_down=True)
        answers = {"lost": self.ask(lambda: transport.send([self.message("lost")]))}
        proxy.heal()
        self.until_it_works(lambda: transport.send([self.message("warm", "warm")]), "sending")
        answers["after"] = self.ask(lambda: transport.send([self.message("after")]))
        found = self._left(transport, "q", {"lost", "after"})
        assert answers == {"lost": Answer.MAYBE, "after": Answer.YES}
        self._true(answers, found)

    @needs("networked")
    def test_a_lost_answer_to_a_settlement_harms_nothing(self) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        transport.send([self.message("m0"), self.message("m1")])
        reader = Reader(self, transport)
        settlement = self._swapping(reader.one())
        proxy.set(swallow_down=True)
        answer = self.ask(lambda: transport.settle([settlement]))
        assert answer is not Answer.YES, "settled, it says, and the follow-up was not confirmed"
        proxy.heal()
        for _ in range(2):
            self.until_it_works(lambda: transport.settle([settlement]), "settling")
        reader.close()
        self._accounted(transport, reader, Counter(m0=1), ["m0", "m1"])

    @needs("networked")
    @pytest.mark.parametrize("call", ["send", "settle", "receive", "close"])
    def test_a_silent_peer_is_noticed(self, call: str) -> None:
        proxy = self.proxy()
        transport = self._linked(proxy)
        transport.send([self.message("held")])
        reader = Reader(self, transport)
        held = self._swapping(reader.one())
        proxy.set(stall=True)
        answers = dict[str, Answer]()
        if call == "send":
            answers["m"] = self.ask(lambda: transport.send([self.message("m")]))
            assert answers["m"] is not Answer.YES
        elif call == "settle":
            assert self.ask(lambda: transport.settle([held])) is not Answer.YES
        elif call == "receive":
            self._noticed(reader)
        else:
            self.within(transport.close)
        proxy.heal()
        if call != "close":
            self.until_it_works(lambda: transport.send([self.message("after")]), "sending")
            reader.until("after", transport)
        if call == "send":
            proxy.set(swallow_up=True)
            answers["nowhere"] = self.ask(lambda: transport.send([self.message("nowhere")]))
            assert answers["nowhere"] is not Answer.YES, "it took an answer to something else for the confirmation"
        reader.close()
        done = self._left(transport, "next", ())
        left = reader.seen + self._left(transport, "q", {"held"} - done.keys() - reader.seen.keys())
        assert "held" in left.keys() | done.keys()
        self._true(answers, left)

    def _noticed(self, reader: Reader) -> None:
        """A consumer that waits says that its link is lost."""
        deadline = time.monotonic() + self.silence_s + MARGIN_S
        with pytest.raises(TransportError):
            while time.monotonic() < deadline:
                assert reader.receive(1, 0.5) == []
            pytest.fail(f"a consumer waits at a peer that has been silent for {self.silence_s:g} s")

    @needs("networked", "broadcast")
    def test_who_listens_hears_again_after_the_link_broke(self) -> None:
        proxy = self.proxy()
        transport, other = self._linked(proxy), self.open_now()
        heard = threading.Event()
        stop = transport.listen("c", lambda _: heard.set())
        proxy.reset_all()
        deadline = time.monotonic() + RECOVERY_S
        while not heard.wait(0.05):
            assert time.monotonic() < deadline, f"nothing is heard {RECOVERY_S:g} s after the link broke"
            other.broadcast("c", b"still there?")
        stop()

    # --- nobody there, and nonsense ---------------------------------------------------------------------------

    @needs("networked")
    def test_who_refuses_is_named(self) -> None:
        port = closed_port()
        transport = self.through(port)
        with pytest.raises(Unavailable, match=str(port)):
            self.within(transport.open)
        self.within(transport.close)
        proxy = self.proxy()
        transport = self._linked(proxy)
        proxy.set(refuse=True)
        proxy.reset_all()
        answers = {"first": self.ask(lambda: transport.send([self.message("first")]))}
        with pytest.raises(TransportError, match=str(proxy.port)) as raised:  # now it knows
            self.within(lambda: transport.send([self.message("second")]))
        answers["second"] = Answer.MAYBE if isinstance(raised.value, Uncertain) else Answer.NO
        proxy.heal()
        self.until_it_works(lambda: transport.send([self.message("after")]), "sending")
        assert Answer.YES not in answers.values()
        self._true(answers, self._left(transport, "q", {"after"}))

    @needs("networked")
    @pytest.mark.parametrize("seed", range(2))
    def test_flipped_bits_raise_errors_of_ours_and_nothing_else(self, seed: int) -> None:
        self.open_now().send([self.message(f"m{number}") for number in range(3)])
        proxy = self.proxy(seed=seed)
        transport = self._linked(proxy)
        reader = Reader(self, transport)
        proxy.set(corrupt=0.01)
        for number in range(3):
            self._garbled(lambda: transport.send([self.message(f"garbled-{number}")]))  # noqa: B023
            found = self._garbled(lambda: reader.receive(1, 0.05)) or []
            self._garbled(lambda: self.settle(transport, found))  # noqa: B023
        proxy.heal()
        proxy.reset_all()
        self.within(transport.close)
        self.open_now().send([self.message("after", "next")])
        assert self._left(transport, "next", {"after"})["after"] == 1

    def _garbled(self, call: Callable[[], Any]) -> Any:
        try:
            return self.within(call)
        except DrayError as error:
            assert str(error)
            return None

    # --- pieces ---------------------------------------------------------------------------------------------

    def _linked(self, proxy: ChaosProxy) -> Any:
        """An opened transport that reaches its server through the proxy, and has sent a message."""
        transport = self.remember(self.through(proxy.port))
        self.within(transport.open, RECOVERY_S)
        self.within(lambda: transport.declare(QUEUES), RECOVERY_S)
        self.within(lambda: transport.send([self.message("warm", "warm")]), RECOVERY_S)
        return transport

    def _swapping(self, delivery: Delivery) -> Settlement:
        return Settlement(delivery, Action.ACK, (self.message(delivery.id, "next"),))

    def _swap(self, transport: Transport, delivery: Delivery) -> None:
        assert transport.settle([self._swapping(delivery)]) == []

    def _left(self, transport: Transport, queue: str, wanted: Iterable[str]) -> Counter[str]:
        """The ids in a queue once the transport under test is gone; waits for the wanted ones."""
        self.heal_network()
        self.within(transport.close)
        if transport.features.lease_s is not None:
            self.advance(transport.features.lease_s + 1)
        consumer, found = self.consume(self.open_now(), queue), Counter[str]()
        deadline = time.monotonic() + RECOVERY_S
        while not set(wanted) <= found.keys() and time.monotonic() < deadline:
            found.update(delivery.id for delivery in consumer.receive(1000, 0.1))
        found.update(self.ids(consumer))
        return found

    @staticmethod
    def _true(answers: Mapping[str, Answer], found: Counter[str]) -> None:
        """What callers were told is so."""
        for id_, answer in answers.items():
            assert answer is not Answer.YES or found[id_], f"{id_} was confirmed, and is lost"
            assert answer is not Answer.NO or not found[id_], f"{id_} was certainly not stored, and is there"
            assert found[id_] <= 2, f"one message, sent once, is there {found[id_]} times"

    def _accounted(self, transport: Transport, reader: Reader, charged: Counter[str], ids: Sequence[str]) -> None:
        """Each message is still there or its follow-up is; extra ones only where a fault took an answer with it."""
        done = self._left(transport, "next", ())
        left = self._left(transport, "q", set(ids) - done.keys())
        lost = set(ids) - done.keys() - left.keys()
        assert not lost, f"neither there, nor what follows: {sorted(lost)}"
        for id_ in ids:
            often = reader.seen[id_] + left[id_]
            assert often <= 1 + charged[id_], f"{id_} came {often} times, {charged[id_]} answers were lost"
            assert done[id_] <= 1 + charged[id_], f"the follow-up of {id_} was published {done[id_]} times"


def said_yes(answers: Mapping[str, Answer]) -> set[str]:
    """Those that must be there."""
    return {id_ for id_, answer in answers.items() if answer is Answer.YES}
