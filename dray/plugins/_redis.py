"""Redis for the transport and the result back end: one client object per plugin, over connections of our own.

The driver is hiredis, Redis' own parser in C. What redis-py would add on top is what a task queue must not have: silent
repeats of commands that may have been carried out.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import hiredis

from dray.core.contracts import Durability, PluginContext
from dray.core.errors import TransportError, Unavailable, Uncertain
from dray.plugins._redis_link import Argument, Command, Dialler, Link, LinkLost, understood
from dray.plugins._redis_link_cluster import Cluster
from dray.plugins._redis_link_errors import code_of, refused
from dray.plugins._redis_link_listener import Listener
from dray.plugins._redis_link_pool import Single
from dray.plugins._redis_link_server import Server, probe
from dray.plugins._redis_link_url import RedisOptions, target_of

__all__ = [
    "Argument",
    "Command",
    "Link",
    "LinkLost",
    "Listener",
    "Redis",
    "RedisOptions",
    "Script",
    "Server",
    "code_of",
    "refused",
]


class Script:
    """A Lua script, called by its hash. Only the first key decides where it runs: all must be in one slot."""

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: Sequence[Argument], arguments: Iterable[Argument] = ()) -> Command:
        """The command that runs it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


class Redis:
    """Commands to wherever the options' URLs lead. Any thread, one process.

    - one server, the first writable of several, the master that Sentinels name, or a cluster
    - batches in one round trip; scripts that the server has forgotten are sent again
    - each failure is an ``Unavailable`` or an ``Uncertain`` that names the setting; nothing is repeated in silence
      that may have been done, unless the caller says that it may be
    """

    def __init__(self, options: RedisOptions, context: PluginContext, scripts: Iterable[Script] = ()) -> None:
        self._target = target_of(options)
        self.is_cluster = self._target.kind == "cluster"
        self.is_closed = False
        self._options = options
        self._context = context
        self._sources = {script.sha: script.source for script in scripts}
        self._router = self._make_router()
        self._lock = threading.Lock()
        self._listener: Listener | None = None

    # --- life ----------------------------------------------------------------------------------------------

    def open(self) -> Server:
        """Connect and look at the server. Raises ``Unavailable``."""
        if self.is_closed:
            self._router, self.is_closed = self._make_router(), False
        link = self.dial()
        try:
            server = probe(link)
        except LinkLost as error:
            raise Unavailable(str(error)) from error
        finally:
            link.close()
        if server.is_cluster and not self.is_cluster:
            raise refused(hiredis.ReplyError("MOVED"), link.address)
        if self._target.kind != "plain" or len(self._target.addresses) > 1:
            window = f"{server.window}; a failover costs what the replica had not received yet"
            server = replace(server, durability=min(server.durability, Durability.D1), window=window)
        return server

    def close(self) -> None:
        """Idempotent; every call after it raises ``Unavailable``."""
        with self._lock:
            self.is_closed = True
            listener, self._listener = self._listener, None
        self._router.close()
        if listener is not None:
            listener.close()

    @property
    def listener(self) -> Listener:
        """What hears what is published; connects with its first subscription."""
        with self._lock:
            self._check_open()
            if self._listener is None:
                options, context = self._options, self._context
                patience_s = options.connect_timeout + options.timeout
                self._listener = Listener(self.dial, options.heartbeat, patience_s, context.logger, context.random)
            return self._listener

    def dial(self, key: Argument | None = None) -> Link:
        """A connection of the caller's own to the master (of ``key``). Raises ``Unavailable``."""
        self._check_open()
        return self._router.dial(key)

    def _make_router(self) -> Cluster | Single:
        options = self._options
        dialler = Dialler(options, self._target, self._context.base)
        return (Cluster if self.is_cluster else Single)(dialler, self._target, options.heartbeat)

    def _check_open(self) -> None:
        if self.is_closed:
            raise Unavailable("redis: the connection was closed by this process")

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Round what takes answers apart: nonsense becomes ``Uncertain``."""
        try:
            with understood(self._router):
                yield
        except LinkLost as error:
            raise Uncertain(str(error)) from error

    # --- commands ------------------------------------------------------------------------------------------

    def call(self, *command: Argument, again: bool = False) -> Any:
        """The answer to one command; see :meth:`run`."""
        return self.run((command,), again)[0]

    def run(self, commands: Sequence[Command], again: bool = False) -> list[Any]:
        """The answers to all, in one round trip (to each node of a cluster at the same time).

        ``again``: they may be done twice, so a connection that breaks is replaced once. Raises ``Unavailable`` (none
        was done) or ``Uncertain`` (each may have been).
        """
        answers = self.attempt(commands, again)
        failures = [answer for answer in answers if isinstance(answer, TransportError)]
        if not failures:
            return answers
        first = next((failure for failure in failures if isinstance(failure, Uncertain)), failures[0])
        if len(failures) < len(answers) and not isinstance(first, Uncertain):
            raise Uncertain(f"{first}; {len(answers) - len(failures)} of {len(answers)} commands were done") from first
        raise first

    def attempt(self, commands: Sequence[Command], again: bool = False) -> list[Any]:
        """As :meth:`run`, with each failure in the place of its answer; raises only if it was closed."""
        self._check_open()
        if not commands:
            return []
        answers = self._router.attempt(commands, again)
        unknown = [at for at, answer in enumerate(answers) if isinstance(answer, hiredis.ReplyError)]
        if unknown:
            self._resolve(commands, answers, unknown, again)
        return answers

    def _resolve(self, commands: Sequence[Command], answers: list[Any], refusals: list[int], again: bool) -> None:
        """Send forgotten scripts whole; put all other refusals into our words."""
        forgotten = [at for at in refusals if code_of(answers[at]) == "NOSCRIPT" and commands[at][1] in self._sources]
        if forgotten:
            whole = [("EVAL", self._sources[str(commands[at][1])], *commands[at][2:]) for at in forgotten]
            for at, answer in zip(forgotten, self._router.attempt(whole, again), strict=True):
                answers[at] = answer
        for at in refusals:
            if isinstance(answers[at], hiredis.ReplyError):
                answers[at] = refused(answers[at], self._router, f", {commands[at][0]!s}")
