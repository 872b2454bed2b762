"""The part of the result back end kit about barriers, and about life and death: close, restarts, forks, failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from dray.core.clock import SystemClock
from dray.core.contracts import Barrier
from dray.core.errors import TransportError, Unavailable
from dray.testing.harness import ODD_NAMES, Background, in_child, needs

if TYPE_CHECKING:
    from dray.testing.backends import BackendHarness
else:
    BackendHarness = object


class BackendLifeTests(BackendHarness):
    """Who arrived, what survives, and what is said when nothing works any more."""

    # --- barrier -------------------------------------------------------------------------------------------

    @needs("barrier")
    def test_the_last_distinct_member_is_told_and_told_again(self) -> None:
        """Again, because its worker may have died between the answer and what it did with it."""
        backend = self.open()
        told = [(member, backend.arrive("g", member, 3)) for member in ["a", "b", "a", "b", "c", "a", "c", "b"]]
        assert [member for member, last in told if last] == ["c", "c"]

    @needs("barrier")
    def test_groups_are_told_apart(self) -> None:
        backend = self.open()
        assert not any(backend.arrive(name, "a", 2) for name in ODD_NAMES)
        assert all(backend.arrive(name, name * 2, 2) for name in ODD_NAMES)
        assert backend.arrive("single", "a", 1)

    @needs("barrier")
    def test_members_that_arrive_at_once_tell_one_of_them(self) -> None:
        backends = [self.open(), self.open()] if self.abilities()["shared"] else [self.open()] * 2
        told: list[tuple[int, bool]] = []

        def arrive(backend: Barrier, first: int) -> None:
            members = [number % 50 for number in range(first, first + 50)]
            told.extend((member, backend.arrive("g", f"m{member}", 50)) for member in members)

        background = Background()
        for number in range(4):
            background.start(arrive, backends[number % 2], number * 20)
        background.join()
        assert len({member for member, last in told if last}) == 1
        assert len(told) == 200

    # --- life ----------------------------------------------------------------------------------------------

    @needs("keeps", "durable")
    def test_results_and_groups_survive_reopening(self) -> None:
        backend = self.open()
        backend.store([self.result()])
        is_barrier = isinstance(backend, Barrier)
        if is_barrier:
            assert not backend.arrive("g", "a", 2)
        backend.close()
        self.restart()
        backend = self.open()
        assert backend.fetch(["r"]) == {"r": self.result()}
        if is_barrier:
            assert backend.arrive("g", "b", 2)

    @needs("keeps", "shared")
    def test_a_forked_child_and_its_parent_go_on_side_by_side(self) -> None:
        backend = self.open(SystemClock())
        backend.store([self.result("before")])

        def child() -> None:
            own = self.make(SystemClock())
            own.open()
            own.store([self.result(f"child {number}") for number in range(20)])
            own.close()

        def parent() -> None:
            backend.store([self.result(f"parent {number}") for number in range(20)])

        assert in_child(child, parent) == 0
        ids = ["before", *(f"{who} {number}" for who in ("child", "parent") for number in range(20))]
        assert set(backend.fetch(ids)) == set(ids)

    @needs("keeps")
    def test_after_close_every_call_says_unavailable(self) -> None:
        backend = self.open()
        backend.store([self.result()])
        backend.close()
        for name, call in self._calls(backend).items():
            with pytest.raises(Unavailable):
                call()
                pytest.fail(f"{name} worked after close")

    @needs("keeps", "driver_errors")
    def test_no_driver_exception_escapes(self) -> None:
        backend = self.open(SystemClock())
        backend.store([self.result()])
        self.break_store()
        failed = 0
        calls = {**self._calls(backend), "open": self.open}
        for call in calls.values():
            try:
                call()
            except TransportError as error:
                assert str(error)
                failed += 1
        assert failed, "break_store() broke nothing"
        backend.close()

    def _calls(self, backend: Any) -> dict[str, Callable[[], object]]:
        """All that can be asked of a back end, by name."""
        calls: dict[str, Callable[[], object]] = {
            "store": lambda: backend.store([self.result()]),
            "fetch": lambda: backend.fetch(["r"]),
            "delete": lambda: backend.delete(["r"]),
            "wait": lambda: backend.wait(["r"], 0.1),
        }
        if isinstance(backend, Barrier):
            calls["arrive"] = lambda: backend.arrive("g", "m", 2)
        return calls
