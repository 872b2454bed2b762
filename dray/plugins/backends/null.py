"""The result back end that keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dray.core.contracts import NoOptions, ResultBackend, ResultFeatures
from dray.core.message import StoredResult


class NullBackend(ResultBackend):
    """Keeps nothing; ``features.keeps`` tells the core to say so to whoever asks for a result."""

    api = 1
    Options = NoOptions
    features = ResultFeatures(keeps=False, shared=False)

    def store(self, results: Sequence[StoredResult]) -> None:
        del results

    def fetch(self, ids: Sequence[str]) -> dict[str, StoredResult]:
        del ids
        return {}

    def delete(self, ids: Sequence[str]) -> None:
        del ids

    def wait(self, ids: Sequence[str], timeout_s: float) -> dict[str, StoredResult]:
        """At once: nothing will ever come."""
        del ids, timeout_s
        return {}
