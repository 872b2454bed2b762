"""The conformance kit for result back ends: what :class:`~dray.core.contracts.ResultBackend` promises, as tests.

A plugin's test module holds a subclass; one method is enough where there is no server::

    from dray.testing import ResultBackendConformance, plugin_context

    class TestMine(ResultBackendConformance):
        def make(self, clock):
            options = MyBackend.Options(url="mine://127.0.0.1:7777", prefix=self.tmp_path.name)
            return MyBackend(options, plugin_context("mine", clock))

        def restart(self):                                   # from D2 on: with SIGKILL
            subprocess.run(["docker", "restart", "--signal", "KILL", "mine"], check=True)

        address = ("127.0.0.1", 7777)

        def through(self, port):                             # the same server behind a proxy that makes trouble
            options = MyBackend.Options(url=f"mine://127.0.0.1:{port}", prefix=self.tmp_path.name, timeout=1)
            return MyBackend(options, plugin_context("mine", SystemClock()))

Each test gets an empty store (above: keys of its own, by their prefix) and uses the contract alone. A test for an
ability that the plugin does not declare is reported as not applicable; a declared one must hold, and none of the tests
can be left out. ``DRAY_CONFORMANCE_REPORT=path`` writes down what was proven.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dray.core.clock import Clock, SystemClock
from dray.core.contracts import API_VERSION, Barrier, Durability, ResultBackend
from dray.core.errors import TooLarge
from dray.core.message import TERMINAL, State, StoredResult
from dray.testing.backend_life import BackendLifeTests
from dray.testing.backend_network import BackendNetworkTests
from dray.testing.clock import FakeClock
from dray.testing.harness import ODD_NAMES, PROMPT_S, Background, needs
from dray.testing.kit import Conformance
from dray.testing.network import Network


class BackendHarness(Network, Conformance):
    """What the tests of the kit call; a subclass gives ``make``, and overrides the rest where a server needs it."""

    kind = "backends"
    proofs: ClassVar[Mapping[str, str]] = {
        "keeps": "keeps",
        "durability": "durable",
        "push": "push",
        "max_body_bytes": "keeps",
        "shared": "shared",
    }
    clock: FakeClock

    def make(self, clock: Clock) -> ResultBackend:
        """A new back end, not yet opened, over this test's store: each call stands for another process.

        Where ``features.shared`` is false, each call may be a store of its own.
        """
        raise NotImplementedError

    def through(self, port: int) -> ResultBackend:
        """A new back end on the machine's clock, not yet opened, whose server is reached at 127.0.0.1:``port``.

        For a plugin that speaks to a server at :attr:`address`: a proxy listens at that port. With time-outs (or
        heartbeats) that notice a silent peer within :attr:`silence_s`.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Restart the server. Without one there is nothing to do."""

    def advance(self, seconds: float) -> None:
        """Let time pass. A back end that lives by its server's clock overrides this."""
        self.clock.advance(seconds)

    def break_store(self) -> None:
        """Make this test's store fail from now on, as far as a test can: stop the server, spoil the files."""

    def begin(self, tmp_path: Path) -> None:
        super().begin(tmp_path)
        self.clock = FakeClock()
        self._backends: list[ResultBackend] = []
        self.begin_network()

    def end(self) -> None:
        self.end_network()
        for backend in self._backends:
            backend.close()

    def sample(self) -> ResultBackend:
        if not self._backends:
            self.open()
        return self._backends[0]

    def abilities(self) -> Mapping[str, bool]:
        backend = self.sample()
        features = backend.features
        return {
            "keeps": features.keeps,
            "no_keeps": not features.keeps,
            "shared": features.shared,
            "durable": features.durability >= Durability.D1,
            "push": features.push,
            "barrier": isinstance(backend, Barrier),
            "networked": type(self).through is not BackendHarness.through,
            "driver_errors": type(self).break_store is not BackendHarness.break_store,
        }

    def open(self, clock: Clock | None = None) -> Any:
        """An opened back end (any ability may be called on it: the tests say what they need)."""
        backend = self.remember(self.make(clock or self.clock))
        backend.open()
        return backend

    def remember(self, backend: ResultBackend) -> Any:
        """It is closed at the end."""
        self._backends.append(backend)
        return backend

    def result(
        self, id_: str = "r", state: State = State.SUCCESS, body: bytes = b"value", expires_in_s: float | None = 3600
    ) -> StoredResult:
        return StoredResult(id_, state, body, None if expires_in_s is None else self.clock.time() + expires_in_s)


class ResultBackendConformance(BackendLifeTests, BackendNetworkTests, BackendHarness):
    """All that is pinned for result back ends. Subclass it, give ``make``."""

    # --- every back end ------------------------------------------------------------------------------------

    def test_declared_features_fit_each_other(self) -> None:
        backend = self.open()
        assert backend.api == API_VERSION
        assert backend.features.max_body_bytes >= 2**16
        assert backend.features.shared or backend.features.durability == Durability.D0

    def test_unknown_ids_are_left_out(self) -> None:
        backend = self.open()
        backend.delete(["unknown"])
        assert backend.fetch(["unknown", ""]) == {}
        assert backend.fetch([]) == {}

    def test_empty_batches_do_nothing(self) -> None:
        backend = self.open()
        backend.store([])
        backend.delete([])
        assert backend.wait([], 0) == {}

    def test_close_may_come_before_open_and_twice(self) -> None:
        backend = self.make(self.clock)
        backend.close()
        backend.open()
        backend.open()
        backend.store([self.result()])
        backend.close()
        backend.close()

    @needs("no_keeps")
    def test_a_back_end_that_keeps_nothing_says_nothing(self) -> None:
        backend = self.open()
        backend.store([self.result()])
        assert backend.fetch(["r"]) == {}
        started = time.monotonic()
        assert backend.wait(["r"], 60) == {}
        assert time.monotonic() - started < PROMPT_S

    # --- store and fetch -----------------------------------------------------------------------------------

    @needs("keeps")
    @pytest.mark.parametrize("state", list(State))
    def test_a_result_comes_back_as_it_was_stored(self, state: State) -> None:
        backend = self.open()
        result = self.result("r", state, bytes(range(256)))
        backend.store([result])
        fetched = backend.fetch(["r", "unknown"])
        assert fetched == {"r": result}
        assert isinstance(fetched["r"].state, State)

    @needs("keeps")
    def test_an_empty_body_is_kept(self) -> None:
        backend = self.open()
        backend.store([self.result(body=b"")])
        assert backend.fetch(["r"])["r"].body == b""

    @needs("keeps")
    def test_a_large_batch_is_stored_and_fetched(self) -> None:
        backend = self.open()
        results = {f"r{number}": self.result(f"r{number}", body=b"%d" % number) for number in range(1000)}
        backend.store(list(results.values()))
        assert backend.fetch(list(results)) == results
        backend.delete(list(results))
        assert backend.fetch(list(results)) == {}

    @needs("keeps", "shared")
    def test_other_instances_see_what_was_stored(self) -> None:
        self.open().store([self.result()])
        other = self.open()
        assert other.fetch(["r"]) == {"r": self.result()}
        other.delete(["r"])
        assert self.open().fetch(["r"]) == {}

    @needs("keeps")
    @pytest.mark.parametrize("over", [0, 1])
    def test_the_size_limit_is_kept(self, over: int) -> None:
        backend = self.open()
        large = self.result("large", body=b"x" * (backend.features.max_body_bytes + over))
        if not over:
            backend.store([large])
            assert backend.fetch(["large"]) == {"large": large}
            return
        with pytest.raises(TooLarge):
            backend.store([self.result("small"), large])
        assert backend.fetch(["small", "large"]) == {}

    @needs("keeps")
    def test_odd_ids_are_told_apart(self) -> None:
        backend = self.open()
        results = {name: self.result(name, body=name.encode()) for name in ODD_NAMES}
        backend.store(list(results.values()))
        assert backend.fetch(ODD_NAMES) == results
        backend.delete(["../x"])
        assert set(backend.fetch(ODD_NAMES)) == set(ODD_NAMES) - {"../x"}

    # --- which one wins ------------------------------------------------------------------------------------

    @needs("keeps")
    def test_a_state_that_is_not_terminal_is_replaced(self) -> None:
        backend = self.open()
        for state in (State.STARTED, State.RETRY, State.STARTED, State.SUCCESS):
            backend.store([self.result(state=state, body=state.encode())])
            assert backend.fetch(["r"])["r"] == self.result(state=state, body=state.encode())

    @needs("keeps")
    @pytest.mark.parametrize("first", sorted(TERMINAL))
    @pytest.mark.parametrize("later", list(State))
    def test_the_first_terminal_state_is_never_replaced(self, first: State, later: State) -> None:
        backend = self.open()
        backend.store([self.result(state=first, body=b"first")])
        backend.store([self.result(state=later, body=b"later", expires_in_s=9999)])
        assert backend.fetch(["r"]) == {"r": self.result(state=first, body=b"first")}

    @needs("keeps")
    def test_the_first_wins_within_a_batch(self) -> None:
        backend = self.open()
        bodies = [(State.STARTED, b"0"), (State.SUCCESS, b"1"), (State.FAILURE, b"2"), (State.STARTED, b"3")]
        backend.store([self.result(state=state, body=body) for state, body in bodies])
        assert backend.fetch(["r"])["r"].body == b"1"

    @needs("keeps")
    def test_a_deleted_result_may_be_stored_anew(self) -> None:
        backend = self.open()
        backend.store([self.result(body=b"first")])
        backend.delete(["r"])
        backend.store([self.result(body=b"second")])
        assert backend.fetch(["r"])["r"].body == b"second"

    @needs("keeps")
    def test_of_many_at_once_one_wins_for_good(self) -> None:
        backends = [self.open(), self.open()] if self.abilities()["shared"] else [self.open()] * 2
        seen: list[bytes] = []
        ready = threading.Barrier(6)

        def compete(backend: ResultBackend, body: bytes) -> None:
            ready.wait(PROMPT_S)
            backend.store([self.result(body=body)])
            seen.append(backend.fetch(["r"])["r"].body)

        background = Background()
        for number in range(6):
            background.start(compete, backends[number % 2], b"%d" % number)
        background.join()
        assert len(seen) == 6
        assert len(set(seen)) == 1

    # --- expiry --------------------------------------------------------------------------------------------

    @needs("keeps")
    def test_an_expired_result_is_gone_and_may_be_stored_anew(self) -> None:
        backend = self.open()
        backend.store([self.result("short", expires_in_s=10), self.result("ever", expires_in_s=None)])
        self.advance(9)
        assert set(backend.fetch(["short", "ever"])) == {"short", "ever"}
        self.advance(2)
        assert set(backend.fetch(["short", "ever"])) == {"ever"}
        backend.store([self.result("short", body=b"anew")])
        assert backend.fetch(["short"])["short"].body == b"anew"
        self.advance(50 * 366 * 86400)
        assert backend.fetch(["ever"])["ever"].expires_at is None

    @needs("keeps")
    def test_an_expired_state_that_is_not_terminal_is_gone(self) -> None:
        backend = self.open()
        backend.store([self.result(state=State.STARTED, expires_in_s=10)])
        self.advance(11)
        assert backend.fetch(["r"]) == {}

    # --- wait ----------------------------------------------------------------------------------------------

    @needs("keeps")
    def test_wait_returns_what_is_there_at_once(self) -> None:
        backend = self.open(SystemClock())
        backend.store([self.result("a"), self.result("b", State.FAILURE), self.result("c", State.STARTED)])
        started = time.monotonic()
        assert set(backend.wait(["a", "b", "c", "d"], 60)) == {"a", "b"}
        assert time.monotonic() - started < PROMPT_S

    @needs("keeps")
    def test_wait_returns_nothing_after_its_timeout(self) -> None:
        backend = self.open(SystemClock())
        backend.store([self.result("started", State.STARTED)])
        started = time.monotonic()
        assert backend.wait(["started", "unknown"], 0.1) == {}
        assert 0.09 <= time.monotonic() - started < PROMPT_S
        assert backend.wait(["unknown"], 0) == {}

    @needs("keeps")
    @pytest.mark.parametrize("count", [2, 100])
    def test_wait_returns_as_soon_as_there_is_one(self, count: int) -> None:
        waiting, about_to_wait = self.open(SystemClock()), threading.Event()
        storing = self.open(SystemClock()) if self.abilities()["shared"] else waiting
        ids = [f"r{number}" for number in range(count)]
        found: dict[str, StoredResult] = {}

        def wait() -> None:
            about_to_wait.set()
            found.update(waiting.wait([*ids, ids[0]], 30))

        background = Background()
        background.start(wait)
        assert about_to_wait.wait(PROMPT_S)
        storing.store([self.result(ids[0], State.STARTED)])
        # Let it get into the wait as a rule; the test holds either way.
        threading.Event().wait(0.05)
        storing.store([self.result(ids[1])])
        background.join(PROMPT_S)
        assert set(found) == {ids[1]}

    @needs("keeps", "push")
    def test_a_pushed_result_is_not_polled_for(self) -> None:
        backend = self.open(SystemClock())
        assert type(backend).wait is not ResultBackend.wait, "it declares push, and polls as every back end does"
        started, woken_at = threading.Event(), [0.0]

        def wait() -> None:
            started.set()
            assert set(backend.wait(["r"], 30)) == {"r"}
            woken_at[0] = time.monotonic()

        background = Background()
        background.start(wait)
        assert started.wait(PROMPT_S)
        # Long enough for one that polls ever slower to have become slow.
        threading.Event().wait(0.3)
        stored_at = time.monotonic()
        backend.store([self.result()])
        background.join(PROMPT_S)
        assert woken_at[0] - stored_at < PROMPT_S
