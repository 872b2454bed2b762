"""The result back end that keeps each result in a file of its own: no server, any POSIX folder, shared ones too."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures
from dray.core.errors import DecodeError, TooLarge, Unavailable
from dray.core.message import TERMINAL, State, StoredResult
from dray.plugins._filesystem import (
    NEVER,
    Shards,
    Sleeper,
    digest,
    disclose,
    enclose,
    folder,
    fsync_folder,
    listed,
    mapped,
    poke,
    read_whole,
    remove_dead_sleepers,
    unique,
    write_whole,
)

POLL_S = 0.5
"""How often to look for what other machines stored: their pokes don't reach this one."""
SWEEP_EVERY_S = 10.0
GROUP_KEPT_S = 30 * 86400.0
"""A group that nobody arrived at for so long is forgotten."""
LEFTOVER_S = 86400.0
_RECORD_BYTES = 16


class FilesystemBackend(ResultBackend):
    """Keeps results as files: ``<key>.final`` for a terminal state, ``<key>.state`` for another.

    - makes a terminal result by a hard link, which fails if there is one already: the first wins, between machines too
    - wakes those of this machine who wait for a result; others look twice a second
    - looks through one of 256 folders at a time and removes what expired
    - counts the distinct members of groups in files that are only ever appended to
    """

    api: ClassVar[int] = 1

    features = ResultFeatures(durability=Durability.D2, push=True, max_body_bytes=2**24)

    @dataclass(frozen=True, slots=True)
    class Options:
        """One of ``url`` and ``path``, or neither: ``.dray/results``."""

        url: str | None = None
        """``filesystem:///dir`` or ``file:///dir``."""
        path: str | None = None
        """A path instead of a URL; relative to the configuration\'s folder."""
        fsync: bool = False
        """Survive power loss, at the price of a disk flush for each result."""

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        self.features = replace(self.features, durability=Durability.D3 if options.fsync else Durability.D2)
        self.root = folder(options.url, options.path or ".dray/results", context.base)
        self._temporary = self.root / "tmp"
        self._waiters = self.root / "waiters"
        self._results = Shards(self.root / "results")
        self._groups = Shards(self.root / "groups")
        self._sweep_at = -math.inf
        self._is_open = False

    def open(self) -> None:
        if self._is_open:
            return
        with mapped("cannot open the result folder", self.root):
            for part in (self._temporary, self._waiters):
                part.mkdir(parents=True, exist_ok=True)
            os.unlink(self._write_temporary(b"probe", None))
            remove_dead_sleepers(self._waiters)
            self._remove_leftovers()
        self._is_open = True

    def close(self) -> None:
        self._is_open = False

    @contextlib.contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        if not self._is_open:
            raise Unavailable(f"the filesystem result back end on {self.root} is closed: open() it first")
        with mapped(doing, self.root):
            yield

    # --- results -------------------------------------------------------------------------------------------

    def store(self, results: Sequence[StoredResult]) -> None:
        self._check_sizes(results)
        now = self.context.clock.time()
        with self._working("cannot store results"):
            for result in results:
                self._store(result, now)
            if self.options.fsync:
                for shard in {os.path.dirname(self._path(result.id)) for result in results}:
                    fsync_folder(shard)
            poke(self._waiters, {result.id for result in results if result.state in TERMINAL})
            self._sweep(now)

    def _store(self, result: StoredResult, now: float) -> None:
        path = self._path(result.id)
        fields = {"id": result.id, "state": result.state.value}
        if result.expires_at is not None:
            fields["expires"] = repr(result.expires_at)
        temporary = self._write_temporary(enclose(fields, result.body), result.expires_at)
        try:
            if result.state in TERMINAL:
                self._store_first(temporary, f"{path}.final", result.id, now)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{path}.state")
            elif self._read(f"{path}.final", result.id, now) is None:
                self._results.replace(temporary, f"{path}.state")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _store_first(self, temporary: str, target: str, id_: str, now: float) -> None:
        for _ in range(5):
            try:
                self._results.replace(temporary, target, exclusive=True)
                return
            except FileExistsError:
                if self._read(target, id_, now) is not None:
                    return
                # Expired, or damaged by a power loss. Renamed away before it is deleted: of two that come here at
                # once neither may delete the other's new result.
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, f"{temporary}-old")
                    os.unlink(f"{temporary}-old")

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        now = self.context.clock.time()
        found = {}
        with self._working("cannot read results"):
            for id_ in ids:
                path = self._path(id_)
                result = self._read(f"{path}.final", id_, now) or self._read(f"{path}.state", id_, now)
                if result is not None:
                    found[id_] = result
        return found

    def delete(self, ids: Sequence[str]) -> None:
        with self._working("cannot delete results"):
            for id_ in ids:
                for suffix in (".state", ".final"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._path(id_) + suffix)

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        deadline = time.monotonic() + timeout_s
        found = self._terminal(ids)
        if found or timeout_s <= 0:
            return found
        sleeper = Sleeper(self._waiters, ids)
        try:
            with self._working("cannot wait for results"):
                sleeper.show()
                # Shown first, looked second: a result stored in between pokes.
                while not (found := self._terminal(ids)) and (left_s := deadline - time.monotonic()) > 0:
                    sleeper.sleep(min(left_s, POLL_S))
                    sleeper.forget_pokes()
            return found
        finally:
            sleeper.close()

    def _terminal(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        now = self.context.clock.time()
        with self._working("cannot read results"):
            results = ((id_, self._read(f"{self._path(id_)}.final", id_, now)) for id_ in ids)
            return {id_: result for id_, result in results if result is not None}

    def _read(self, path: str, id_: str, now: float) -> StoredResult | None:
        try:
            fields, body = disclose(read_whole(path))
            expires_at = float(fields["expires"]) if "expires" in fields else None
            state = State(fields["state"])
        except FileNotFoundError:
            return None
        except (DecodeError, KeyError, ValueError) as error:
            self.context.logger.warning("the result of task %s in %s is not readable: %s", id_, path, error)
            return None
        if expires_at is not None and expires_at <= now:
            return None
        return StoredResult(id_, state, body, expires_at)

    # --- Barrier -------------------------------------------------------------------------------------------

    def arrive(self, group: str, member: str, size: int) -> bool:
        """See :class:`~dray.core.contracts.Barrier`.

        Each machine appends its members to a log of its own (appends of one machine don't mix; those of two could).
        A member that arrives twice is in a log twice, so the logs are read only once they hold enough records.
        """
        key = digest(group, 20)
        shard = os.path.dirname(self._groups.path(key))
        with self._working("cannot note who arrived"):
            os.makedirs(shard, exist_ok=True)
            self._append(f"{shard}/{key}.{Sleeper.HOST}", bytes.fromhex(digest(member, _RECORD_BYTES)))
            logs = [f"{shard}/{name}" for name in listed(shard) if name.startswith(f"{key}.") and ".done" not in name]
            if sum(os.stat(log).st_size for log in logs) < size * _RECORD_BYTES:
                return False
            records = b"".join(map(read_whole, logs))
            members = {records[at : at + _RECORD_BYTES] for at in range(0, len(records), _RECORD_BYTES)}
            return len(members) >= size and self._win(
                f"{shard}/{key}.done", bytes.fromhex(digest(member, _RECORD_BYTES))
            )

    def _append(self, path: str, record: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, record)
            if self.options.fsync:
                os.fsync(fd)
            expires_at = self.context.clock.time() + GROUP_KEPT_S
            os.utime(fd, (expires_at, expires_at))
        finally:
            os.close(fd)

    def _win(self, path: str, member: bytes) -> bool:
        """True for the first that comes here, now and ever after."""
        temporary = self._write_temporary(member, self.context.clock.time() + GROUP_KEPT_S)
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return read_whole(path) == member
        finally:
            os.unlink(temporary)

    # --- files ---------------------------------------------------------------------------------------------

    def _path(self, id_: str) -> str:
        return self._results.path(digest(id_, 20))

    def _write_temporary(self, data: bytes, expires_at: float | None) -> str:
        path = f"{self._temporary}/{int(self.context.clock.time()):012d}-{unique()}"
        write_whole(path, data, self.options.fsync)
        file_time = NEVER if expires_at is None else max(0.0, min(expires_at, NEVER))
        os.utime(path, (file_time, file_time))
        return path

    def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_EVERY_S
            self._results.sweep(now)
            self._groups.sweep(now)

    def _remove_leftovers(self) -> None:
        limit = f"{int(self.context.clock.time() - LEFTOVER_S):012d}"
        for name in listed(str(self._temporary)):
            if name < limit:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary / name)

    def _check_sizes(self, results: Sequence[StoredResult]) -> None:
        limit = self.features.max_body_bytes
        for result in results:
            if len(result.body) > limit:
                raise TooLarge(
                    f"the result of task {result.id} has {len(result.body):,} bytes, the filesystem back end takes"
                    f" {limit:,}. Store large data elsewhere and return a reference to it."
                )
