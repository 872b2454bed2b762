"""Looking into the filesystem transport's folders: counts, dead letters, tombstones."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dray.core.errors import DecodeError
from dray.core.message import DeadLetter, Outgoing, QueueStats
from dray.plugins._filesystem import (
    NEVER,
    Shards,
    digest,
    disclose,
    enclose,
    listed,
    read_whole,
    readable_name,
    safe_name,
)
from dray.plugins._folder_queue import FolderQueue, Name, microseconds


def queue_names(root: Path) -> list[str]:
    """The queues that have a folder."""
    found = []
    for name in listed(str(root / "queues")):
        queue = readable_name(name)
        if queue is None:
            with contextlib.suppress(FileNotFoundError):
                queue = read_whole(str(root / "queues" / name / "name")).decode("utf-8", "replace")
        # A folder that is not named as we would have named it is somebody else's.
        if queue is not None and safe_name(queue) == name:
            found.append(queue)
    return sorted(found)


def stats(queue: FolderQueue, now: float) -> QueueStats:
    limit = microseconds(now)
    waiting = queue.waiting()
    ready = [name.time for name in waiting if name.time <= limit]
    age_s = max(now - min(ready) / 1e6, 0.0) if ready else None
    dead = sum(1 for _ in queue.dead_entries())
    return QueueStats(len(ready), len(listed(queue.leased)), len(waiting) - len(ready), dead, age_s)


def peek(queue: FolderQueue, limit: int, now: float) -> list[Outgoing]:
    """Waiting messages: ready ones by priority and time, then delayed ones by due time."""
    due = microseconds(now)
    names = sorted(queue.waiting(), key=lambda name: (name.time if name.time > due else 0, name))
    messages = (queue.read(name, delayed=name.time > due) for name in names)
    return list(itertools.islice(filter(None, messages), max(limit, 0)))


def dead_list(sources: Sequence[FolderQueue], limit: int) -> list[DeadLetter]:
    """The newest dead letters."""
    entries = [(entry, name, source) for source in sources for entry, name in source.dead_entries()]
    entries.sort(key=lambda item: item[0], reverse=True)
    letters = (source.dead_letter(entry, name) for entry, name, source in entries)
    return list(itertools.islice(filter(None, letters), max(limit, 0)))


def dead(sources: Sequence[FolderQueue], ids: Sequence[str]) -> Iterator[tuple[DeadLetter, FolderQueue, str, Name]]:
    """The dead letters with these ids, and where each is."""
    keys = frozenset(map(digest, ids))
    for source in sources:
        for entry, name in list(source.dead_entries(keys)):
            letter = source.dead_letter(entry, name)
            if letter is not None:
                yield letter, source, entry, name


def hasten(sources: Sequence[FolderQueue], ids: Sequence[str], now: float) -> set[str]:
    """Make delayed messages with these ids due; the names of the queues that had any."""
    keys, due = {digest(id_) for id_ in ids}, microseconds(now)
    return {
        source.queue
        for source in sources
        for name in source.waiting()
        if name.key in keys and name.time > due and source.hasten(name, due)
    }


class Tombstones:
    """A file per id: its mark, and until when it is remembered."""

    def __init__(self, root: Path, write_temporary: Callable[[bytes], str]) -> None:
        self._shards = Shards(root)
        self._write_temporary = write_temporary

    def write(self, marks: Mapping[str, str], expires_at: float, now: float) -> None:
        self._shards.sweep(now)
        for id_, mark in marks.items():
            path = self._write_temporary(enclose({"mark": mark, "expires": repr(expires_at)}, b""))
            file_time = min(expires_at, NEVER)
            os.utime(path, (file_time, file_time))
            self._shards.replace(path, self._path(id_))

    def read(self, ids: Sequence[str], now: float) -> dict[str, str]:
        found = {}
        for id_ in ids:
            # One that a power loss damaged counts as there, with no mark: better a task too few than one too many.
            try:
                fields, _ = disclose(read_whole(self._path(id_)))
                if float(fields["expires"]) > now:
                    found[id_] = fields["mark"]
            except FileNotFoundError:
                continue
            except (DecodeError, KeyError, ValueError):
                found[id_] = ""
        return found

    def remove(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(id_))

    def _path(self, id_: str) -> str:
        return self._shards.path(digest(id_, 20))
