"""Receives as the core does, while a network makes trouble; see :mod:`dray.testing.transport_network`."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from dray.core.contracts import Consumer
from dray.core.errors import TransportError
from dray.core.message import Delivery
from dray.testing import network

if TYPE_CHECKING:
    from dray.core.contracts import Transport
    from dray.testing.transports import TransportHarness


class Reader:
    """Receives as the core does: a consumer whose link is lost is closed, and another opened in its place."""

    def __init__(self, kit: TransportHarness, transport: Transport, *queues: str) -> None:
        self._kit = kit
        self._transport = transport
        self._queues = queues or ("q",)
        self._consumer: Consumer | None = None
        self.seen: Counter[str] = Counter()
        """How often each id was handed out."""

    def receive(self, limit: int, timeout_s: float) -> list[Delivery]:
        """In bounded time. Raises ``TransportError`` when the link is lost; the next call opens another consumer."""
        try:
            found = self._kit.within(lambda: self._opened().receive(limit, timeout_s))
        except TransportError:
            self.close()
            raise
        self.seen.update(delivery.id for delivery in found)
        return found

    def one(self) -> Delivery:
        """One delivery, however often the link has to be opened again."""
        deadline = time.monotonic() + network.RECOVERY_S
        while time.monotonic() < deadline:
            found = self._kit.until_it_works(lambda: self.receive(1, 1.0), "receiving")
            if found:
                return found[0]
        raise AssertionError(f"no message came within {network.RECOVERY_S:g} s after the last trouble")

    def until(self, id_: str, transport: Transport) -> None:
        """Receive and settle until this id comes; where there are leases, those of the lost link run out first."""
        deadline = time.monotonic() + network.RECOVERY_S
        lease_s = transport.features.lease_s
        while not self.seen[id_]:
            assert time.monotonic() < deadline, (
                f"{id_!r} did not come within {network.RECOVERY_S:g} s after the last trouble"
            )
            found = self._kit.until_it_works(lambda: self.receive(10, 0.5), "receiving")
            self._kit.ask(lambda found=found: self._kit.settle(transport, found))  # type: ignore[misc]
            if not found and lease_s is not None:
                self._kit.advance(lease_s + 1)

    def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            try:
                self._kit.within(consumer.close)
            except TransportError:
                pass  # the core only notes it

    def _opened(self) -> Consumer:
        if self._consumer is None:
            self._consumer = self._transport.consumer(self._queues, buffer=1)
        return self._consumer
