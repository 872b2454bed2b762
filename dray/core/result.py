"""What became of a call, as its caller sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from dray.core.errors import NoResults, ResultTimeout, TaskRevoked
from dray.core.failure import SafeErrors
from dray.core.message import TERMINAL, State, StoredResult

if TYPE_CHECKING:
    from dray.core.clock import Clock
    from dray.core.codec import Codec
    from dray.core.contracts import ResultBackend

R = TypeVar("R")
SLICE = 1000


class Snapshot(NamedTuple):
    """A stored state, decoded. ``value`` is the result, the error record or the progress note, by ``state``."""

    state: State
    value: Any


class Results:
    """Reads results for callers: fetch, wait, decode, rebuild errors. Any thread."""

    def __init__(self, backend: ResultBackend, codec: Codec, safe_errors: SafeErrors, clock: Clock) -> None:
        self._backend = backend
        self._codec = codec
        self._safe_errors = safe_errors
        self._clock = clock

    def require(self, ids: Sequence[str]) -> None:
        """Raises ``NoResults`` when nothing is kept."""
        if not self._backend.features.keeps:
            raise NoResults(
                f"the result of {ids[0] if ids else 'no task'} is not kept: no result back end is configured; add "
                "'backend: sqlite' (or another) to the configuration of the callers and the workers"
            )

    def snapshots(self, ids: Sequence[str]) -> dict[str, Snapshot]:
        """What is known of these ids; what is not there is pending."""
        self.require(ids)
        return {key: self.decode(stored) for key, stored in self._backend.fetch(ids).items()}

    def decode(self, stored: StoredResult) -> Snapshot:
        return Snapshot(State(stored.state), self._codec.decode_result(stored))

    def wait(self, ids: Sequence[str], timeout_s: float | None) -> Iterator[tuple[str, Snapshot]]:
        """(id, terminal snapshot) of each id as it ends; raises ``ResultTimeout`` when the time is up."""
        self.require(ids)
        left = dict.fromkeys(ids)
        deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
        while left:
            pause_s = 60.0 if deadline is None else deadline - self._clock.monotonic()
            some = list(left)[:SLICE]
            found = self._backend.wait(some, max(0.0, min(pause_s, 60.0 if len(some) == len(left) else 1.0)))
            for key, stored in found.items():
                del left[key]
                yield key, self.decode(stored)
            if len(some) < len(left) and not found:  # rotate, so that every slice is looked at
                left = dict.fromkeys([*list(left)[SLICE:], *some])
            if left and deadline is not None and self._clock.monotonic() >= deadline:
                raise ResultTimeout(
                    f"{len(left)} of {len(ids)} results not there after {timeout_s} s; first: {next(iter(left))}"
                )

    async def await_(self, ids: Sequence[str], timeout_s: float | None) -> dict[str, Snapshot]:
        """All terminal snapshots. Polls from a worker thread, 2 ms up to 100 ms apart, so that no thread is held."""
        import asyncio  # a third of the time that importing dray would take

        self.require(ids)
        left, found = dict.fromkeys(ids), dict[str, Snapshot]()
        deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
        pause_s = 0.002
        while True:
            wanted = list(left)
            for at in range(0, len(wanted), SLICE):
                known = await asyncio.to_thread(self._backend.fetch, wanted[at : at + SLICE])
                for key, stored in known.items():
                    if stored.state in TERMINAL:
                        del left[key]
                        found[key] = self.decode(stored)
            if not left:
                return found
            if deadline is not None and self._clock.monotonic() >= deadline:
                raise ResultTimeout(
                    f"{len(left)} of {len(ids)} results not there after {timeout_s} s; first: {next(iter(left))}"
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, 0.1)

    def value(self, task_id: str, snapshot: Snapshot) -> Any:
        """The task's value; raises what the task raised."""
        if snapshot.state is State.SUCCESS:
            return snapshot.value
        if snapshot.state is State.REVOKED:
            raise TaskRevoked(f"task {task_id} was revoked")
        raise self._safe_errors.rebuild(snapshot.value)

    def delete(self, ids: Sequence[str]) -> None:
        self._backend.delete(ids)


class Revoker(Protocol):
    """What can revoke: the client."""

    def revoke(self, ids: Sequence[str], *, terminate: bool = False) -> None: ...


class AsyncResult(Generic[R]):
    """One call's future result. Holds only the id; every question is asked of the result back end. Any thread."""

    __slots__ = ("_ignored", "_results", "_revoker", "id")

    def __init__(self, task_id: str, results: Results, revoker: Revoker, ignored: bool = False) -> None:
        self.id = task_id
        self._results = results
        self._revoker = revoker
        self._ignored = ignored

    def get(self, timeout: float | None = None) -> R:
        """The value, waiting up to ``timeout`` seconds (None: as long as it takes).

        Raises ``ResultTimeout``; what the task raised (the class itself if it is built in or registered with
        ``app.safe_error``, else ``TaskFailed``); ``TaskRevoked``; ``NoResults``.
        """
        self._check()
        ((_, snapshot),) = self._results.wait((self.id,), timeout)
        return self._results.value(self.id, snapshot)  # type: ignore[no-any-return]

    async def aget(self, timeout: float | None = None) -> R:
        """:meth:`get` for coroutines."""
        self._check()
        found = await self._results.await_((self.id,), timeout)
        return self._results.value(self.id, found[self.id])  # type: ignore[no-any-return]

    @property
    def state(self) -> State:
        """The state now; ``PENDING`` also for ids that nobody knows."""
        return self._snapshot().state

    @property
    def info(self) -> Any:
        """By state: the last progress note, the value, the exception; None when nothing is known."""
        snapshot = self._snapshot()
        if snapshot.state in (State.FAILURE, State.RETRY):
            return self._results._safe_errors.rebuild(snapshot.value)  # noqa: SLF001
        return snapshot.value

    @property
    def progress(self) -> Any:
        """The last ``current().progress(...)`` of a task that runs, as a mapping; None before and after."""
        snapshot = self._snapshot()
        return snapshot.value if snapshot.state is State.STARTED else None

    @property
    def traceback(self) -> str | None:
        """The worker's formatted traceback of a task that failed or is being retried."""
        snapshot = self._snapshot()
        failed = snapshot.state in (State.FAILURE, State.RETRY) and isinstance(snapshot.value, Mapping)
        return str(snapshot.value.get("traceback") or "") if failed else None

    def ready(self) -> bool:
        """True when it ended, well or not."""
        return self.state in TERMINAL

    def successful(self) -> bool:
        """True when it ended well."""
        return self.state is State.SUCCESS

    def failed(self) -> bool:
        """True when it ended with an error."""
        return self.state is State.FAILURE

    def forget(self) -> None:
        """Delete the stored result."""
        self._check()
        self._results.delete((self.id,))

    def revoke(self, *, terminate: bool = False) -> None:
        """Never start it; if it runs already, ``terminate`` ends it (on pools that can)."""
        self._revoker.revoke((self.id,), terminate=terminate)

    def _check(self) -> None:
        if self._ignored:
            raise NoResults(f"the result of {self.id} is not kept: the task, or the call, says ignore_result")
        self._results.require((self.id,))

    def _snapshot(self) -> Snapshot:
        self._check()
        return self._results.snapshots((self.id,)).get(self.id, Snapshot(State.PENDING, None))

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"


class GroupResult(Generic[R]):
    """The results of a batch of calls, in the order they were given."""

    def __init__(self, ids: Sequence[str], results: Results, revoker: Revoker, ignored: bool = False) -> None:
        self.ids = list(ids)
        self._ignored = ignored
        self._results = results
        self._revoker = revoker

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[AsyncResult[R]]:
        return (AsyncResult(key, self._results, self._revoker, self._ignored) for key in self.ids)

    def get(self, timeout: float | None = None) -> list[R]:
        """All values, in order. Raises what the first failed one (in order) raised, once all have ended."""
        self._check()
        found = dict(self._results.wait(self.ids, timeout))
        return [self._results.value(key, found[key]) for key in self.ids]

    async def aget(self, timeout: float | None = None) -> list[R]:
        """:meth:`get` for coroutines."""
        self._check()
        found = await self._results.await_(self.ids, timeout)
        return [self._results.value(key, found[key]) for key in self.ids]

    def as_completed(self, timeout: float | None = None) -> Iterator[tuple[str, R | BaseException]]:
        """(id, value or exception) of each as it ends."""
        self._check()
        for key, snapshot in self._results.wait(self.ids, timeout):
            try:
                yield key, self._results.value(key, snapshot)
            except Exception as error:
                yield key, error

    def ready_count(self) -> int:
        """How many have ended."""
        stored = (self._results.snapshots(self.ids[n : n + SLICE]) for n in range(0, len(self.ids), SLICE))
        return sum(snapshot.state in TERMINAL for part in stored for snapshot in part.values())

    def revoke(self, *, terminate: bool = False) -> None:
        """Revoke all that have not ended."""
        self._revoker.revoke(self.ids, terminate=terminate)

    def forget(self) -> None:
        """Delete all stored results."""
        self._results.delete(self.ids)

    def _check(self) -> None:
        if self._ignored:
            raise NoResults("a task of this batch says ignore_result: not all results are kept")

    def __repr__(self) -> str:
        return f"<GroupResult of {len(self.ids)}>"
