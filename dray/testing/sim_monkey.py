"""What befalls a simulated world at random times, whatever its processes are doing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dray.core.worker import Worker
from dray.testing.sim_broker import SimTransport
from dray.testing.sim_faults import Chaos
from dray.testing.sim_kernel import Process
from dray.testing.sim_pool import SimPool


class Seat:
    """A name under which worker processes follow each other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.worker: Worker | None = None
        self.transport: SimTransport | None = None
        self.pool: SimPool | None = None
        self.told_cold = False

    def stop(self, *, cold: bool = False) -> None:
        """What the first (or the second) SIGTERM does."""
        if self.worker is not None and self.transport is not None:
            self.transport.stopping, self.told_cold = True, self.told_cold or cold
            (self.worker.stop_cold if cold else self.worker.stop)()


class Monkey:
    """Kills, pauses, stops and cuts off; ends slots under their tasks; sends again what it overheard."""

    def __init__(
        self, chaos: Chaos, seats: Sequence[Seat], producers: Mapping[int, tuple[Process, SimTransport]]
    ) -> None:
        self._chaos = chaos
        self._kernel = chaos.kernel
        self._draw = chaos.kernel.random
        self._seats = seats
        self._producers = producers

    def run(self, mean_s: float, until: float) -> None:
        """Do something every ``mean_s`` seconds or so."""
        kernel = self._kernel
        weighted = {
            self._kill: 3,
            self._pause: 3,
            self._stop: 1,
            self._stop_cold: 1,
            self._crash: 3,
            self._transport_outage: 1,
            self._backend_outage: 1,
            self._kill_producer: 1,
            self._replay: 1,
        }
        acts, weights = list(weighted), list(weighted.values())
        while kernel.now < until:
            kernel.sleep(self._draw.expovariate(1 / mean_s))
            if kernel.now < until:
                self._draw.choices(acts, weights)[0]()

    def _living(self) -> list[tuple[Seat, Process]]:
        """One of the workers that run now, or none."""
        living = [(seat, seat.process) for seat in self._seats if seat.process is not None]
        return [self._draw.choice(living)] if living else []

    def _kill(self) -> None:
        for _, process in self._living():
            self._chaos.kill(process, "by the monkey")

    def _pause(self) -> None:
        for seat, process in self._living():
            seconds = self._draw.uniform(2.0, 25.0)
            self._chaos.fault(f"pause {seat.name} {seconds:.1f}")
            process.paused_until = process.troubled_at = self._kernel.now + seconds

    def _stop(self) -> None:
        for seat, _ in self._living():
            self._chaos.fault(f"stop {seat.name}")
            seat.stop()

    def _stop_cold(self) -> None:
        for seat, _ in self._living():
            self._chaos.fault(f"stop-cold {seat.name}")
            seat.stop(cold=True)

    def _crash(self) -> None:
        for seat, _ in self._living():
            assert seat.pool is not None
            busy = [(slot, slot.delivery.id) for slot in seat.pool.slots if slot.delivery is not None]
            if busy:
                slot, task_id = self._draw.choice(busy)
                self._chaos.fault(f"crash {seat.name} under {task_id}")
                slot.crash()

    def _transport_outage(self) -> None:
        self._outage("transport", 6.0)

    def _backend_outage(self) -> None:
        self._outage("backend", 25.0)

    def _outage(self, service: str, longest_s: float) -> None:
        seconds = self._draw.uniform(0.5, longest_s)
        self._chaos.fault(f"outage {service} {seconds:.1f}")
        self._chaos.outages[service] = self._kernel.now + seconds

    def _kill_producer(self) -> None:
        process, _ = self._producers[self._draw.randrange(len(self._producers))]
        if process.fibers:
            self._chaos.kill(process, "by the monkey")

    def _replay(self) -> None:
        _, transport = self._producers[self._draw.randrange(len(self._producers))]
        if transport.sent:
            message = self._draw.choice(transport.sent)
            self._chaos.fault(f"replay {message.id}")
            transport.inner.send((message,))
            transport.audit.published((message,))
