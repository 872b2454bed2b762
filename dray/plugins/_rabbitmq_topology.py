"""The queues of one prefix in RabbitMQ: what they are called, how they are declared."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dray.core.errors import ConfigError, InvalidName, Unavailable
from dray.core.message import Outgoing
from dray.plugins._rabbitmq_channel import Channel
from dray.plugins._rabbitmq_delays import Delays, Route
from dray.plugins._rabbitmq_errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, Refused
from dray.plugins._rabbitmq_link import Link

_NAME_BYTES_MAX = 255
_SEALS_ITSELF = (4, 0)
_SEAL_MS = 10_000
_NO_LIMIT = 2**31 - 1
"""A quorum queue of RabbitMQ 4 drops a message at its 20th redelivery unless it is told otherwise; 3.10 takes -1 for a
limit that is always passed. The core counts, and puts messages aside."""


class Topology:
    """Names and declarations.

    - a work queue is one queue in the broker; with priorities on quorum queues one per level, because most versions
      have no levels in them
    - declares each once, and again when asked to forget
    - a queue that exists with other arguments is an error that names the option
    """

    def __init__(self, prefix: str, queue_type: str, priorities: int, arguments: dict[str, Any]) -> None:
        self._prefix = prefix
        self._type = queue_type
        self._priorities = priorities
        self._extra = arguments
        self._per_level = queue_type == "quorum" and priorities > 1
        self.delays = Delays(prefix, queue_type == "quorum")
        self._lock = threading.Lock()  # one thread declares; guards what follows
        self._channel: Channel | None = None
        self._declared: set[str] = set()
        self._ladder: set[object] = set()
        self.register: Callable[[Sequence[str]], None] = lambda _: None
        """Writes down work queues that are about to be made."""
        self.known: dict[str, None] = {}
        """Work queues that this transport has declared, in order."""

    # --- names ---------------------------------------------------------------------------------------------

    def level(self, priority: int) -> int:
        """The level of a priority from 0 to 9: levels are spread evenly over them."""
        return round(priority * (self._priorities - 1) / 9) if priority else 0

    def priority(self, level: int) -> int:
        """The inverse, as far as levels tell."""
        return round(level * 9 / (self._priorities - 1)) if level else 0

    def name(self, queue: str, level: int = 0) -> str:
        """What it is called in the broker."""
        kind = f"priority{level}" if level and self._per_level else "queue"
        return f"{self._prefix}.{kind}.{queue}"

    def names(self, queue: str) -> list[tuple[int, str]]:
        """All that a work queue is made of, with their levels; what is handed out first is at the front."""
        levels = range(self._priorities if self._per_level else 1)
        return [(level, self.name(queue, level)) for level in reversed(levels)]

    @property
    def dead(self) -> str:
        """The queue of all dead letters."""
        return f"{self._prefix}.dead"

    @property
    def registry(self) -> str:
        """The queue in which the names of all work queues lie."""
        return f"{self._prefix}.queues"

    # --- declarations --------------------------------------------------------------------------------------

    def declare(self, queues: Iterable[str], link: Link) -> None:
        """Make sure that these exist. Raises ``Unavailable``, ``ConfigError``."""
        missing = [queue for queue in queues if queue not in self._declared]
        if not missing:
            return
        names = [name for queue in missing for _, name in self.names(queue)]
        for name in names:
            _check(name)
        with self._lock:
            new = [queue for queue in missing if not self._exist([self.name(queue)], link)]
            if new:
                self._declare([self.registry], link)
                self.register(new)
            self._declare(names, link)
            self._declared.update(missing)
            self.known.update(dict.fromkeys(missing))
            if new:
                self._seal(link)

    def declare_dead(self, link: Link) -> None:
        """Make sure that dead letters have a place."""
        if self.dead in self._declared:
            return
        with self._lock:
            is_new = not self._exist([self.dead], link)
            self._declare([self.dead], link)
            self._declared.add(self.dead)
            if is_new:
                self._seal(link)

    def forget(self, queues: Iterable[str]) -> None:
        """These may have been deleted: declare them again."""
        with self._lock:
            self._declared.difference_update(queues)
            self._declared.discard(self.dead)
            self._ladder.clear()

    def counts(self, names: Sequence[str], channel: Channel) -> list[int]:
        """Declare these, and tell how many messages are ready in each."""
        calls = [("queue_declare", self._queue(name)) for name in names]
        try:
            return [int(frame.method.message_count) for frame in channel.calls(calls)]
        except Refused as error:
            raise self._explained(error) from error

    def route(self, message: Outgoing, delay_s: float, link: Link) -> Route:
        """The way of a message that is to wait, with everything on it declared."""
        name = self.name(message.queue, self.level(message.priority))
        route = self.delays.route(name, delay_s)
        needs: list[object] = ["exchanges", name, *route.waits]
        if not self._ladder.issuperset(needs):
            with self._lock:
                self._declare_ladder([need for need in needs if need not in self._ladder], link)
                self._ladder.update(needs)
        return route

    def _declare_ladder(self, needs: Sequence[Any], link: Link) -> None:
        calls: list[Any] = []
        for need in needs:
            if need == "exchanges":
                calls += self.delays.exchanges()
            elif isinstance(need, str):
                calls.append(self.delays.arrival(need))
            else:
                calls += self.delays.waiting(*need)
        is_new = not self._exist([call[1]["queue"] for call in calls if call[0] == "queue_declare"], link)
        try:
            self._open_channel(link).calls(calls)
        except Refused as error:
            raise self._explained(error) from error
        if is_new:
            self._seal(link)

    def _declare(self, names: Sequence[str], link: Link) -> None:
        self.counts(names, self._open_channel(link))

    def _exist(self, names: Sequence[str], link: Link) -> bool:
        """Whether all of these are there."""
        try:
            self._open_channel(link).calls([("queue_declare", {"queue": name, "passive": True}) for name in names])
        except Refused as error:
            return error.code != NOT_FOUND
        return True

    def _seal(self, link: Link) -> None:
        """Make new quorum queues safe against ``kill -9`` of the broker.

        RabbitMQ 3.10 writes the state of a new one to the disk some seconds later, and when it is killed before, the
        queue never finds a leader again; making another queue has it written now. That one goes by itself.
        """
        if link.server >= _SEALS_ITSELF:
            return
        arguments = {"x-queue-type": "quorum", "x-expires": _SEAL_MS}
        name = f"{self._prefix}.seal.{uuid.uuid4().hex}"
        self._open_channel(link).call("queue_declare", queue=name, durable=True, arguments=arguments)

    def _open_channel(self, link: Link) -> Channel:
        channel = self._channel
        if channel is None or not channel.is_open or channel.link is not link:
            channel = self._channel = link.channel()
        return channel

    def _queue(self, name: str) -> dict[str, Any]:
        is_quorum = self._type == "quorum" or name == self.registry
        arguments: dict[str, Any] = {"x-queue-type": "quorum" if is_quorum else "classic"}
        if is_quorum:
            arguments["x-delivery-limit"] = _NO_LIMIT
        elif self._priorities > 1 and name not in (self.dead, self.registry):
            arguments["x-max-priority"] = self._priorities - 1
        if name not in (self.dead, self.registry):
            arguments |= self._extra
        return {"queue": name, "durable": True, "arguments": arguments}

    def _explained(self, error: Refused) -> Exception:
        if error.code == PRECONDITION_FAILED and "inequivalent" in error.text:
            return ConfigError(
                f"rabbitmq: {error.text}. It was declared with other settings (queue_type, priorities, "
                "consumer_timeout): use those, or delete it when it is empty, or set another prefix"
            )
        if error.code == ACCESS_REFUSED:
            return Unavailable(f"{error}: the user needs the permission 'configure' on {self._prefix}.*")
        return error


def _check(name: str) -> None:
    size = len(name.encode())
    if size > _NAME_BYTES_MAX:
        raise InvalidName(f"the queue {name!r} has a name of {size} bytes; RabbitMQ takes {_NAME_BYTES_MAX}")
