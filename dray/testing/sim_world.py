"""One simulated world: its workers, its producers, what happens to them, and in which order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from dray.core import intake
from dray.core.client import Client
from dray.core.clock import TimeOrderedIds
from dray.core.codec import Codec
from dray.core.contracts import NoOptions, PluginContext, Serializer, Signer
from dray.core.demand import Demand
from dray.core.errors import PluginNotFound, TransportError
from dray.core.executor import Settings, TaskExecutor
from dray.core.failure import SafeErrors
from dray.core.fallback import DEAD_SUFFIX, Fallback
from dray.core.hooks import NO_HOOKS
from dray.core.parts import WorkerParts
from dray.core.result import Results
from dray.core.settler import Settler
from dray.core.worker import EXIT_COLD, EXIT_WARM, Worker
from dray.plugins._memory import MemoryStore
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.serializers.json import JsonSerializer
from dray.plugins.serializers.signed import SignedSerializer
from dray.testing.sim_audit import MAX_DELIVERIES, Audit
from dray.testing.sim_broker import SimBackend, SimTransport
from dray.testing.sim_faults import QUIET, Chaos, Odds
from dray.testing.sim_kernel import Kernel, Process, VirtualClock
from dray.testing.sim_monkey import Monkey, Seat
from dray.testing.sim_pool import SimPool
from dray.testing.sim_script import QUEUES, Revoke, Scriptwriter, Send, Tasks, unsent
from dray.testing.sim_threading import virtual_threads
from dray.testing.sim_verdict import judge

CHAOS_S = 60.0
DEPLOY_S = 25.0
REST_S = 400.0
"""After the last fault everything has come to rest within this, in virtual seconds."""
RESULT_S = 86400.0
MAX_AGE_S = 3600.0
STORE_TIMEOUT_S = 12.0
NOT_CONNECTED = -1
"""Exit code of a worker that could not connect."""


class Report(NamedTuple):
    """What came of one seed."""

    seed: int
    digest: str
    """The same for the same seed, bit for bit: stands for the whole trace."""
    violations: list[str]
    faults: Counter[str]
    tasks: int
    runs: int
    virtual_s: float
    steps: int
    trace: list[str] | None


class World:
    """One simulated world, made from one seed."""

    def __init__(self, seed: int, keep_trace: bool = False) -> None:
        self.seed = seed
        self.kernel = Kernel(seed, keep_trace)
        draw = self.kernel.random
        self.clock = VirtualClock(self.kernel)
        self.chaos = Chaos(self.kernel)
        self.signed = draw.random() < 0.35
        self.audit = Audit(self.kernel, self.signed)
        self.poor = draw.random() < 0.3
        self.window_s = draw.choice((0.05, 3.0, 10.0))
        self.wildness = draw.choice((0.0, 0.3, 1.0, 1.0, 2.0))
        self.store = MemoryStore()
        self.results = MemoryBackend(NoOptions(), self.context("memory", self.kernel.world))
        self.codec = self._codec()
        self.tasks = Tasks(self.chaos)
        self.seats = [Seat(f"worker{number}") for number in range(draw.randint(2, 3))]
        self.scripts = Scriptwriter(draw, self.tasks, self.codec, self.audit).write(draw.randint(1, 2))
        self.producers: dict[int, tuple[Process, SimTransport]] = {}
        self.deployed = False
        self.closing = False

    def context(self, name: str, process: Process) -> PluginContext:
        return PluginContext(name, logging.getLogger("dray.simulation"), self.clock, process.random, Path())

    def _codec(self) -> Codec:
        serializer: Serializer = JsonSerializer(NoOptions(), self.context("json", self.kernel.world))
        options = SignedSerializer.Options("hmac", max_age=MAX_AGE_S, keys={"a": "simulated" * 4})
        signer: Signer = SignedSerializer(options, self.context("signed", self.kernel.world))

        def refuse(name: str) -> Serializer:
            raise PluginNotFound(name)

        return Codec(
            serializer=serializer,
            signer=signer if self.signed else None,
            accept={"json": serializer},
            compressor=None,
            compress_over=1 << 30,
            load_serializer=refuse,
            load_compressor=refuse,  # type: ignore[arg-type]
            encodings=(),
            max_bytes=1 << 20,
            clock=self.clock,
        )

    def _demand(self, capacity: int) -> Demand:
        """With a longer look-ahead in some worlds: pools hold what they have not begun, and may have too much of it."""
        return Demand(capacity, self.window_s)

    # --- its history ---------------------------------------------------------------------------------------

    def run(self) -> Report:
        """The whole history, from the first message to the last check."""
        kernel, audit = self.kernel, self.audit
        try:
            with virtual_threads(kernel, self._exit_now), patch.object(intake, "Demand", self._demand):
                self._chaotic()
                self._come_to_rest()
                self._stop_workers()
                kernel.close()
        finally:
            kernel.close()
        audit.violations += kernel.failures
        if not audit.violations:
            judge(audit, self.store, poor=self.poor)
        runs = sum(entry.runs.total() for entry in audit.entries.values())
        return Report(
            self.seed, kernel.digest, audit.violations, self.chaos.counts, len(audit.entries), runs,
            kernel.now, kernel.steps, kernel.trace,
        )  # fmt: skip

    def _chaotic(self) -> None:
        wild = self.wildness
        self.chaos.odds = Odds(0.02 * wild, 0.02 * wild, 0.003 * wild, 0.002 * wild, 0.002 * wild)
        for seat in self.seats:
            self._start(seat)
        for number in range(len(self.scripts)):
            self._start_producer(number)
        if wild:
            monkey = Monkey(self.chaos, self.seats, self.producers)
            self.kernel.spawn(self.kernel.world, "monkey", lambda: monkey.run(6.0 / wild, CHAOS_S))
        self._pass(DEPLOY_S)
        self.deployed = True
        for seat in self.seats:
            seat.stop()
        self._pass(CHAOS_S)

    def _come_to_rest(self) -> None:
        kernel = self.kernel
        self.chaos.odds = QUIET
        self.chaos.outages.clear()
        kernel.note("quiet")
        deadline = kernel.now + REST_S
        while kernel.now < deadline and not self.audit.violations and not self._at_rest():
            kernel.sleep(2.0)

    def _pass(self, until: float) -> None:
        while self.kernel.now < until and not self.audit.violations:
            self.kernel.sleep(1.0)

    def _at_rest(self) -> bool:
        queues = (queue for name, queue in self.store.queues.items() if not name.endswith(DEAD_SUFFIX))
        return not any(self.scripts) and not self.store.leases and not any(any(queue.waiting()) for queue in queues)

    def _stop_workers(self) -> None:
        self.closing = True
        for seat in self.seats:
            seat.stop()
        deadline = self.kernel.now + 60
        while self.kernel.now < deadline and any(seat.process is not None for seat in self.seats):
            self.kernel.sleep(1.0)
        for seat in self.seats:
            self.audit.expect(seat.process is None, "stop", f"{seat.name} did not stop")

    # --- workers -------------------------------------------------------------------------------------------

    def _start(self, seat: Seat) -> None:
        process = self.kernel.process(seat.name)
        parts = self._parts(process)
        assert isinstance(parts.transport, SimTransport)
        assert isinstance(parts.pool, SimPool)
        seat.process, seat.worker, seat.transport, seat.pool = process, Worker(parts), parts.transport, parts.pool
        seat.told_cold = False
        process.on_death = lambda: self._died(seat, process)
        worker = seat.worker
        self.kernel.spawn(process, "main", lambda: self._live(process, worker))

    def _restart(self, seat: Seat) -> None:
        if not self.closing:
            self._start(seat)

    def _parts(self, process: Process) -> WorkerParts:
        transport = SimTransport(process, self.chaos, self.audit, self.store, self.context("sim", process), self.poor)
        backend = SimBackend(process, self.chaos, self.audit, self.results)
        pool = SimPool(self.kernel, process, self.audit, self.kernel.random.randint(1, 3), self.context("sim", process))
        faults, fallback = self.chaos.failpoints(process), Fallback(transport.features, self.clock, "sim")
        settings = Settings(True, backend.features.max_body_bytes, RESULT_S, 60.0, can_kill=True)
        registry = self.tasks.after if self.deployed else self.tasks.before
        executor = TaskExecutor(registry, self.codec, settings, NO_HOOKS, self.clock, process.random, faults)
        settler = Settler(
            transport,
            backend,
            fallback,
            self.clock,
            process.random,
            faults,
            undeliverable=executor.undeliverable,
            store_timeout_s=STORE_TIMEOUT_S,
            remember_ended_s=MAX_AGE_S if self.signed else None,
            verify=self.codec.check,
        )
        return WorkerParts(
            name=process.name,
            queues=QUEUES,
            transport=transport,
            backend=backend,
            pool=pool,
            executor=executor,
            settler=settler,
            fallback=fallback,
            hooks=NO_HOOKS,
            clock=self.clock,
            random=process.random,
            faults=faults,
            shutdown_timeout_s=8.0,
            max_deliveries_default=MAX_DELIVERIES,
        )

    def _live(self, process: Process, worker: Worker) -> None:
        try:
            code = worker.run()
        except TransportError:
            code = NOT_CONNECTED
        self._exit(process, code)

    def _exit_now(self, code: int) -> None:
        self._exit(self.kernel.current.process, code)

    def _exit(self, process: Process, code: int) -> None:
        self.kernel.note(f"exit {code}")
        (seat,) = (seat for seat in self.seats if seat.process is process)
        if self.closing:
            # A request to connect that was made before the quiet period may still be refused in it.
            as_told = code in (EXIT_WARM, NOT_CONNECTED) or (code == EXIT_COLD and seat.told_cold)
            self.audit.expect(as_told, "stop", f"{process.name} ended with {code} in the quiet period")
            held = [h.entry.id for h in self.audit.holdings.values() if h.process is process and not h.charged]
            self.audit.expect(not held, "G4", f"{process.name} stopped in order and left {held}")
        process.on_death()
        self.kernel.kill(process)

    def _died(self, seat: Seat, process: Process) -> None:
        self.audit.died(process)
        seat.process = seat.worker = seat.pool = None
        if not self.closing:
            self._later(self.kernel.random.uniform(0.2, 6.0), lambda: self._restart(seat))

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        def wait() -> None:
            self.kernel.sleep(seconds)
            act()

        self.kernel.spawn(self.kernel.world, "supervisor", wait)

    # --- producers -----------------------------------------------------------------------------------------

    def _start_producer(self, number: int) -> None:
        process = self.kernel.process(f"producer{number}")
        process.on_death = lambda: self._later(1.0, lambda: self._start_producer(number))
        transport = SimTransport(process, self.chaos, self.audit, self.store, self.context("sim", process), self.poor)
        backend = SimBackend(process, self.chaos, self.audit, self.results)
        self.producers[number] = process, transport
        client = Client(
            transport=transport,
            backend=backend,
            codec=self.codec,
            results=Results(backend, self.codec, SafeErrors(), self.clock),
            fallback=Fallback(transport.features, self.clock, "sim"),
            route=lambda _: QUEUES[0],
            hooks=NO_HOOKS,
            clock=self.clock,
            ids=TimeOrderedIds(),
            faults=self.chaos.failpoints(process),
            result_expires_s=RESULT_S,
        )
        self.kernel.spawn(process, "main", lambda: self._produce(client, transport, self.scripts[number]))

    def _produce(self, client: Client, transport: SimTransport, script: list[Send | Revoke]) -> None:
        while script:
            self.kernel.pause(max(self.kernel.now, script[0].at))
            try:
                self._do(client, transport, script[0])
            except TransportError as error:
                step = script[0]
                if isinstance(step, Send):
                    script[0] = unsent(step, error)
                self.kernel.sleep(self.kernel.random.uniform(0.1, 2.0))
            else:
                del script[0]

    def _do(self, client: Client, transport: SimTransport, step: Send | Revoke) -> None:
        if isinstance(step, Revoke):
            client.revoke(step.ids, terminate=step.terminate)
            self.audit.revoked(step.ids)
        elif step.raw is not None:
            transport.send((step.raw,))
            self.audit.confirmed((step.raw.id,))
        else:
            if len(step.calls) == 1:
                client.send(*step.calls[0])
            else:
                client.send_many(step.calls)
            self.audit.confirmed([call.options.task_id or "" for call in step.calls])
