"""One queue of the filesystem transport as a folder.

::

    messages/<level><segment>/<name>        waiting: ready, or delayed when the time in its name is yet to come
    leased/<until>-<token>-<name>           handed out
    dead/<died>-<name>, dead/.<died>-<name> dead letter, and its reason

A name is ``<level>-<time>-<unique>-<count>-<key>``: level 0 is priority 9, the time is when the message was sent or is
due, the count how often it was handed out, the key a digest of its id. Times are microseconds since the epoch in hex,
so names sort in the order of delivery. Every change of owner is one rename: who wins the rename owns the message, and
what is true of a message is true in its name, whoever dies when.

Messages are spread over folders by time, so that a folder that once was huge (and stays slow to list for ever on many
file systems) is removed when it is empty.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dray.core import wire
from dray.core.errors import DecodeError
from dray.core.message import DeadLetter, Delivery, Outgoing
from dray.plugins._filesystem import (
    digest,
    disclose,
    fsync_folder,
    listed,
    read_whole,
    readable_name,
    safe_name,
    unique,
    write_whole,
)

LEVELS = 10
SEGMENT_BITS = 30
"""A folder holds the messages of 2**30 microseconds: 18 minutes."""
TIME_MAX = 2**63
_NAME = re.compile(r"(\d)-([0-9a-f]{16})-([0-9a-f]{20})-([0-9a-f]{1,8})-([0-9a-f]{16})")


def microseconds(seconds: float) -> int:
    return max(0, min(int(seconds * 1e6), TIME_MAX))


class Name(NamedTuple):
    """What a message's file name tells."""

    level: int
    time: int
    unique: str
    deliveries: int
    key: str

    @classmethod
    def new(cls, message: Outgoing, now: float) -> Name:
        ready_at = now if message.not_before is None else max(message.not_before, now)
        # Rounded up: a delayed message is not early by even a microsecond.
        time = microseconds(ready_at) + (ready_at > now)
        return cls(LEVELS - 1 - message.priority, time, unique(), 0, digest(message.id))

    @classmethod
    def parse(cls, text: str) -> Name | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        level, time, tie, count, key = match.groups()
        return cls(int(level), int(time, 16), tie, int(count, 16), key)

    def __str__(self) -> str:
        return f"{self.level}-{self.time:016x}-{self.unique}-{self.deliveries:x}-{self.key}"

    @property
    def folder(self) -> str:
        return f"{self.level}{self.time >> SEGMENT_BITS:09x}"


class Receipt:
    """What proves a delivery: the lease's file. Its name changes when the lease is extended."""

    __slots__ = ("has_sent_then", "name", "path", "queue", "token")

    def __init__(self, queue: FolderQueue, path: str, token: str, name: Name) -> None:
        self.queue = queue
        self.path = path
        self.token = token
        self.name = name
        self.has_sent_then = False


class FolderQueue:
    """The files of one queue, and each step that a message takes. Keeps no state; any thread, any process."""

    def __init__(self, root: Path, queue: str, fsync: bool) -> None:
        base = f"{root}/queues/{safe_name(queue)}"
        self.queue = queue
        self.base = base
        self.messages = f"{base}/messages"
        self.leased = f"{base}/leased"
        self.dead = f"{base}/dead"
        self._fsync = fsync

    def create(self) -> None:
        if os.path.isdir(self.dead):
            return
        for folder in (self.messages, self.leased):
            os.makedirs(folder, exist_ok=True)
        if readable_name(os.path.basename(self.base)) is None:
            with contextlib.suppress(FileExistsError):
                write_whole(f"{self.base}/name", self.queue.encode(), self._fsync)
        os.makedirs(self.dead, exist_ok=True)
        if self._fsync:
            fsync_folder(self.base)
            fsync_folder(os.path.dirname(self.base))

    # --- a message's way -----------------------------------------------------------------------------------

    def place(self, source: str, name: Name) -> bool:
        """Move a file among the waiting messages; False if it was gone. Its folder is made, if need be again."""
        folder = f"{self.messages}/{name.folder}"
        for _ in range(5):
            try:
                os.rename(source, f"{folder}/{name}")
                return True
            except FileNotFoundError:
                if not os.path.exists(source):
                    return False
                os.makedirs(folder, exist_ok=True)  # a consumer removes those that are empty
        os.rename(source, f"{folder}/{name}")
        return True

    def flush(self, folder: str) -> None:
        """Make what was placed in this folder of messages survive power loss."""
        if self._fsync:
            with contextlib.suppress(FileNotFoundError):  # emptied and removed already
                fsync_folder(f"{self.messages}/{folder}")
            fsync_folder(self.messages)

    def lease(self, name: Name, until: float) -> Receipt | None:
        """Own a waiting message; None if somebody else was faster."""
        counted = name._replace(deliveries=name.deliveries + 1)
        token = secrets.token_hex(8)
        path = f"{self.leased}/{microseconds(until):016x}-{token}-{counted}"
        try:
            os.rename(f"{self.messages}/{name.folder}/{name}", path)
        except FileNotFoundError:
            return None
        return Receipt(self, path, token, counted)

    def deliver(self, receipt: Receipt, until: float, now: float) -> Delivery | None:
        """Read what was leased; what makes no sense is put aside among the dead letters."""
        try:
            fields, content = disclose(read_whole(receipt.path))
            headers, body = wire.unpack(content)
            id_ = fields["id"]
        except FileNotFoundError:
            return None
        except (DecodeError, KeyError) as error:
            self.set_aside(receipt.path, receipt.name, f"the message's file is not readable: {error}", now)
            return None
        return Delivery(self.queue, id_, body, headers, receipt, receipt.name.deliveries, until)

    def extend(self, receipt: Receipt, until: float) -> bool:
        path = f"{self.leased}/{microseconds(until):016x}-{receipt.token}-{receipt.name}"
        try:
            os.rename(receipt.path, path)
        except FileNotFoundError:
            return False
        receipt.path = path
        return True

    def acknowledge(self, receipt: Receipt) -> bool:
        try:
            os.unlink(receipt.path)
        except FileNotFoundError:
            return False
        return True

    def release(self, receipt: Receipt) -> bool:
        return self.place(receipt.path, receipt.name._replace(deliveries=receipt.name.deliveries - 1))

    def reclaim(self, now: float) -> float:
        """Make messages whose lease ended wait again; return when the next lease ends."""
        limit, earliest = f"{microseconds(now):016x}", f"{TIME_MAX:016x}"
        for entry in listed(self.leased):
            until, _, rest = entry.partition("-")
            name = Name.parse(rest.partition("-")[2])
            if name is None:
                self.set_aside_foreign(f"{self.leased}/{entry}", now)
            elif until <= limit:
                self.place(f"{self.leased}/{entry}", name)
            else:
                earliest = min(earliest, until)
        return int(earliest, 16) / 1e6

    def die(self, source: str, name: Name, reason: str, now: float) -> bool:
        """Make a file a dead letter; False if it was gone."""
        entry = f"{microseconds(now):016x}-{name}"
        try:
            write_whole(f"{self.dead}/.{entry}", reason.encode("utf-8", "replace"), self._fsync)
        except FileExistsError:
            return False  # somebody did the same within this microsecond
        try:
            os.rename(source, f"{self.dead}/{entry}")
        except FileNotFoundError:
            os.unlink(f"{self.dead}/.{entry}")
            return False
        if self._fsync:
            fsync_folder(self.dead)
        return True

    def set_aside(self, source: str, name: Name, reason: str, now: float) -> None:
        self.die(source, name._replace(key=digest(_unreadable_id(name))), reason, now)

    def set_aside_foreign(self, source: str, now: float) -> None:
        """Put a file aside whose name is not one of ours."""
        name = Name(LEVELS - 1, microseconds(now), unique(), 0, "")
        self.set_aside(source, name, f"{os.path.basename(source)!r} is not a file of dray's", now)

    # --- looking -------------------------------------------------------------------------------------------

    def waiting(self) -> list[Name]:
        """The names of all that waits, by priority, then time."""
        names = (name for folder in listed(self.messages) for name in listed(f"{self.messages}/{folder}"))
        return sorted(filter(None, map(Name.parse, names)))

    def remove(self, name: Name) -> bool:
        """Delete a waiting message."""
        try:
            os.unlink(f"{self.messages}/{name.folder}/{name}")
        except FileNotFoundError:
            return False
        return True

    def hasten(self, name: Name, due: int) -> bool:
        """Make a delayed message due; False if it was gone."""
        return self.place(f"{self.messages}/{name.folder}/{name}", name._replace(time=due))

    def read(self, name: Name, *, delayed: bool) -> Outgoing | None:
        """A waiting message, left where it is; None if it is gone or makes no sense."""
        try:
            fields, content = disclose(read_whole(f"{self.messages}/{name.folder}/{name}"))
            headers, body = wire.unpack(content)
            not_before = name.time / 1e6 if delayed else None
            return Outgoing(self.queue, fields["id"], body, headers, LEVELS - 1 - name.level, not_before)
        except (FileNotFoundError, DecodeError, KeyError):
            return None

    # --- dead letters --------------------------------------------------------------------------------------

    def dead_entries(self, keys: frozenset[str] | None = None) -> Iterator[tuple[str, Name]]:
        """The dead letters' file names with what they tell, of these keys or all; unordered."""
        for entry in listed(self.dead):
            name = Name.parse(entry.partition("-")[2])
            if name is not None and (keys is None or name.key in keys):
                yield entry, name

    def dead_letter(self, entry: str, name: Name) -> DeadLetter | None:
        try:
            content = read_whole(f"{self.dead}/{entry}")
        except FileNotFoundError:
            return None
        try:
            fields, inner = disclose(content)
            headers, body = wire.unpack(inner)
            id_ = fields["id"]
        except (DecodeError, KeyError):
            id_, headers, body = _unreadable_id(name), {}, content
        try:
            reason = read_whole(f"{self.dead}/.{entry}").decode()
        except FileNotFoundError:
            reason = ""
        return DeadLetter(id_, self.queue, body, headers, reason, int(entry[:16], 16) / 1e6, name.deliveries)

    def forget(self, entry: str) -> bool:
        """Delete a dead letter."""
        try:
            os.unlink(f"{self.dead}/{entry}")
        except FileNotFoundError:
            return False
        self._drop_reason(entry)
        return True

    def forget_dead_before(self, time: float) -> None:
        """Delete old dead letters, and reasons whose letter never came because its process died."""
        limit = f"{microseconds(time):016x}"
        for entry in os.listdir(self.dead):
            died, _, name = entry.removeprefix(".").partition("-")
            if died < limit and Name.parse(name) is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.dead}/{entry}")

    def _drop_reason(self, entry: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.dead}/.{entry}")


def _unreadable_id(name: Name) -> str:
    return f"unreadable-{name.unique}"
