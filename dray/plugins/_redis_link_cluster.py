"""A Redis Cluster: which node serves a key, followed as slots move."""

from __future__ import annotations

import binascii
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import hiredis

from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.plugins._redis_link import Argument, Command, Dialler, Link, LinkLost, pack, understood
from dray.plugins._redis_link_errors import code_of, refused
from dray.plugins._redis_link_pool import Pool, lost
from dray.plugins._redis_link_url import Address, Target

_SLOTS = 16384
_ROUNDS = 6
"""How often commands that a node refused are sent at all: while a slot moves, one answer may lead to the next."""
_PAUSE_S = 0.02
_SENT_ON = frozenset({"MOVED", "ASK", "TRYAGAIN", "READONLY", "MASTERDOWN", "LOADING"})
_WITHOUT_KEY = frozenset({"PING", "INFO", "CONFIG", "PUBLISH", "CLUSTER", "SCRIPT", "TIME"})


def slot_of(key: Argument) -> int:
    """The slot of a key; of what stands between its first braces, if anything does."""
    data = key.encode() if isinstance(key, str) else bytes(key) if isinstance(key, bytes) else b"%d" % key
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return binascii.crc_hqx(data, 0) % _SLOTS


def key_of(command: Command) -> Argument | None:
    """The first key of a command; None: any node will do."""
    name = str(command[0]).upper()
    if name in ("EVALSHA", "EVAL"):
        return command[3] if int(command[2]) else None
    return None if name in _WITHOUT_KEY or len(command) < 2 else command[1]


class Cluster:
    """Commands to the nodes that serve their keys. Any thread.

    - keeps the map of slots, corrects it by what the nodes say (MOVED), asks for it anew after a failure
    - keeps a pool of connections for each node
    """

    def __init__(self, dialler: Dialler, target: Target, heartbeat_s: float) -> None:
        self._dialler = dialler
        self._target = target
        self._heartbeat_s = heartbeat_s
        self._lock = threading.Lock()
        self._asking_lock = threading.Lock()
        self._pools: dict[Address, Pool] = {}
        self._owners: list[Address | None] = [None] * _SLOTS
        self._is_stale = True

    def dial(self, key: Argument | None = None) -> Link:
        """A connection for whoever asks, to the master that serves ``key``. Raises ``Unavailable``."""
        self.doubt()
        return self._dialler.dial(self.owner(key))

    def attempt(self, commands: Sequence[Command], again: bool) -> list[Any]:
        """An answer for each: the server's, a ``ReplyError``, or a ``TransportError``."""
        return _Batch(self, commands).run(again)

    def close(self) -> None:
        with self._lock:
            for pool in self._pools.values():
                pool.close()

    def __str__(self) -> str:
        return "the cluster of " + ", ".join(map(str, self._target.addresses))

    # --- for a batch ---------------------------------------------------------------------------------------

    def owner(self, key: Argument | None) -> Address:
        """The master that serves a key; without one, any. Raises ``Unavailable``."""
        if self._is_stale:
            self._refresh()
        owners = self._owners if key is None else (self._owners[slot_of(key)],)
        owner = next(filter(None, owners), None)
        if owner is None:
            raise refused(hiredis.ReplyError("CLUSTERDOWN no node serves the slot"), self)
        return owner

    def pool(self, address: Address) -> Pool:
        """The connections to a node."""
        with self._lock:
            pool = self._pools.get(address)
            if pool is None:
                pool = self._pools[address] = Pool(partial(self._dialler.dial, address), self._heartbeat_s)
            return pool

    def follow(self, error: hiredis.ReplyError) -> Address:
        """Where MOVED or ASK sends us; the former is remembered."""
        first = self._target.addresses[0]
        with understood(self):
            code, slot, place = str(error).split(" ")[:3]
            host, _, port = place.rpartition(":")
            address = Address(host or first.host, int(port), tls=first.tls)
            if code == "MOVED":
                self._owners[int(slot)] = address
        return address

    def doubt(self) -> None:
        """Something failed: the map may be wrong."""
        self._is_stale = True

    # --- the map -------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Ask any node for the map. Raises ``Unavailable``."""
        failures = []
        with self._asking_lock:
            if not self._is_stale:  # another thread has asked meanwhile
                return
            for address in dict.fromkeys((*self._target.addresses, *self._pools)):
                try:
                    self._learn(address)
                except Unavailable as error:
                    failures.append(error)
                else:
                    return
        raise Unavailable("; ".join(map(str, failures[: len(self._target.addresses)]))) from failures[0]

    def _learn(self, address: Address) -> None:
        link = self._dialler.dial(address, replica=True)
        try:
            (answer,) = link.exchange([("CLUSTER", "SLOTS")])
            if isinstance(answer, hiredis.ReplyError):
                raise refused(answer, address)
            owners: list[Address | None] = [None] * _SLOTS
            with understood(address):
                for first, last, (host, port, *_), *_ in answer:
                    owner = Address(host.decode() if host else address.host, port, tls=address.tls)
                    owners[first : last + 1] = [owner] * (last - first + 1)
        except LinkLost as error:
            raise Unavailable(str(error)) from error
        finally:
            link.close()
        self._owners, self._is_stale = owners, False


class _Batch:
    """Commands on their way through a cluster.

    - sends to all nodes before it reads the first answer
    - sends on what a node refused; never what may have been done, unless it may be done again
    """

    def __init__(self, cluster: Cluster, commands: Sequence[Command]) -> None:
        self._cluster = cluster
        self._commands = commands
        self._answers: list[Any] = [None] * len(commands)
        self._left: Sequence[int] = range(len(commands))
        self._asking: dict[int, Address] = {}
        """Where ASK sends some of what is left."""
        self._doubts: dict[int, Uncertain] = {}
        """What is done again because nobody knows whether it was done."""

    def run(self, again: bool) -> list[Any]:
        """An answer for each: the server's, a ``ReplyError``, or a ``TransportError``."""
        for round_ in range(_ROUNDS):
            if round_ > 1 and not self._asking:
                time.sleep(_PAUSE_S * 2**round_)  # a move or a failover is under way
            self._round()
            self._left = [at for at in self._left if self._goes_on(at, round_ == 0, again)]
            if not self._left:
                break
        for at, doubt in self._doubts.items():
            if isinstance(self._answers[at], TransportError | hiredis.ReplyError):
                self._answers[at] = doubt
        return self._answers

    def _round(self) -> None:
        """Send what is left to its nodes, then read all answers."""
        links: dict[Link, tuple[Pool, list[int]]] = {}
        try:
            for address, numbers in self._by_node().items():
                try:
                    pool = self._cluster.pool(address)
                    link = pool.take()
                    links[link] = pool, numbers
                    link.send(pack([step for at in numbers for step in self._steps(at)]))
                except (TransportError, LinkLost) as error:
                    self._failed(numbers, error)
            for link, (pool, numbers) in list(links.items()):
                if link.is_open and self._read(link, numbers):
                    del links[link]
                    pool.give(link)
        finally:
            for link, (pool, _) in links.items():
                link.close()
                pool.clear()

    def _by_node(self) -> dict[Address, list[int]]:
        batches: dict[Address, list[int]] = {}
        for at in self._left:
            try:
                address = self._asking.get(at) or self._cluster.owner(key_of(self._commands[at]))
            except Unavailable as error:
                self._failed((at,), error)
            else:
                batches.setdefault(address, []).append(at)
        return batches

    def _steps(self, at: int) -> tuple[Command, ...]:
        return (("ASKING",), self._commands[at]) if at in self._asking else (self._commands[at],)

    def _read(self, link: Link, numbers: Sequence[int]) -> bool:
        for count, at in enumerate(numbers):
            try:
                if at in self._asking:
                    link.receive()
                self._answers[at] = link.receive()
            except LinkLost as error:
                self._failed(numbers[count:], error)
                return False
        return True

    def _failed(self, numbers: Sequence[int], error: TransportError | LinkLost) -> None:
        self._cluster.doubt()
        failure = lost(error) if isinstance(error, LinkLost) else error
        for at in numbers:
            self._answers[at] = failure

    def _goes_on(self, at: int, is_first: bool, again: bool) -> bool:
        """Whether a command is to be sent once more, after the answer that it got."""
        answer = self._answers[at]
        self._asking.pop(at, None)
        if isinstance(answer, Uncertain):
            if again and is_first:
                self._doubts[at] = answer
            return again and is_first
        if isinstance(answer, TransportError):
            return is_first  # by a fresh map
        if not isinstance(answer, hiredis.ReplyError) or (code := code_of(answer)) not in _SENT_ON:
            return False
        if code == "ASK":
            self._asking[at] = self._cluster.follow(answer)
        elif code == "MOVED":
            self._cluster.follow(answer)
        elif code != "TRYAGAIN":
            self._cluster.doubt()
        return True
