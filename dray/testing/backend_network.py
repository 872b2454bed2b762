"""The part of the result back end kit for those that speak to a server: what a network does to a result.

For a kit class that gives ``address`` and ``through``. What a caller was told must be true: "stored" is never lost,
"certainly not stored" (``Unavailable``) is never there, and "nothing is known of it" is no answer to a lost question.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import Barrier
from dray.core.errors import DrayError, TransportError, Unavailable, Uncertain
from dray.core.message import StoredResult
from dray.testing.chaos import ChaosProxy
from dray.testing.harness import Background, needs
from dray.testing.network import MARGIN_S, RECOVERY_S, Answer, closed_port

if TYPE_CHECKING:
    from dray.testing.backends import BackendHarness
else:
    BackendHarness = object

WAY = pytest.mark.parametrize("way", ["up", "down"])


class BackendNetworkTests(BackendHarness):
    """What every networked back end does when the network misbehaves."""

    @needs("networked", "keeps")
    @pytest.mark.parametrize("trouble", [{"latency": 0.01, "jitter": 0.01, "rate": 100_000}, {"slice": 1}])
    def test_a_bad_line_changes_nothing_but_time(self, trouble: dict[str, float]) -> None:
        proxy = self.proxy()
        proxy.set(**trouble)
        backend = self._linked(proxy)
        results = {f"r{number}": self.result(f"r{number}", body=b"\r\n\x00\xce" * 20) for number in range(5)}
        backend.store(list(results.values()))
        assert backend.fetch([*results, "unknown"]) == results
        assert set(self.within(lambda: backend.wait(["r0", "unknown"], 30))) == {"r0"}
        backend.delete(["r0"])
        assert set(backend.fetch(list(results))) == results.keys() - {"r0"}
        if isinstance(backend, Barrier):
            assert [backend.arrive("g", member, 2) for member in "ab"] == [False, True]

    # --- cut ------------------------------------------------------------------------------------------------

    @needs("networked", "keeps")
    @WAY
    def test_a_cut_at_any_byte_of_a_store_is_told(self, way: str) -> None:
        proxy = self.proxy()
        backend = self._linked(proxy)
        points = self.cut_points(self.size(proxy, way, lambda: backend.store([self.result("measured")])))
        answers = {"measured": Answer.YES}
        for point in points:
            cut = self.result(f"cut-{point:04}")
            proxy.set(**{f"cut_{way}_after": point})
            answers[cut.id] = self.ask(lambda: backend.store([cut]))  # noqa: B023
            proxy.heal()
            self.until_it_works(lambda: backend.store([self.result("warm")]), "storing")
        assert proxy.connections > len(points), "the link was not cut"
        self._true(answers)

    @needs("networked", "keeps")
    @WAY
    def test_a_cut_at_any_byte_of_a_fetch_is_no_answer(self, way: str) -> None:
        proxy = self.proxy()
        backend = self._linked(proxy)
        backend.store([self.result()])
        for point in self.cut_points(self.size(proxy, way, lambda: backend.fetch(["r"]))):
            proxy.set(**{f"cut_{way}_after": point})
            fetched = self._or_error(lambda: backend.fetch(["r"]))
            assert fetched in ({"r": self.result()}, None), f"cut after {point} bytes: {fetched}"
            proxy.heal()
            fetched = self.until_it_works(lambda: backend.fetch(["r"]), "fetching")
            assert fetched == {"r": self.result()}

    @needs("networked", "barrier")
    @WAY
    def test_who_arrives_again_after_a_cut_is_told_the_same(self, way: str) -> None:
        proxy = self.proxy()
        backend = self._linked(proxy)
        assert not backend.arrive("measured", "a", 2)
        for point in self.cut_points(self.size(proxy, way, lambda: backend.arrive("measured", "b", 2))):
            group = f"g{point}"
            for member, last in (("a", False), ("b", True)):
                proxy.set(**{f"cut_{way}_after": point})
                told = self._or_error(lambda: backend.arrive(group, member, 2))  # noqa: B023
                assert told in (last, None)
                proxy.heal()
                told = self.until_it_works(lambda: backend.arrive(group, member, 2), "arriving")  # noqa: B023
                assert told is last

    # --- answers that do not come ---------------------------------------------------------------------------

    @needs("networked", "keeps")
    def test_a_lost_answer_is_told_and_mixed_up_with_no_other(self) -> None:
        proxy = self.proxy()
        backend = self._linked(proxy)
        backend.store([self.result("known")])
        proxy.set(swallow_down=True)
        assert self.ask(lambda: backend.store([self.result("lost")])) is Answer.MAYBE
        assert self._or_error(lambda: backend.fetch(["known"])) is None
        proxy.heal()
        fetched = self.until_it_works(lambda: backend.fetch(["known", "lost"]), "fetching")
        assert fetched == {id_: self.result(id_) for id_ in ("known", "lost")}
        assert backend.fetch(["unknown"]) == {}

    @needs("networked", "keeps")
    @pytest.mark.parametrize("call", ["store", "fetch", "wait", "close"])
    def test_a_silent_peer_is_noticed(self, call: str) -> None:
        proxy = self.proxy()
        backend = self._linked(proxy)
        calls: Mapping[str, Callable[[], object]] = {
            "store": lambda: backend.store([self.result()]),
            "fetch": lambda: backend.fetch(["r"]),
            "wait": lambda: backend.wait(["r"], self.silence_s + MARGIN_S / 2),
            "close": backend.close,
        }
        proxy.set(stall=True)
        if call in ("store", "fetch"):
            assert self.ask(calls[call]) is not Answer.YES
        else:  # a wait that ends with its time-out tells no lie
            assert not self._or_error(calls[call])
        proxy.heal()
        if call != "close":
            self.until_it_works(lambda: backend.store([self.result("after")]), "storing")
            assert set(self.until_it_works(lambda: backend.fetch(["after"]), "fetching")) == {"after"}

    @needs("networked", "keeps")
    def test_who_waits_is_served_after_the_link_broke(self) -> None:
        """By the call that waits, or by the next one after an error; never by a time-out."""
        proxy = self.proxy()
        backend, direct = self._linked(proxy), self.open(SystemClock())
        began, found = threading.Event(), dict[str, StoredResult]()

        def wait() -> None:
            deadline = time.monotonic() + RECOVERY_S
            while not found and time.monotonic() < deadline:
                began.set()
                found.update(self._or_error(lambda: backend.wait(["r"], RECOVERY_S)) or {})

        background = Background()
        background.start(wait)
        assert began.wait(MARGIN_S)
        threading.Event().wait(0.05)  # let it get into the wait as a rule; the test holds either way
        proxy.reset_all()
        threading.Event().wait(0.05)
        direct.store([self.result()])
        background.join(RECOVERY_S / 2)
        assert found == {"r": self.result()}

    # --- nobody there, and nonsense ---------------------------------------------------------------------------

    @needs("networked", "keeps")
    def test_who_refuses_is_named(self) -> None:
        port = closed_port()
        backend = self.through(port)
        with pytest.raises(Unavailable, match=str(port)):
            self.within(backend.open)
        self.within(backend.close)
        proxy = self.proxy()
        backend = self._linked(proxy)
        proxy.set(refuse=True)
        proxy.reset_all()
        answers = {"first": self.ask(lambda: backend.store([self.result("first")]))}
        with pytest.raises(TransportError, match=str(proxy.port)) as raised:  # now it knows
            self.within(lambda: backend.store([self.result("second")]))
        answers["second"] = Answer.MAYBE if isinstance(raised.value, Uncertain) else Answer.NO
        proxy.heal()
        assert Answer.YES not in answers.values()
        self._true(answers)
        self.until_it_works(lambda: backend.store([self.result("after")]), "storing")

    @needs("networked", "keeps")
    @pytest.mark.parametrize("seed", range(2))
    def test_flipped_bits_raise_errors_of_ours_and_nothing_else(self, seed: int) -> None:
        proxy = self.proxy(seed=seed)
        backend = self._linked(proxy)
        proxy.set(corrupt=0.01)
        for number in range(5):
            self._or_error(lambda: backend.store([self.result(f"garbled-{number}")]))  # noqa: B023
            self._or_error(lambda: backend.fetch([f"garbled-{number}"]))  # noqa: B023
        proxy.heal()
        proxy.reset_all()
        self.within(backend.close)
        direct = self.open(SystemClock())
        direct.store([self.result("after")])
        assert direct.fetch(["after"]) == {"after": self.result("after")}

    # --- pieces ---------------------------------------------------------------------------------------------

    def _linked(self, proxy: ChaosProxy) -> Any:
        """An opened back end that reaches its server through the proxy, and has stored a result."""
        backend = self.remember(self.through(proxy.port))
        self.within(backend.open, RECOVERY_S)
        self.within(lambda: backend.store([self.result("warm")]), RECOVERY_S)
        self.within(lambda: backend.fetch(["warm"]), RECOVERY_S)
        return backend

    def _or_error(self, call: Callable[[], Any]) -> Any:
        """What a call returns in bounded time, None if one of dray's errors comes out of it."""
        try:
            return self.within(call, self.silence_s + MARGIN_S)
        except DrayError as error:
            assert str(error)
            return None

    def _true(self, answers: Mapping[str, Answer]) -> None:
        """What callers were told is so."""
        found = self.open(SystemClock()).fetch(list(answers))
        for id_, answer in answers.items():
            assert answer is not Answer.YES or id_ in found, f"{id_} was stored, and is lost"
            assert answer is not Answer.NO or id_ not in found, f"{id_} was certainly not stored, and is there"
