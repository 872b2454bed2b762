"""A result back end for dray in one dbm file. The smallest complete example of a plugin."""

from __future__ import annotations

import contextlib
import dbm
import fcntl
import importlib
import struct
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.core.contracts import Durability, PluginContext, ResultBackend, ResultFeatures, Seconds
from dray.core.errors import TooLarge, Unavailable
from dray.core.message import TERMINAL, State, StoredResult

KINDS = ("dbm.sqlite3", "dbm.gnu", "dbm.dumb")
"""Not dbm.ndbm: it takes no value over a kilobyte or so."""
HEAD = struct.Struct(">dB")
"""Expiry (infinite: never) and the length of the state, which follows; the body is the rest."""


@dataclass(frozen=True, slots=True)
class DbmOptions:
    """The options of the dbm back end."""

    path: str = ".dray/results.dbm"
    """The file, relative to the configuration."""
    sweep: Seconds = 3600.0
    """How often expired results are removed from the file."""


class DbmBackend(ResultBackend):
    """Keeps results in a dbm file.

    - one lock file guards each batch, between threads and between processes: no dbm takes two writers
    - the file is open only while it is locked, so that an instance survives whatever others do to it
    - every failure of a driver becomes ``Unavailable``: a batch that failed may be repeated
    """

    api = 1
    Options = DbmOptions
    features = ResultFeatures(durability=Durability.D1, max_body_bytes=2**20, shared=True)

    def __init__(self, options: DbmOptions, context: PluginContext) -> None:
        super().__init__(options, context)
        self._path = context.base / options.path
        self._threads = threading.Lock()
        self._swept: float | None = None
        self._closed = False

    def open(self) -> None:
        self._closed = False
        with self._file():
            pass

    def close(self) -> None:
        self._closed = True

    def store(self, results: Sequence[StoredResult]) -> None:
        for result in results:
            if len(result.body) > self.features.max_body_bytes:
                raise TooLarge(
                    f"the result of task {result.id} has {len(result.body)} bytes, dbm takes "
                    f"{self.features.max_body_bytes}; store it elsewhere and return where it is"
                )
        with self._file() as file:
            for result in results:
                known = self._read(file, result.id)
                if known is None or known.state not in TERMINAL:  # the first terminal result wins
                    file[result.id.encode()] = _packed(result)
            self._sweep(file)

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        with self._file() as file:
            found = ((key, self._read(file, key)) for key in ids)
            return {key: result for key, result in found if result is not None}

    def delete(self, ids: Sequence[str]) -> None:
        with self._file() as file:
            for key in ids:
                if key.encode() in file:
                    del file[key.encode()]

    def _read(self, file: MutableMapping[bytes, bytes], key: str) -> StoredResult | None:
        data = file.get(key.encode())
        if data is None:
            return None
        expires_at, length = HEAD.unpack_from(data)
        if expires_at <= self.context.clock.time():
            return None
        state, body = data[HEAD.size : HEAD.size + length], data[HEAD.size + length :]
        return StoredResult(key, State(state.decode()), body, None if expires_at == float("inf") else expires_at)

    def _sweep(self, file: MutableMapping[bytes, bytes]) -> None:
        now = self.context.clock.monotonic()
        if self._swept is None or now - self._swept >= self.options.sweep:
            self._swept = now
            for key in [key for key in file.keys() if HEAD.unpack_from(file[key])[0] <= self.context.clock.time()]:  # noqa: SIM118
                del file[key]

    @contextlib.contextmanager
    def _file(self) -> Iterator[MutableMapping[bytes, bytes]]:
        """The open file, ours alone. Maps errors, as every plugin has to: nobody above knows what a dbm raises."""
        if self._closed:
            raise Unavailable("the dbm back end is closed: open() it again")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._threads, open(f"{self._path}.lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with _opened(str(self._path)) as file:
                    yield file
        except Exception as error:  # a damaged file gets anything out of a dbm: dumb evaluates its index as Python
            raise Unavailable(f"the results in {self._path} cannot be reached: {error}") from error


def _opened(path: str) -> Any:
    """The file as it is; a new one of the best kind that this Python has."""
    if dbm.whichdb(path) is not None:
        return dbm.open(path, "w")
    for name in KINDS:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).open(path, "c")
    raise AssertionError("dbm.dumb is always there")


def _packed(result: StoredResult) -> bytes:
    state = str(result.state).encode()
    expires_at = float("inf") if result.expires_at is None else result.expires_at
    return HEAD.pack(expires_at, len(state)) + state + result.body
