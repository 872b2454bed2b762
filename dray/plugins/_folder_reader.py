"""How a consumer of the filesystem transport finds the next messages without listing everything each time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from dray.core.message import Delivery
from dray.plugins._filesystem import fsync_folder, listed
from dray.plugins._folder_queue import SEGMENT_BITS, FolderQueue, Name, microseconds

RECLAIM_EVERY_S = 1.0
_LARGE = 256
"""A listing of more names is not made again within a second for the sake of messages that are not due yet."""
_LISTING_MAX = 100_000


class _Listing:
    """The names in one folder of messages when it was last listed, the next to deliver at the end."""

    __slots__ = ("listed_at", "names", "was_large")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.listed_at = float("-inf")
        self.was_large = False


class FolderReader:
    """Claims messages of one queue. Owned by one consumer.

    - a listing is used up before it is made again: a claim costs one rename, not one listing
    - higher priorities have folders of their own, which are short to list while they are empty
    - leases that ended are looked for about once a second, and when one that was seen ends
    """

    def __init__(self, queue: FolderQueue, fsync: bool) -> None:
        self.queue = queue
        self.next_due = float("inf")
        """When the next delayed message that was seen is due, as of the last claim."""
        self._fsync = fsync
        self._listings: dict[str, _Listing] = {}
        self._reclaim_at = 0.0

    def claim(self, limit: int, now: float, lease_s: float) -> list[Delivery]:
        if now >= self._reclaim_at:
            self._reclaim_at = min(self.queue.reclaim(now), now + RECLAIM_EVERY_S)
        until = now + lease_s
        found: list[Delivery] = []
        if limit > 0:
            for name in self._ready(now):
                receipt = self.queue.lease(name, until)
                delivery = receipt and self.queue.deliver(receipt, until, now)
                if delivery:
                    found.append(delivery)
                    if len(found) == limit:
                        break
        if found and self._fsync:
            fsync_folder(self.queue.leased)
        return found

    def _ready(self, now: float) -> Iterator[Name]:
        """Names that are due, in the order of delivery; some may be gone by now."""
        self.next_due = float("inf")
        due = f"{microseconds(now):016x}"
        folders = sorted(listed(self.queue.messages))
        for folder in folders:
            starts_at = self._starts_at(folder, now)
            if starts_at > now:
                self.next_due = min(self.next_due, starts_at)
                continue
            listing = self._listings.get(folder)
            if listing is None:
                listing = self._listings[folder] = _Listing()
            if not self._refresh(folder, listing, due, now):
                # Used up an old listing: what came since goes before lower priorities.
                yield from self._take_due(listing, due)
                self._refresh(folder, listing, due, now)
            yield from self._take_due(listing, due)
            if listing.names:
                self.next_due = min(self.next_due, int(listing.names[-1][2:18], 16) / 1e6)
        for gone in self._listings.keys() - set(folders):
            del self._listings[gone]

    @staticmethod
    def _take_due(listing: _Listing, due: str) -> Iterator[Name]:
        while listing.names and listing.names[-1][2:18] <= due:
            name = Name.parse(listing.names.pop())
            if name is not None:
                yield name

    def _refresh(self, folder: str, listing: _Listing, due: str, now: float) -> bool:
        """List the folder unless something known in it is due; False: it was, use that up first."""
        if listing.names and listing.names[-1][2:18] <= due:
            return False
        if len(listing.names) > _LARGE and time.monotonic() - listing.listed_at < 1.0:
            return True
        path = f"{self.queue.messages}/{folder}"
        names = listed(path)
        listing.listed_at = time.monotonic()
        listing.was_large = listing.was_large or len(names) > _LARGE
        if not names:
            self._remove_empty(path, listing, self._starts_at(folder, now), now)
        ours = []
        for name in names:
            if Name.parse(name) is None:
                self.queue.set_aside_foreign(f"{path}/{name}", now)
            else:
                ours.append(name)
        ours.sort(reverse=True)
        listing.names = ours[-_LISTING_MAX:]
        return True

    def _remove_empty(self, path: str, listing: _Listing, starts_at: float, now: float) -> None:
        """Remove a folder that nobody adds to any more, or that is slow to list because it was large once."""
        if listing.was_large or starts_at + 2 * (1 << SEGMENT_BITS) / 1e6 < now:
            with contextlib.suppress(OSError):
                os.rmdir(path)
                listing.was_large = False

    def _starts_at(self, folder: str, now: float) -> float:
        """When the first message of a folder may be due (epoch seconds)."""
        try:
            return (int(folder[1:], 16) << SEGMENT_BITS) / 1e6
        except ValueError:
            if os.path.isdir(f"{self.queue.messages}/{folder}"):
                return float("inf")  # somebody's folder: left alone
            self.queue.set_aside_foreign(f"{self.queue.messages}/{folder}", now)
            return float("inf")
