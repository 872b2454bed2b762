"""What is asked of a simulated world: its tasks, and when producers send and revoke them."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from dray.core.codec import Codec
from dray.core.errors import SendError, TransportError
from dray.core.message import Outgoing
from dray.core.registry import Registry
from dray.core.request import current
from dray.core.retry import Retry
from dray.core.task import CallOptions, Signature, Task, TaskOptions
from dray.testing.sim_audit import Audit, Entry
from dray.testing.sim_faults import Chaos

QUEUES = ("default", "mail")
SENDING_S = 40.0
"""Producers send within so many seconds."""
_AGAIN = Retry(on=ValueError, max=2, delay=1.0, max_delay=5.0)
_TASKS = {
    "plain": TaskOptions(),
    "retried": TaskOptions(retry=_AGAIN, track_started=True),
    "limited": TaskOptions(soft_time_limit=2.0, time_limit=3.0),
    "silent": TaskOptions(ignore_result=True, retry=_AGAIN),
    "late": TaskOptions(),
}
"""Task name -> options. All run the same function; ``late`` is known to workers after the deploy only."""


class Kind(NamedTuple):
    """One kind of call."""

    weight: int
    task: str
    seconds: tuple[float, float]
    until: tuple[int, int] = (0, 0)
    """It fails before this attempt: the least and the most that are drawn."""
    how: str = ""
    """``asks``: fails by raising ``Retry``; ``dies``: its process dies; ``kills``: the whole worker dies; ``broken``,
    ``refused``, ``unfit``, ``unknown``: a message that cannot be understood."""
    succeeds: bool = True


KINDS = {
    "plain": Kind(10, "plain", (0.01, 0.5)),
    "stubborn": Kind(4, "retried", (0.01, 0.5), (1, 2)),
    "hopeless": Kind(2, "retried", (0.01, 0.5), (9, 9), succeeds=False),
    "asks": Kind(3, "retried", (0.01, 0.5), (1, 2), "asks"),
    "fails": Kind(2, "plain", (0.01, 0.5), (9, 9), succeeds=False),
    "long": Kind(3, "plain", (10.0, 30.0)),
    "limited": Kind(2, "limited", (2.5, 5.0), succeeds=False),
    "poison": Kind(1, "retried", (0.01, 0.5), how="dies", succeeds=False),
    "assassin": Kind(1, "plain", (0.01, 0.5), how="kills", succeeds=False),
    "silent": Kind(3, "silent", (0.01, 0.5), (0, 1)),
    "cursed": Kind(1, "plain", (0.01, 0.5), succeeds=False),
    "late": Kind(2, "late", (0.01, 0.5)),
    "broken": Kind(1, "plain", (0, 0), how="broken", succeeds=False),
    "refused": Kind(1, "plain", (0, 0), how="refused", succeeds=False),
    "unfit": Kind(1, "plain", (0, 0), how="unfit", succeeds=False),
    "unknown": Kind(1, "nobody knows", (0, 0), how="unknown", succeeds=False),
}


class Send(NamedTuple):
    """One sending: one call, several, or a raw message."""

    at: float
    calls: tuple[Signature, ...] = ()
    raw: Outgoing | None = None


class Revoke(NamedTuple):
    """One revocation."""

    at: float
    ids: tuple[str, ...]
    terminate: bool


class Tasks:
    """The tasks of a simulated world, and the registries of workers before and after the deploy."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos
        self.all: dict[str, Task[..., Any]] = {
            name: Task(self._perform, name, options, _NOBODY) for name, options in _TASKS.items()
        }
        self.before, self.after = Registry(), Registry()
        for name, task in self.all.items():
            self.after.add(task)
            if name != "late":
                self.before.add(task)

    def _perform(self, seconds: float, until: int, how: str, pause_s: float) -> str:
        kernel = self._chaos.kernel
        fiber = kernel.current
        fiber.slot.work(seconds)
        if how == "dies":
            fiber.slot.die()
        if how == "kills":
            self._chaos.kill(fiber.process, "by its task")
        request = current()
        if request.attempt < until:
            raise Retry("simulated", delay=pause_s) if how == "asks" else ValueError("simulated")
        fiber.slot.complete = True
        return request.id


class Scriptwriter:
    """Draws the calls of one world and enters them into the audit's ledger."""

    def __init__(self, random: Random, tasks: Tasks, codec: Codec, audit: Audit) -> None:
        self._random = random
        self._tasks = tasks
        self._codec = codec
        self._audit = audit
        self._count = 0

    def write(self, producers: int) -> list[list[Send | Revoke]]:
        """One list of steps for each producer, in the order of their times."""
        draw = self._random
        scripts: list[list[Send | Revoke]] = []
        for _ in range(producers):
            steps: list[Send | Revoke] = []
            for _ in range(draw.randint(6, 14)):
                at = draw.uniform(0, SENDING_S)
                steps.append(self._send(at))
            sent = [(step.at, call) for step in steps if isinstance(step, Send) for call in step.calls]
            steps += [self._revoke(at, call) for at, call in sent if draw.random() < self._revoked_share(call)]
            scripts.append(sorted(steps, key=lambda step: step.at))
        return scripts

    def _send(self, at: float) -> Send:
        draw = self._random
        names = draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()], k=draw.choice((1, 1, 1, 4)))
        if KINDS[names[0]].how in ("broken", "refused", "unfit", "unknown"):
            return Send(at, raw=self._raw(names[0]))
        names = [name for name in names if KINDS[name].how not in ("broken", "refused", "unfit", "unknown")]
        return Send(at, tuple(self._call(name) for name in names))

    def _call(self, name: str) -> Signature:
        draw, kind = self._random, KINDS[name]
        entry = self._entry(name)
        entry.keeps_result = kind.task != "silent"
        options: dict[str, Any] = {"task_id": entry.id, "queue": draw.choice(QUEUES)}
        if draw.random() < 0.25:
            options["countdown"] = draw.uniform(1, 40)
        if draw.random() < 0.1:
            options["expires"] = draw.uniform(1, 30)
            entry.wants_run = False
        if draw.random() < 0.3:
            options["priority"] = draw.randint(0, 9)
        args = (draw.uniform(*kind.seconds), draw.randint(*kind.until), kind.how, draw.choice((0.0, 2.0)))
        return Signature(self._tasks.all[kind.task], args, {}, CallOptions(**options))

    def _revoked_share(self, call: Signature) -> float:
        """Long ones more often: they are still there to be revoked."""
        return 0.3 if (call.options.task_id or "").startswith("long") else 0.08

    def _revoke(self, at: float, call: Signature) -> Revoke:
        assert call.options.task_id is not None
        self._audit.entries[call.options.task_id].wants_run = False
        return Revoke(at + self._random.uniform(0.1, 20), (call.options.task_id,), self._random.random() < 0.5)

    def _raw(self, name: str) -> Outgoing:
        entry, kind = self._entry(name), KINDS[name]
        headers, body = self._codec.encode_call({"task": kind.task, "type": "json"}, "mail", entry.id, ((1,), {}))
        if name == "broken":
            body = b"\xff" + body
        if name == "refused":
            headers = {**headers, "type": "pickle"}
        return Outgoing("mail", entry.id, body, headers)

    def _entry(self, kind: str) -> Entry:
        self._count += 1
        entry = Entry(f"{kind}-{self._count}", kind, wants_run=KINDS[kind].succeeds)
        self._audit.entries[entry.id] = entry
        return entry


class _Nobody:
    """Simulated tasks are sent by simulated producers only."""

    def send(self, *_: Any) -> Any:
        raise AssertionError

    async def asend(self, *_: Any) -> Any:
        raise AssertionError


_NOBODY = _Nobody()


def unsent(step: Send, error: TransportError) -> Send:
    """What is left to send of a step that failed with ``error``; all of it when nobody knows."""
    if isinstance(error, SendError) and step.calls:
        ids = {message.id for message in error.unsent}
        return step._replace(calls=tuple(call for call in step.calls if call.options.task_id in ids))
    return step
