"""What must not be seen: passwords in URLs, and values under keys that are named like a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "********"


class Hidden(str):
    """A secret: the text itself to whoever uses it, a mask in every ``repr``, that of what holds it included."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(MASK)


_KEY = r"(?i:passw|secret|token|credential|private_?key|api_?key|access_?key)"
_IN_AUTHORITY = r"(?<![^/])([^\s@:/]*):(?!//)\S*@"  # also where a slash or the colon before it was forgotten
_IN_QUERY = r"(?i:([?&][^=&\s]*(?:passw|secret|token|key)[^=&\s]*=)[^&\s#]*)"


def is_secret(key: str) -> bool:
    """Whether a key is named like a secret."""
    return re.search(_KEY, key) is not None


def masked(value: object, key: str = "") -> object:
    """The value without passwords in URLs, and without what stands under a key that is named like a secret."""
    if isinstance(value, Mapping):
        return {name: masked(item, str(name) if not is_secret(key) else key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret(key):
        return MASK
    if isinstance(value, str):
        return re.sub(_IN_QUERY, rf"\1{MASK}", re.sub(_IN_AUTHORITY, rf"\1:{MASK}@", value))
    return value


def shown(value: object, key: str = "") -> str:
    """A short text for errors, without secrets."""
    text = repr(masked(value, key))
    return text if len(text) <= 80 else f"{text[:77]}..."
