"""What an idle consumer of the Redis transport waits on: a blocking pop that any thread here can cut short."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Iterable, Sequence

import hiredis

from dray.core.errors import Unavailable
from dray.plugins._redis import Link, LinkLost, Redis
from dray.plugins._redis_link import pack

_GRACE_S = 0.2
"""Servers end a blocking pop a few milliseconds late."""


class Bell:
    """Pops the bells of some queues, in connections of its own. One thread, apart from :meth:`wake`.

    - in a cluster one connection for each slot, otherwise one
    - a token that is popped wakes this consumer and no other: whoever gets it has to look, or pass it on
    - no pop is left waiting in the server between two calls: it would take tokens that others need
    """

    def __init__(self, redis: Redis, slots: Sequence[Sequence[str]], patience_s: float) -> None:
        self._redis = redis
        self._slots = [tuple(f"{base}:bell" for base in bases) for bases in slots]
        self._links: dict[int, Link] = {}
        self._patience_s = patience_s
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    def wake(self) -> None:
        """End the current wait, or the next. Any thread, a signal handler included."""
        with contextlib.suppress(OSError):  # full: it is awake; closed: nobody waits
            self._mouth.send(b"w")

    def wait(self, timeout_s: float) -> set[str] | None:
        """Until a bell rings: the bases whose tokens were taken; after ``timeout_s`` none; None: woken.

        Raises ``Unavailable``.
        """
        waiting: set[int] = set()
        try:
            if self._is_woken():
                return None
            for number, keys in enumerate(self._slots):
                link = self._link(number)
                waiting.add(number)
                link.send(pack([("BLPOP", *keys, f"{max(timeout_s, 0.001):.3f}")]))
            return self._listen(waiting, timeout_s)
        except LinkLost as error:
            self._drop(range(len(self._slots)))
            raise Unavailable(f"{error}, while it was asked to wait for messages") from error
        finally:
            self._drop(waiting)

    def close(self) -> None:
        """Idempotent."""
        self._drop(range(len(self._slots)))
        self._ear.close()
        self._mouth.close()

    def __del__(self) -> None:
        self.close()

    def _listen(self, waiting: set[int], timeout_s: float) -> set[str] | None:
        """Takes answers until there is a token; leaves in ``waiting`` who has not answered."""
        deadline = time.monotonic() + timeout_s
        rung: set[str] = set()
        with selectors.DefaultSelector() as selector:
            selector.register(self._ear, selectors.EVENT_READ)
            for number in waiting:
                selector.register(self._links[number].sock, selectors.EVENT_READ, number)
            while waiting and not rung:
                over_s = time.monotonic() - deadline
                if over_s > self._patience_s:
                    raise LinkLost(f"redis did not answer for {self._patience_s:g} s")
                if over_s > _GRACE_S and len(waiting) < len(self._slots):
                    break  # the others are late: they are cut off
                for key, _ in selector.select(max(-over_s, 0) + _GRACE_S):
                    if key.data is None:
                        self._is_woken()
                        return None
                    rung |= self._answered(key.data, waiting)
        return rung

    def _answered(self, number: int, waiting: set[int]) -> set[str]:
        """Takes what one connection has to say; the bases whose tokens it took."""
        rung = set()
        for answer in self._links[number].available():
            waiting.discard(number)
            if isinstance(answer, hiredis.ReplyError):
                raise LinkLost(f"redis ended the wait: {answer}")  # a failover, or a slot that moved
            if answer is not None:
                rung.add(answer[0].decode().removesuffix(":bell"))
        return rung

    def _is_woken(self) -> bool:
        try:
            return bool(self._ear.recv(4096))
        except BlockingIOError:
            return False
        except OSError as error:
            raise Unavailable("redis: this consumer was closed") from error

    def _link(self, number: int) -> Link:
        link = self._links.get(number)
        if link is None:
            link = self._links[number] = self._redis.dial(self._slots[number][0])
        return link

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            link = self._links.pop(number, None)
            if link is not None:
                link.close()
