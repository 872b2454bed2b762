"""What the filesystem transport and the filesystem result back end share: names, whole files, shards, wake-ups."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import select
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dray.core import wire
from dray.core.errors import DecodeError, Unavailable

NEVER = 2**33
"""An expiry for what never expires: seconds since the epoch, in the year 2242; file times hold it."""
_NAME_BYTES_MAX = 200
_KEYS_MAX = 16
_HINTS = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: give this user write access, or choose another folder",
    errno.EPERM: "not permitted: the file system must allow renames and hard links",
    errno.ENOENT: "the folder is gone: was it deleted or unmounted?",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


@contextlib.contextmanager
def mapped(doing: str, root: Path) -> Iterator[None]:
    """Turn the operating system's errors into ``Unavailable`` with a hint."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the folder")
        raise Unavailable(f"{doing} in {root}: {error.strerror or error}; {hint}") from error


def folder(url: str | None, path: str, base: Path) -> Path:
    """The folder that ``filesystem:///dir``, ``file:///dir`` or a path means."""
    if url:
        parts = urlsplit(url)
        path = unquote(parts.netloc + parts.path)
    return base / path


def digest(text: str, size: int = 8) -> str:
    """A short name for any text: ``2 * size`` hex digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def safe_name(text: str) -> str:
    """A file name for any text, reversible unless very long; different on file systems that ignore case, too."""
    name = "".join(
        chr(byte) if chr(byte) in "abcdefghijklmnopqrstuvwxyz0123456789_-" else f"%{byte:02x}" for byte in text.encode()
    )
    if len(name) <= _NAME_BYTES_MAX:
        return name or "%"
    return f"{name[:100]}~{digest(text, 16)}"


def readable_name(name: str) -> str | None:
    """The text that :func:`safe_name` was given; None if it was too long to tell."""
    return None if "~" in name else unquote(name) if name != "%" else ""


def unique() -> str:
    """12 hex digits that sort by the order of the calls in this process, and 8 random ones."""
    return f"{next(_counter):012x}{secrets.token_hex(4)}"


_counter = itertools.count()


def write_whole(path: str, data: bytes, fsync: bool) -> None:
    """Make a file; on failure none is left behind."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if fsync:
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def read_whole(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        data = os.read(fd, size + 1)
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def fsync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def listed(path: str) -> list[str]:
    """The names in a folder, without hidden ones; none if it does not exist."""
    try:
        return [name for name in os.listdir(path) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def enclose(fields: Mapping[str, str], body: bytes) -> bytes:
    """A file's content: our fields and a body, whose length is among them so that a cut-off file is found out."""
    return wire.pack({**fields, "bytes": str(len(body))}, body)


def disclose(content: bytes) -> tuple[dict[str, str], bytes]:
    """The inverse of :func:`enclose`; raises ``DecodeError``."""
    fields, body = wire.unpack(content)
    if fields.get("bytes") != str(len(body)):
        raise DecodeError(f"the file is cut off: {len(body)} bytes are there, {fields.get('bytes')} were written")
    return fields, body


class Shards:
    """A folder of files by key, spread over 256 folders. A file's modification time is when it expires.

    ``sweep`` looks through one of the 256 at a time, so that cleaning up never takes long.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._turns = itertools.cycle(range(256))

    def path(self, key: str) -> str:
        """Where the file of ``key`` (hex digits) is; its folder may not exist yet."""
        return f"{self.root}/{key[:2]}/{key}"

    @staticmethod
    def replace(source: str, target: str, *, exclusive: bool = False) -> None:
        """Move a file to its place, making the folder; ``exclusive``: raises ``FileExistsError`` and keeps both."""
        move = os.link if exclusive else os.replace
        try:
            move(source, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            move(source, target)

    def sweep(self, now: float) -> None:
        """Remove what expired in the next of the 256 folders."""
        shard = f"{self.root}/{next(self._turns):02x}"
        for name in listed(shard):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(f"{shard}/{name}").st_mtime <= now:
                    os.unlink(f"{shard}/{name}")


class Sleeper:
    """Sleeps until somebody on this machine pokes one of its keys, ``wake`` is called, or time is up.

    A FIFO in a shared folder, visible under a name without a dot only while its owner sleeps: who adds something
    lists the folder and writes to those that wait for it. Where FIFOs cannot be made a pipe serves ``wake`` alone.
    """

    HOST = digest(socket.gethostname(), 4)

    def __init__(self, waiters: Path, keys: Collection[str]) -> None:
        wanted = "*" if len(keys) > _KEYS_MAX else "+".join(digest(key, 4) for key in keys)
        self._waiters = waiters
        self._name = f"{self.HOST}-{unique()}-{wanted}"
        self._hidden, self._shown = str(waiters / f".{self._name}"), str(waiters / self._name)
        self._reader = self._writer = -1
        self._has_fifo = True

    def show(self) -> None:
        """Be found by :func:`poke`. Look for work once more after this, then ``sleep``."""
        if self._reader < 0:
            self._open()
        if self._has_fifo:
            try:
                os.rename(self._hidden, self._shown)
            except FileNotFoundError:  # somebody took it for a dead process's
                self.close()
                self._open()
                with contextlib.suppress(OSError):
                    os.rename(self._hidden, self._shown)

    def sleep(self, timeout_s: float) -> None:
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        poller.poll(max(timeout_s, 0.0) * 1000)

    def hide(self) -> None:
        """Awake again: not to be found any more, and pokes so far are forgotten."""
        if self._has_fifo:
            with contextlib.suppress(OSError):
                os.rename(self._shown, self._hidden)
        self.forget_pokes()

    def forget_pokes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)

    def wake(self) -> None:
        """Any thread, a signal handler included."""
        with contextlib.suppress(OSError):
            os.write(self._writer, b".")

    def close(self) -> None:
        fds = {self._reader, self._writer} - {-1}
        self._reader = self._writer = -1
        for fd in fds:
            os.close(fd)
        for path in (self._hidden, self._shown):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _open(self) -> None:
        try:
            os.mkfifo(self._hidden)
            self._reader = os.open(self._hidden, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._writer = os.open(self._hidden, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._has_fifo = False
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)


def poke(waiters: Path, keys: Collection[str]) -> None:
    """Wake the sleepers of this machine that wait for one of ``keys``."""
    names = listed(str(waiters))
    if not names:
        return
    wanted = {digest(key, 4) for key in keys}
    for name in names:
        host, _, own = name.partition("-")
        own = own.rpartition("-")[2]
        if own == "*" or not wanted.isdisjoint(own.split("+")):
            _poke_one(str(waiters / name), host)


def remove_dead_sleepers(waiters: Path) -> None:
    """Remove the FIFOs of this machine's processes that died."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(waiters):
            if name.lstrip(".").startswith(f"{Sleeper.HOST}-"):
                _poke_one(str(waiters / name), Sleeper.HOST)


def _poke_one(path: str, host: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # ENXIO: nobody reads. A FIFO of another machine looks the same, and is not ours to remove.
        if error.errno == errno.ENXIO and host == Sleeper.HOST:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return
    try:
        with contextlib.suppress(OSError):  # full of pokes, or its reader just left
            os.write(fd, b".")
    finally:
        os.close(fd)
