"""Parts of the core, put together for tests: codec, executor, slot, with a clock that the test moves."""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dray.core.clock import Clock
from dray.core.codec import Codec
from dray.core.contracts import Compressor, NoOptions, Serializer, Signer, TransportFeatures
from dray.core.errors import PluginNotFound, SignatureError
from dray.core.executor import Settings, TaskExecutor
from dray.core.failure import SafeErrors
from dray.core.hooks import NO_HOOKS, Hooks
from dray.core.message import Action, Delivery, Outcome, Outgoing, StoredResult
from dray.core.registry import Registry
from dray.core.result import Results, Snapshot
from dray.core.task import AsyncTask, CallOptions, Task, TaskOptions
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.compressors.bzip2 import Bzip2Compressor
from dray.plugins.compressors.zlib import ZlibCompressor
from dray.plugins.serializers.json import JsonSerializer
from dray.plugins.serializers.pickle import PickleSerializer
from dray.plugins.transports.memory import MemoryOptions, MemoryTransport
from dray.testing.clock import FakeClock
from dray.testing.harness import plugin_context

MAX_BYTES = 100_000


class HmacSigner(Signer):
    """The least that signs; ``can_sign = False`` is a worker that only has the public half."""

    api = 1
    inner = "json"
    max_age_s = 600.0
    can_sign = True

    def sign(self, data: bytes) -> str:
        if not self.can_sign:
            from dray.core.errors import EncodeError

            raise EncodeError("no key to sign with")
        return hmac.new(b"key", data, hashlib.sha256).hexdigest()

    def verify(self, data: bytes, signature: str) -> None:
        expected = hmac.new(b"key", data, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise SignatureError("wrong signature")


def signer() -> HmacSigner:
    return HmacSigner(NoOptions(), plugin_context("signed"))


def serializer(name: str) -> Serializer:
    kinds: dict[str, type[Serializer]] = {"json": JsonSerializer, "pickle": PickleSerializer}
    if name not in kinds:
        raise PluginNotFound(name)
    return kinds[name](NoOptions(), plugin_context(name))


def compressor(name: str) -> Compressor:
    kinds: dict[str, type[Compressor]] = {"zlib": ZlibCompressor, "bzip2": Bzip2Compressor}
    if name not in kinds:
        raise PluginNotFound(name)
    return kinds[name](kinds[name].Options(), plugin_context(name))


def make_codec(clock: Clock | None = None, **changes: Any) -> Codec:
    parts: dict[str, Any] = {
        "serializer": serializer("json"),
        "signer": None,
        "accept": {"json": serializer("json")},
        "compressor": None,
        "compress_over": 1000,
        "load_serializer": serializer,
        "load_compressor": compressor,
        "encodings": ("zlib",),
        "max_bytes": MAX_BYTES,
        "clock": clock or FakeClock(),
    }
    return Codec(**{**parts, **changes})


class Sent:
    """Stands for the app: keeps what tasks ask to be sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], CallOptions]] = []

    def send(self, *call: Any) -> Any:
        self.calls.append(call)
        return len(self.calls)

    async def asend(self, *call: Any) -> Any:
        return self.send(*call)


def make_task(fn: Callable[..., Any], name: str | None = None, **options: Any) -> Task[..., Any]:
    import inspect

    kind = AsyncTask if inspect.iscoroutinefunction(fn) else Task
    return kind(fn, name or fn.__name__, TaskOptions(**options), Sent())


class Slot:
    """Notes what the executor tells it."""

    def __init__(self) -> None:
        self.began: list[tuple[str, float | None, float | None]] = []
        self.ended = 0
        self.reports: list[StoredResult] = []

    def begin(self, task: str, soft_s: float | None, hard_s: float | None) -> None:
        self.began.append((task, soft_s, hard_s))

    def end(self) -> None:
        self.ended += 1

    def report(self, result: StoredResult) -> None:
        self.reports.append(result)


class Bench:
    """An executor with everything around it in reach."""

    def __init__(
        self, *fns: Callable[..., Any], signed: bool = False, hooks: Hooks = NO_HOOKS, **settings: Any
    ) -> None:
        self.clock = FakeClock()
        self.signer = signer() if signed else None
        self.codec = make_codec(self.clock, signer=self.signer)
        self.registry = Registry()
        self.tasks = [self.add(fn) for fn in fns]
        given: dict[str, Any] = {
            "keeps_results": True,
            "result_max_bytes": 100_000,
            "result_expires_s": 3600.0,
            "unknown_task_wait_s": 60.0,
            "can_kill": True,
        }
        self.settings = Settings(**{**given, **settings})
        self.slot = Slot()
        self.hooks = hooks
        self.executor = self.make(self.settings)
        self.results = Results(memory_backend(self.clock), self.codec, SafeErrors(), self.clock)

    def make(self, settings: Settings) -> TaskExecutor:
        return TaskExecutor(self.registry, self.codec, settings, self.hooks, self.clock, random.Random(1), None)

    def add(self, fn: Callable[..., Any], **options: Any) -> Task[..., Any]:
        task = fn if isinstance(fn, Task) else make_task(fn, **options)
        self.registry.add(task)
        return task

    def delivery(self, name: str, *args: Any, headers: Mapping[str, str] | None = None, **kwargs: Any) -> Delivery:
        given = {"task": name, "type": "json", **(headers or {})}
        sealed, body = self.codec.encode_call(given, "q", "id1", (args, kwargs))
        return Delivery("q", "id1", body, sealed, receipt=1)

    def run(self, name: str, *args: Any, headers: Mapping[str, str] | None = None, **kwargs: Any) -> Outcome:
        return self.executor.run(self.delivery(name, *args, headers=headers, **kwargs), self.slot)

    def decoded(self, outcome: Outcome) -> Snapshot:
        assert outcome.result is not None
        return self.results.decode(outcome.result)

    def again(self, outcome: Outcome) -> Delivery:
        """The retry that an outcome asks for, as the next delivery."""
        (message,) = outcome.settlement.then
        assert outcome.settlement.action is Action.ACK
        return redelivered(message)


def redelivered(message: Outgoing, count: int = 1) -> Delivery:
    return Delivery(message.queue, message.id, message.body, message.headers, receipt=2, delivery_count=count)


def memory_transport(clock: Clock, **features: Any) -> MemoryTransport:
    transport = MemoryTransport(MemoryOptions(), plugin_context("memory", clock))
    transport.features = replace(transport.features, **features)
    return transport


def memory_backend(clock: Clock) -> MemoryBackend:
    return MemoryBackend(NoOptions(), plugin_context("memory", clock))


NATIVE = TransportFeatures(lease_s=60, max_delay_s=float("inf"), priorities=10, dead_letter=True, release=True)
