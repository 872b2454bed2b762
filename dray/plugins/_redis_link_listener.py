"""Pub/sub for a whole process: one connection and one thread, however many channels and listeners."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis

from dray.core.clock import Random
from dray.core.errors import TransportError, Unavailable
from dray.plugins._redis_link import Command, Link, LinkLost, pack, understood
from dray.plugins._redis_link_errors import refused

Deliver = Callable[[bytes], None]
Missed = Callable[[], None]
_PAUSES_S = (0.05, 2.0)
"""Between attempts to connect: the first, the longest."""


class _Subscription:
    """One listener of a channel."""

    def __init__(self, channel: bytes, deliver: Deliver, missed: Missed | None) -> None:
        self.channel = channel
        self.deliver = deliver
        self.missed = missed
        self.settled = threading.Event()
        self.error: TransportError | None = None

    def settle(self, error: TransportError | None = None) -> None:
        """It is in force, or cannot be."""
        if not self.settled.is_set():
            self.error = error
            self.settled.set()


class Listener:
    """Hands on what is published. Any thread.

    - subscribes on behalf of many; connects when the first asks, and again by itself when the connection is lost
    - tells each of them, once it listens again, that something may have been missed
    - notices a silent peer: asks after ``heartbeat_s`` of silence, gives up after another
    """

    def __init__(
        self, dial: Callable[[], Link], heartbeat_s: float, patience_s: float, logger: logging.Logger, random: Random
    ) -> None:
        self._dial = dial
        self.heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._logger = logger
        self._random = random
        self._lock = threading.Lock()
        self._channels: dict[bytes, list[_Subscription]] = {}
        self._in_force: set[bytes] = set()
        self._thread: threading.Thread | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._is_closed = False

    def subscribe(self, channel: str, deliver: Deliver, missed: Missed | None = None) -> Callable[[], None]:
        """Call ``deliver`` with each payload from the moment this returns; returns the call that stops it.

        Both functions run in the listener's thread and must not block. ``missed``: the connection was lost and is
        back; what was published in between never comes. Raises ``Unavailable``.
        """
        subscription = _Subscription(channel.encode(), deliver, missed)
        with self._lock:
            if self._is_closed:
                raise Unavailable("redis: the connection was closed by this process")
            self._channels.setdefault(subscription.channel, []).append(subscription)
            if subscription.channel in self._in_force:
                subscription.settle()
            self._start()
        self._ring()
        if not subscription.settled.wait(self._patience_s) or subscription.error is not None:
            self._stop(subscription)
            error = subscription.error
            raise Unavailable(f"redis: cannot listen: {error or 'no answer'}") from error
        return lambda: self._stop(subscription)

    def close(self) -> None:
        """Idempotent. Not for the listener's own thread."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._ring()
            thread.join(self._patience_s)

    def _start(self) -> None:
        if self._thread is None:
            self._bell = socket.socketpair()
            for end in self._bell:
                end.setblocking(False)
            self._thread = threading.Thread(target=self._run, args=self._bell, name="dray-redis-listener", daemon=True)
            self._thread.start()

    def _ring(self) -> None:
        """Make the thread look at what is wanted."""
        if self._bell is not None:
            with contextlib.suppress(OSError):  # full: it is going to look; closed: it has ended
                self._bell[1].send(b"x")

    def _stop(self, subscription: _Subscription) -> None:
        with self._lock:
            others = self._channels.get(subscription.channel, [])
            if subscription in others:
                others.remove(subscription)
                if not others:
                    del self._channels[subscription.channel]
        self._ring()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self, ear: socket.socket, bell: socket.socket) -> None:
        pause_s, is_back = _PAUSES_S[0], False
        with ear, bell:
            while not self._is_closed:
                try:
                    link = self._dial()
                except TransportError as error:
                    self._logger.debug("redis listener: %s", error)
                    for subscription in self.subscriptions():
                        subscription.settle(error)
                    self._rest(ear, pause_s * self._random.uniform(0.5, 1.5))
                    pause_s = min(pause_s * 2, _PAUSES_S[1])
                    continue
                try:
                    _Session(link, ear, self, is_back).run()
                except LinkLost as error:
                    self._logger.info("redis listener: %s; connecting again", error)
                finally:
                    link.close()
                    self.in_force(())
                is_back, pause_s = True, _PAUSES_S[0]
                self._rest(ear, pause_s * self._random.uniform(0.0, 1.0))

    def _rest(self, ear: socket.socket, pause_s: float) -> None:
        deadline = time.monotonic() + pause_s
        poll = select.poll()
        poll.register(ear, select.POLLIN)
        while not self._is_closed and (left_s := deadline - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                drain(ear)

    # --- for the session, in the thread --------------------------------------------------------------------

    def wanted(self) -> set[bytes] | None:
        """The channels to be subscribed to; None: closed."""
        with self._lock:
            return None if self._is_closed else set(self._channels)

    def in_force(self, channels: Any) -> None:
        """These are subscribed to now."""
        with self._lock:
            self._in_force = set(channels)
            settled = [item for channel in self._in_force for item in self._channels.get(channel, ())]
        for subscription in settled:
            subscription.settle()

    def subscriptions(self, channel: bytes | None = None) -> list[_Subscription]:
        with self._lock:
            if channel is not None:
                return list(self._channels.get(channel, ()))
            return [item for items in self._channels.values() for item in items]

    def call(self, function: Callable[..., None], *args: bytes) -> None:
        """A listener's function; what it raises is logged and stops nothing."""
        try:
            function(*args)
        except Exception:
            self._logger.exception("redis listener: %r failed", function)


class _Session:
    """One connection's worth of listening. The listener's thread only."""

    def __init__(self, link: Link, ear: socket.socket, listener: Listener, is_back: bool) -> None:
        self._link = link
        self._ear = ear
        self._listener = listener
        self._is_back = is_back
        self._subscribed: set[bytes] = set()
        self._awaited: deque[bytes] = deque()
        """Channels whose subscription is not confirmed yet, as asked for."""
        self._is_asked = False
        """Whether the peer owes an answer to our PING."""
        self._poll = select.poll()
        self._poll.register(ear, select.POLLIN)
        self._poll.register(link.sock, select.POLLIN)

    def run(self) -> None:
        """Listen until the listener is closed. Raises ``LinkLost``."""
        heartbeat_ms = self._listener.heartbeat_s * 1000
        link, ear = self._link, self._ear.fileno()
        is_open = self._adapt()
        while is_open:
            ready = [number for number, _ in self._poll.poll(heartbeat_ms)]
            if not ready:
                self._ask()
            elif link.sock.fileno() in ready:
                self._is_asked = False
                for answer in link.available():
                    with understood(link.address):
                        self._take(answer)
            if ear in ready:
                drain(self._ear)
                is_open = self._adapt()

    def _adapt(self) -> bool:
        """Subscribe to what is wanted now, and to nothing else; False: the listener is closed."""
        wanted = self._listener.wanted()
        if wanted is None:
            return False
        new, gone = wanted - self._subscribed, self._subscribed - wanted
        self._subscribed = wanted
        self._awaited.extend(new)
        commands: list[Command] = [("SUBSCRIBE", channel) for channel in new]
        if gone:
            self._listener.in_force(wanted.difference(self._awaited))
            commands.append(("UNSUBSCRIBE", *gone))
        self._send(commands)
        return True

    def _take(self, answer: Any) -> None:
        """One answer or message."""
        if isinstance(answer, hiredis.ReplyError):
            self._refused(answer)
        elif answer[0] == b"message":
            for subscription in self._listener.subscriptions(answer[1]):
                self._listener.call(subscription.deliver, answer[2])
        elif answer[0] == b"subscribe" and self._awaited:
            self._awaited.popleft()
            self._listener.in_force(self._subscribed.difference(self._awaited))
            if self._is_back and not self._awaited:
                self._is_back = False
                for subscription in self._listener.subscriptions():
                    if subscription.missed is not None:
                        self._listener.call(subscription.missed)

    def _refused(self, error: hiredis.ReplyError) -> None:
        """The oldest subscription asked for is not allowed."""
        if self._awaited:
            channel = self._awaited.popleft()
            for subscription in self._listener.subscriptions(channel):
                subscription.settle(refused(error, self._link.address, f", channel {channel.decode()}"))

    def _ask(self) -> None:
        """Nothing came for a heartbeat: is anybody there?"""
        if self._is_asked:
            raise LinkLost(f"redis at {self._link.address}: silent for two heartbeats")
        self._is_asked = True
        self._send([("PING",)])

    def _send(self, commands: list[Command]) -> None:
        if commands:
            self._link.send(pack(commands))


def drain(ear: socket.socket) -> None:
    """Forget that it was rung."""
    with contextlib.suppress(BlockingIOError):
        while ear.recv(4096):
            pass
