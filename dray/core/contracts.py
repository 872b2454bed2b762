"""What a transport, a result back end, a serializer, a signer, a compressor and a pool are.

A plugin is one class behind an entry point. It is built as ``Plugin(options, context)``: ``options`` is an instance
of the class's own ``Options`` (a frozen dataclass that the core fills and checks from the configuration), ``context``
a :class:`PluginContext`. The class says ``api = 1``: the version of this interface that it was written for.

Driver exceptions never leave a plugin. It maps them to ``Unavailable`` (certainly not done), ``Uncertain`` (may be
done), with the original as cause. The batch is the only form: a single call is a batch of one. An empty batch does
nothing. Optional abilities are runtime-checkable protocols below.
"""

from __future__ import annotations

import enum
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from dray.core.clock import Clock, Random
from dray.core.faults import Faults
from dray.core.message import (
    TERMINAL,
    DeadLetter,
    Delivery,
    Outcome,
    Outgoing,
    QueueStats,
    RunningTask,
    Settlement,
    StoredResult,
)

API_VERSION = 1
"""The version of the interface in this module. A plugin states the one it speaks as ``api``."""

Seconds = Annotated[float, "seconds"]
"""An option that is a length of time: ``30``, ``"30s"``, ``"5m"``, ``"1h30m"``, ``"7d"``."""
Size = Annotated[int, "size"]
"""An option that is a number of bytes: ``4096``, ``"8KiB"``, ``"1MB"``."""
Secret = Annotated[str, "secret"]
"""An option that never appears in logs, errors or ``dray config show``."""


@dataclass(frozen=True, slots=True)
class PluginContext:
    """What the core hands to every plugin."""

    name: str
    """The name it was chosen by."""
    logger: logging.Logger
    clock: Clock
    random: Random
    base: Path
    """The folder that relative paths in options are meant from: the configuration's, else the working directory."""
    faults: Faults | None = None


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a plugin that has none."""


class Plugin:
    """What all kinds share: the version they speak, how they are built."""

    api: ClassVar[int]
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: Any, context: PluginContext) -> None:
        self.options = options
        self.context = context


# --- transports --------------------------------------------------------------------------------------------


class Durability(enum.IntEnum):
    """What a confirmed message survives. Each level includes those below it."""

    D0 = 0
    """Nothing: lost with the process."""
    D1 = 1
    """The end of our process."""
    D2 = 2
    """``kill -9`` of the broker (for an embedded store: of any process that uses it)."""
    D3 = 3
    """Power loss of the broker's machine."""
    D4 = 4
    """The loss of one broker node."""


@dataclass(frozen=True, slots=True)
class TransportFeatures:
    """What a transport can do. The core asks these, never the plugin's name; the conformance kit proves them."""

    durability: Durability = Durability.D0
    lease_s: float | None = None
    """Length of a lease in seconds; None: it lasts as long as the consumer's connection."""
    max_delay_s: float = 0.0
    """Longest ``not_before`` that the transport keeps, in seconds; 0: none; ``inf``: any."""
    priorities: int = 1
    """Number of levels that are told apart, 1 to 10: the priorities 0 to 9 are spread evenly over them."""
    atomic_then: bool = False
    """``then`` and the removal are one transaction; otherwise published first, removed second."""
    dead_letter: bool = False
    """Keeps dead letters itself (:class:`DeadLetters`)."""
    release: bool = False
    """Gives a message back at once at no charge."""
    max_body_bytes: int = 2**20
    """Largest body plus headers; more is refused before anything is sent."""
    push: bool = False
    """The broker pushes: ``buffer`` matters."""
    shared: bool = True
    """Other processes reach the same queues (False: memory)."""
    hastens: bool = False
    """Can make delayed messages of buried ids due at once (:class:`Tombstones`)."""


class Transport(Plugin, ABC):
    """Moves messages: stores them, hands them out under a lease, swaps them for others.

    Life: built, ``open``, any calls, ``close``. An instance is never used on both sides of a ``fork``: the core drops
    it in the child without a call, and makes a new one there.
    """

    features: TransportFeatures
    """Of the class: what it can do. An instance refines them by its options when it is built; ``open`` may lower
    ``durability`` to what it finds, and nothing else, because the rest is decided before."""

    def open(self) -> None:
        """Connect and probe. Idempotent. Raises ``Unavailable``."""
        return

    def declare(self, queues: Sequence[str]) -> None:
        """Make sure that these queues exist. Idempotent. Any thread."""
        del queues

    @abstractmethod
    def send(self, messages: Sequence[Outgoing]) -> None:
        """Store the messages; when it returns, all are stored at the level ``features.durability`` claims.

        Any thread, concurrently. Blocks for the round trip. Order is kept per queue and priority within the call.
        Raises ``SendError`` (``unsent``: those certainly not stored), ``Unavailable`` (none stored), ``Uncertain``
        (any may be stored), ``TooLarge`` (checked first: none stored).
        """

    @abstractmethod
    def consumer(self, queues: Sequence[str], buffer: int) -> Consumer:
        """A consumer of these queues, earlier ones preferred; ``buffer`` bounds what may be held unclaimed here."""

    @abstractmethod
    def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """Publish each ``then``, then apply the action; return the deliveries that were no longer ours.

        For those nothing was changed, and their ``then`` was not published. One thread at a time (never together with
        :meth:`extend`), while others send and receive. An error means "unknown, the same batch comes again", so
        settling twice is harmless: a delivery that is already settled counts as no longer ours. Between publishing and
        removing, without ``atomic_then``, goes ``context.faults.hit("follow_ups_sent")``. An action that the features
        do not declare raises ``NotSupported`` and changes nothing.
        """

    @abstractmethod
    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> list[Delivery]:
        """Make these leases end ``lease_s`` seconds from now; return the deliveries that were no longer ours.

        Never together with :meth:`settle`. Called at a third of the lease. Without leases: ``return []``.
        """

    def close(self) -> None:
        """Let go of everything. Idempotent, safe before ``open``; blocks a few seconds at most."""
        return


class Consumer(ABC):
    """Takes messages from queues. Owned by one thread; only ``wake`` may be called from others."""

    @abstractmethod
    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        """0 to ``limit`` deliveries as soon as there is one; ``[]`` after ``timeout_s`` or a wake. Never waits to fill.

        ``timeout_s`` 0 polls. Higher priority first, then oldest first, as far as the features say. The delivery count
        is taken (durably) before it returns. Expired leases are handed out again. Raises ``Unavailable``, or
        ``Uncertain`` if something may have been handed out, when the link is lost; the consumer is then finished, and
        the core opens another.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make the current ``receive``, or the next one, return promptly. Any thread, a signal handler included."""

    def close(self) -> None:
        """Give back what was fetched and never handed out. What was handed out stays with the worker. Idempotent."""
        return


@runtime_checkable
class Inspectable(Protocol):
    """A transport that can look into its queues. Any thread."""

    def queues(self) -> list[str]:
        """The names of all queues that hold anything, or were declared."""
        ...

    def stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        """How full each of these queues is; unknown ones are zero."""
        ...

    def peek(self, queue: str, limit: int) -> list[Outgoing]:
        """Waiting messages (ready, then delayed), in the order they would be handed out, without claiming any.

        Delayed ones are left out, here and by :meth:`purge`, where the transport cannot tell how many there are.
        """
        ...

    def purge(self, queue: str) -> int:
        """Delete what waits in a queue (ready and delayed, not leased, not dead); return how many."""
        ...


@runtime_checkable
class DeadLetters(Protocol):
    """A transport that keeps dead letters. Any thread."""

    def dead_list(self, queue: str | None, limit: int) -> list[DeadLetter]:
        """The newest dead letters, of one queue or of all."""
        ...

    def dead_get(self, ids: Sequence[str]) -> list[DeadLetter]:
        """The dead letters with these task ids."""
        ...

    def dead_purge(self, ids: Sequence[str]) -> list[str]:
        """Delete these for ever; return the ids that were."""
        ...


@runtime_checkable
class Tombstones(Protocol):
    """A transport that remembers ids which must not be run (again): revoked ones, and replays of ended ones.

    It keeps the fact and nothing else: a message of a buried id is handed out as any other, and the worker settles it.

    A stored fact, as durable as a message. Any thread.
    """

    def bury(self, marks: Mapping[str, str], expires_at: float, hasten: bool = False) -> None:
        """Remember each id with its mark (short text) until ``expires_at``.

        ``hasten``: also make delayed messages of these ids due now, so that a worker settles them soon instead of when
        their time comes; ignored where the features do not declare it. May look through whole queues.
        """
        ...

    def buried(self, ids: Sequence[str]) -> dict[str, str]:
        """Those of the ids that are remembered, with their marks."""
        ...

    def exhume(self, ids: Sequence[str]) -> None:
        """Forget these."""
        ...


@runtime_checkable
class Broadcaster(Protocol):
    """A transport that reaches every worker at once: control commands and events. Any thread."""

    def broadcast(self, channel: str, payload: bytes) -> None:
        """Hand ``payload`` to whoever listens now; nothing is kept for others."""
        ...

    def listen(self, channel: str, deliver: Callable[[bytes], None]) -> Callable[[], None]:
        """Call ``deliver`` (from a thread of the transport's) for each payload; returns the call that stops it."""
        ...


# --- result back ends --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResultFeatures:
    """What a result back end can do."""

    keeps: bool = True
    """False: nothing is kept (``null``), and asking for a result says so."""
    durability: Durability = Durability.D0
    push: bool = False
    """``wait`` is woken by a result instead of polling."""
    max_body_bytes: int = 2**20
    shared: bool = True
    """Other processes see the results (False: memory)."""


class ResultBackend(Plugin, ABC):
    """Keeps states and values of tasks until they expire. All methods may be called from any thread."""

    features: ResultFeatures
    """As of a transport."""

    def open(self) -> None:
        """Connect and probe. Idempotent. Raises ``Unavailable``."""
        return

    def address(self) -> str:
        """What the ids that this process makes end with, so that results find the way back here; ``""``: no need.

        At most 32 characters that an id may hold. Asked after :meth:`open`. The core puts a dot in front of it; ids
        that were given by hand have none.
        """
        return ""

    @abstractmethod
    def store(self, results: Sequence[StoredResult]) -> None:
        """Write all, in one round trip where possible, at the durability claimed.

        A terminal state is never replaced by anything (first terminal result wins); others are replaced. Raises
        ``Unavailable``, ``Uncertain``, ``TooLarge`` (checked first: none stored); repeating the batch is harmless.
        """

    @abstractmethod
    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        """What is known of these ids; unknown and expired ones are left out."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Forget these."""

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        """The terminal ones among ``ids``, as soon as there is one; ``{}`` after ``timeout_s`` seconds.

        The default polls, from 50 ms up to 1 s with jitter.
        """
        clock, pause_s = self.context.clock, 0.05
        deadline = clock.monotonic() + timeout_s
        never = threading.Event()
        while True:
            found = {key: result for key, result in self.fetch(ids).items() if result.state in TERMINAL}
            left_s = deadline - clock.monotonic()
            if found or left_s <= 0:
                return found
            clock.wait(never, min(left_s, pause_s * self.context.random.uniform(0.8, 1.2)))
            pause_s = min(pause_s * 1.5, 1.0)

    def close(self) -> None:
        """Let go of everything. Idempotent, safe before ``open``."""
        return


@runtime_checkable
class Barrier(Protocol):
    """A result back end that can tell when the last of a group has arrived. Any thread."""

    def arrive(self, group: str, member: str, size: int) -> bool:
        """Note that ``member`` of ``group`` arrived; True for the last *distinct* member of ``size``, and for no other.

        True again when that same member arrives again: its worker may have died before it could act on the answer, and
        what it does then has a deterministic id.
        """
        ...


# --- serializers, signers, compressors ---------------------------------------------------------------------


class Serializer(Plugin, ABC):
    """Values to bytes and back. Stateless; any thread."""

    name: ClassVar[str]
    """The tag on the wire: ASCII, at most 16 characters."""
    content_type: ClassVar[str]
    safe: ClassVar[bool] = True
    """False: bytes can run code; refused unless ``accept`` lists the name."""

    @abstractmethod
    def dumps(self, value: object) -> bytes:
        """Raises ``EncodeError`` that says what to pass instead."""

    @abstractmethod
    def loads(self, data: bytes) -> object:
        """Raises ``DecodeError`` for any bytes that :meth:`dumps` would not make; never anything else."""


class Signer(Plugin, ABC):
    """Chosen where a serializer is named (``serializer: {use: signed, inner: json, ...}``); signs."""

    inner: str
    """The name of the serializer that makes the bytes."""
    max_age_s: float
    """A message issued longer ago is refused, in seconds; how long replays are remembered."""

    @abstractmethod
    def sign(self, data: bytes) -> str:
        """The value of the signature header (ASCII) for ``data``. Raises ``EncodeError`` without a key to sign with."""

    @abstractmethod
    def verify(self, data: bytes, signature: str) -> None:
        """Raises ``SignatureError`` unless ``signature`` was made for ``data`` with a trusted key. Any thread."""


class Compressor(Plugin, ABC):
    """Bytes to fewer bytes and back. Stateless; any thread."""

    name: ClassVar[str]
    """The tag on the wire: ASCII, at most 16 characters."""

    @abstractmethod
    def compress(self, data: bytes) -> bytes: ...

    @abstractmethod
    def decompress(self, data: bytes, max_bytes: int) -> bytes:
        """Raises ``DecodeError`` for bad or cut input, for trailing bytes, and past ``max_bytes`` of output."""


# --- pools -------------------------------------------------------------------------------------------------


class Slot(Protocol):
    """The place in a pool where one task runs; the pool's side of the conversation with the executor."""

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        """The user's function starts now: note it, and arm the limits (seconds from now)."""
        ...

    def end(self) -> None:
        """The user's function ended: disarm the limits. After this returns no ``SoftTimeLimitExceeded`` is raised."""
        ...

    def report(self, result: StoredResult) -> None:
        """Store this non-terminal state (STARTED, progress) soon; never blocks for long, may be dropped when late."""
        ...


class Executor(Protocol):
    """Runs one delivery. Given to the pool whole; a process pool inherits it by ``fork``."""

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        """Decode, run, encode. Never raises an ``Exception``: whatever goes wrong becomes the outcome."""
        ...

    def lost(self, delivery: Delivery, error: Exception) -> Outcome:
        """The outcome when the slot died (``WorkerLost``) or was killed (``TimeLimitExceeded``, ``TaskRevoked``).

        Quick, never raises: called under the pool's lock.
        """
        ...

    def forked(self) -> None:
        """Called once in each new child process before it runs anything: drop what does not survive a fork."""
        ...


@dataclass(frozen=True, slots=True)
class PoolFeatures:
    """What a pool can do to a running task."""

    interrupt: bool = False
    """Raises inside a running task: soft limits."""
    kill: bool = False
    """Ends a running task for certain: hard limits, ``revoke(terminate=True)``."""
    green: bool = False
    """Patches the standard library; ``prepare`` must come before any other import."""


class Pool(Plugin, ABC):
    """Runs deliveries in ``capacity`` slots.

    Life: built, ``start``, any number of ``submit``, ``stop``. Each submitted delivery ends in exactly one of: an
    outcome given to ``done``; being returned by ``recall``; being returned by ``stop``; a true ``cancel`` without kill.
    The pool hands back the very ``Delivery`` object that it was given.
    """

    features: PoolFeatures
    capacity: int

    @classmethod
    def prepare(cls) -> None:
        """The first thing that happens in the process: monkey-patching."""
        return

    @abstractmethod
    def start(
        self,
        executor: Executor,
        done: Callable[[Sequence[Outcome]], None],
        report: Callable[[Sequence[StoredResult]], None],
    ) -> None:
        """Make the slots. Called on the main thread before the worker starts any thread or opens a connection.

        ``done`` and ``report`` may be called from any thread and never block.
        """

    @abstractmethod
    def submit(self, deliveries: Sequence[Delivery]) -> None:
        """Queue these for running, in order. Never blocks. One thread."""

    @abstractmethod
    def recall(self) -> list[Delivery]:
        """Take back all that has not begun. Any thread."""

    @abstractmethod
    def cancel(self, delivery: Delivery, *, kill: bool = False) -> bool:
        """Take back one that has not begun: True, and no ``done`` follows. Any thread.

        One that runs is ended if ``kill`` and the pool can: True, and its outcome comes through ``done`` as
        ``executor.lost(delivery, TaskRevoked(...))``. To know which it was, ask without ``kill`` first.
        """

    def run(self, stopping: threading.Event) -> None:
        """Called on the process's main thread while the worker works; returns soon after ``stopping`` is set.

        A pool whose tasks belong on the main thread (``solo``) runs them here. The default waits.
        """
        # Not for ever: the system may give a signal to any thread, and its handler runs when this one runs Python code.
        while not stopping.wait(1.0):
            pass

    @abstractmethod
    def stop(self, timeout_s: float) -> list[Delivery]:
        """Wait up to ``timeout_s`` seconds for what runs, end the rest, and return what did not finish, begun or not.

        No ``done`` follows. Idempotent, safe before ``start``.
        """

    def running(self) -> list[RunningTask]:
        """What runs now. Any thread; cheap."""
        return []
