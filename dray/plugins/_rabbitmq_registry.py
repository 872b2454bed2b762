"""Which work queues there are: AMQP cannot list any, so whoever makes one writes its name down."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dray.core.errors import Unavailable
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_outbox import PAUSES_S
from dray.plugins._rabbitmq_publisher import Parcel, Publisher
from dray.plugins._rabbitmq_scan import scan


class Registry:
    """A queue with one message for each work queue that was ever made. Any thread."""

    def __init__(self, name: str, dialer: Dialer, publisher: Publisher) -> None:
        self._name = name
        self._dialer = dialer
        self._publisher = publisher

    def add(self, queues: Sequence[str]) -> None:
        """These are about to be made. The registry itself exists. Raises ``Unavailable``, ``Uncertain``."""
        parcels = [Parcel("", self._name, queue.encode()) for queue in queues]
        refused = self._publisher.publish(parcels)
        for pause_s in PAUSES_S:
            if not refused:
                return
            time.sleep(pause_s)
            parcels = [parcels[index] for index in refused]
            refused = self._publisher.publish(parcels)
        if refused:
            raise Unavailable(f"rabbitmq: {self._name}: {next(iter(refused.values()))}")

    def names(self) -> list[str]:
        """In the order they were made; some may have been deleted since."""
        with scan(self._dialer.link(), self._name, exclusive=True) as found:
            return [] if found is None else [str(raw.body, "utf-8", "replace") for raw in found.messages]
