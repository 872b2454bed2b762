"""One writable Redis: found by a list of addresses or by Sentinels, reached over a few pooled connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.plugins._redis_link import AS_SENTINEL, Argument, Command, Dialler, Link, LinkLost, understood
from dray.plugins._redis_link_errors import code_of, refused
from dray.plugins._redis_link_url import Address, Target

_NOT_MASTER = frozenset({"READONLY", "MASTERDOWN", "LOADING", "CLUSTERDOWN"})
"""Refusals after which another server may be the right one."""


class Pool:
    """Idle connections to one place. Any thread.

    - hands out the one used last, if it is still open, else a new one
    - keeps as many as were in use at once; forgets all of them when one fails
    """

    def __init__(self, dial: Callable[[], Link], heartbeat_s: float) -> None:
        self.dial = dial
        self._heartbeat_s = heartbeat_s
        self._idle: list[Link] = []
        self._is_closed = False

    def take(self) -> Link:
        """A connection that is open as far as one can tell. Raises ``Unavailable``."""
        while self._idle:
            try:
                link = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if link.is_alive(self._heartbeat_s):
                return link
            link.close()
        return self.dial()

    def give(self, link: Link) -> None:
        """Back from :meth:`take`, all answers read."""
        link.used_at = time.monotonic()
        self._idle.append(link)
        if self._is_closed:
            self.clear()

    def clear(self) -> None:
        """Close what is idle."""
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                break

    def close(self) -> None:
        self._is_closed = True
        self.clear()


class Single:
    """Commands to one master, whichever server that is now.

    - sends a batch over one connection, in one round trip
    - looks for the master anew when the server says that it is none
    """

    def __init__(self, dialler: Dialler, target: Target, heartbeat_s: float) -> None:
        self._dialler = dialler
        self._target = target
        self._addresses = target.addresses
        self.pool = Pool(self._dial, heartbeat_s)

    def dial(self, key: Argument | None = None) -> Link:
        """A connection for whoever asks, to the master. Raises ``Unavailable``."""
        del key
        return self._dial()

    def attempt(self, commands: Sequence[Command], again: bool) -> list[Any]:
        """An answer for each: the server's, a ``ReplyError``, or a ``TransportError``."""
        answers = self._exchange(commands, again)
        moved = [at for at, answer in enumerate(answers) if is_refusal(answer, _NOT_MASTER)]
        if moved:
            self.pool.clear()
            for at, answer in zip(moved, self._exchange([commands[at] for at in moved], again), strict=True):
                answers[at] = answer
        return answers

    def _exchange(self, commands: Sequence[Command], again: bool) -> list[Any]:
        try:
            link = self.pool.take()
            try:
                answers = link.exchange(commands)
            except LinkLost as error:
                self.pool.clear()
                return self._repeat(commands, lost(error)) if again else [lost(error)] * len(commands)
            except BaseException:  # a time limit may end this thread's work anywhere
                link.close()
                raise
        except TransportError as error:
            return [error] * len(commands)
        self.pool.give(link)
        return answers

    def _repeat(self, commands: Sequence[Command], doubt: Uncertain) -> list[Any]:
        """Once more. What is refused now may have been done before."""
        answers = self._exchange(commands, again=False)
        return [doubt if isinstance(answer, TransportError | hiredis.ReplyError) else answer for answer in answers]

    def close(self) -> None:
        self.pool.close()

    def __str__(self) -> str:
        return str(self._addresses[0])

    def _dial(self) -> Link:
        """To the first address that leads to a writable master, beginning with the last one that did."""
        failures = []
        for address in self._addresses:
            try:
                link = self._dial_master(address)
            except Unavailable as error:
                failures.append(error)
            else:
                if address != self._addresses[0]:
                    self._addresses = (address, *(other for other in self._target.addresses if other != address))
                return link
        if len(failures) == 1:
            raise failures[0]
        raise Unavailable("; ".join(map(str, failures))) from failures[0]

    def _dial_master(self, address: Address) -> Link:
        if self._target.kind != "sentinel":
            return self._dialler.dial(address)
        return self._dialler.dial(self._ask_sentinel(address))

    def _ask_sentinel(self, sentinel: Address) -> Address:
        link = self._dialler.dial(sentinel, sentinel=True)
        try:
            (answer,) = link.exchange([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._target.master)])
            if answer is None:
                answer = hiredis.ReplyError(f"ERR No such master with that name: {self._target.master}")
            if isinstance(answer, hiredis.ReplyError):
                raise refused(answer, f"{sentinel}{AS_SENTINEL}")
            with understood(sentinel):
                host, port = answer
                return Address(host.decode(), int(port), tls=sentinel.tls)
        except LinkLost as error:
            raise Unavailable(f"{error}; is it a Sentinel? Its port is 26379 as a rule") from error
        finally:
            link.close()


def is_refusal(answer: object, codes: frozenset[str]) -> bool:
    """Whether an answer is an error reply with one of these codes."""
    return isinstance(answer, hiredis.ReplyError) and code_of(answer) in codes


def lost(error: LinkLost) -> Uncertain:
    """The connection was lost with a request on it."""
    uncertain = Uncertain(f"{error}; what was asked may have been done")
    uncertain.__cause__ = error
    return uncertain
