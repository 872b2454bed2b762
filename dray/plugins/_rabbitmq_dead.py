"""The dead letters of a RabbitMQ transport: one queue for all, looked through from end to end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from dray.core.message import DeadLetter
from dray.plugins._rabbitmq_feed import Raw
from dray.plugins._rabbitmq_link import Dialer
from dray.plugins._rabbitmq_messages import dead_letter
from dray.plugins._rabbitmq_scan import scan


class Graveyard:
    """Lists, finds and deletes. Any thread; what another process looks through meanwhile is waited for."""

    def __init__(self, dialer: Dialer, name: str) -> None:
        self._dialer = dialer
        self._name = name

    def newest(self, queue: str | None, limit: int) -> list[DeadLetter]:
        """Of one queue, or of all."""
        letters = self._find(lambda letter: queue is None or letter.queue == queue)
        letters.reverse()
        return sorted(letters, key=lambda letter: -letter.died_at)[:limit]

    def get(self, ids: Sequence[str]) -> list[DeadLetter]:
        wanted = set(ids)
        return self._find(lambda letter: letter.id in wanted) if wanted else []

    def purge(self, ids: Sequence[str]) -> list[str]:
        """Returns the ids that were there."""
        wanted = set(ids)
        with scan(self._dialer.link(), self._name, exclusive=True) as found:
            if found is None:
                return []
            doomed = {raw.tag: letter.id for raw, letter in _letters(found.messages) if letter.id in wanted}
            found.remove(doomed)
            return list(dict.fromkeys(doomed.values()))

    def _find(self, chosen: Callable[[DeadLetter], bool]) -> list[DeadLetter]:
        with scan(self._dialer.link(), self._name, exclusive=True) as found:
            messages: Collection[Raw] = found.messages if found is not None else ()
            return [letter for _, letter in _letters(messages) if chosen(letter)]


def _letters(messages: Collection[Raw]) -> list[tuple[Raw, DeadLetter]]:
    return [(raw, dead_letter(raw.properties, raw.body)) for raw in messages]
