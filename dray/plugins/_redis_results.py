"""Results in Redis: how one is laid out, and the commands that store it and let callers wait for it.

A result is one string. Whoever waits for a result that is not there leaves the name of its channel in the string's
place; whoever stores the result finds it there and publishes. So a result that nobody waits for costs one command, and
no wake-up can be lost between looking and waiting. The layout is told in ``_redis_lua/result_store.lua``.
"""

from __future__ import annotations

import math
import struct
from importlib import resources

from dray.core.message import State, StoredResult
from dray.plugins._redis import Script

_HEAD = struct.Struct(">cdH")
_PACK = _HEAD.pack
_LETTERS = {
    State.SUCCESS: b"S",
    State.FAILURE: b"F",
    State.REVOKED: b"R",
    State.PENDING: b"p",
    State.STARTED: b"s",
    State.RETRY: b"r",
}
"""Capitals are terminal. ``w``: nothing is known, somebody waits."""
_SUCCESS = State.SUCCESS
_STATES = {letter: state for state, letter in _LETTERS.items()}


def _script(name: str) -> Script:
    return Script((resources.files("dray.plugins") / "_redis_lua" / f"{name}.lua").read_text("utf-8"))


STORE, WAIT, ARRIVE = _script("result_store"), _script("result_wait"), _script("group_arrive")


def encode(result: StoredResult) -> bytes:
    """The string of a result."""
    _, state, body, expires_at = result
    letter = b"S" if state is _SUCCESS else _LETTERS[state]  # an enumeration's members are slow to look up
    return _PACK(letter, math.inf if expires_at is None else expires_at, 0) + body


def time_to_live_ms(expires_at: float | None, now: float) -> int | bytes:
    """How long Redis is to keep it, by its own clock: ours may be another."""
    return b"" if expires_at is None else max(1, math.ceil((expires_at - now) * 1000))


def decode(id_: str, text: bytes | None) -> StoredResult | None:
    """The result in a string; None if there is none."""
    if text is None or len(text) < _HEAD.size:
        return None
    letter, expires_at, waiting = _HEAD.unpack_from(text)
    state = _STATES.get(letter)
    if state is None:
        return None
    return StoredResult(id_, state, text[_HEAD.size + waiting :], None if expires_at == math.inf else expires_at)


def news_of(payload: bytes) -> tuple[bytes, bytes]:
    """The key of what was published, and its string, if it was small enough."""
    (length,) = struct.unpack_from(">H", payload)
    return payload[2 : 2 + length], payload[2 + length :]
