"""JSON through the standard library: the default."""

from __future__ import annotations

import json
import math
import re
from typing import Any, ClassVar

from dray.core.contracts import PluginContext, Serializer
from dray.core.errors import DecodeError, EncodeError
from dray.plugins._plain import TAG, check_keys, from_tagged, to_tagged

_WHITESPACE = " \t\n\r"
_TAG_IN_TEXT = f'"{TAG}":'
_converted_key = re.compile(r'"[-0-9tfn][-0-9.e+alsru]*":').search
"""How the encoder writes a key that was a number, a boolean or ``None``; a few text keys look so too."""


class JsonSerializer(Serializer):
    """Plain data as strict UTF-8 JSON without white space.

    - Dates, times, durations, decimals, UUIDs and bytes travel as ``{"__dray__": kind, "v": text}``.
    - Tuples (named ones included) arrive as lists; subclasses of plain types arrive as the plain type.
    - Refused both ways: NaN and infinities, duplicate or reserved keys, lone surrogates.
    - Keys that are not text are refused. The standard encoder would turn ``{1: 2}`` into ``{"1": 2}`` in silence, and
      asking each key costs more than the encoding. So the *output* is searched, at C speed, for keys that look like a
      converted number, boolean or ``None``; only if there is one is the value itself walked.
    """

    api: ClassVar[int] = 1
    name: ClassVar[str] = "json"
    content_type: ClassVar[str] = "application/json"

    def __init__(self, options: Any, context: PluginContext) -> None:
        super().__init__(options, context)
        encoder = json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=lambda value: to_tagged(value, "JSON")
        )
        decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
        self._encode = encoder.encode
        self._decode = decoder.raw_decode

    def dumps(self, value: object) -> bytes:
        try:
            text = self._encode(value)
            if _TAG_IN_TEXT in text or _converted_key(text):
                check_keys(value)
            return text.encode()
        except EncodeError:
            raise
        except UnicodeEncodeError:  # not chained: its repr holds the whole text
            raise EncodeError("a text holds a lone surrogate, which UTF-8 cannot carry: pass bytes instead") from None
        except RecursionError as error:
            raise EncodeError("the value is nested too deeply for JSON: pass something flatter") from error
        except Exception as error:  # the encoder's own (NaN, cycles, huge integers), or a user's class that raises
            raise EncodeError(f"the value cannot be sent as JSON: {_reason(error)}") from error

    def loads(self, data: bytes) -> object:
        try:
            text = str(data, "utf-8").strip(_WHITESPACE)
            value, end = self._decode(text)
            if "\\ud" in text or "\\uD" in text:
                self._encode(value).encode()  # an escaped lone surrogate made its way into a text
        except DecodeError:
            raise
        except RecursionError as error:
            raise DecodeError("the JSON is nested too deeply") from error
        except (ValueError, EncodeError) as error:  # bad JSON, bad UTF-8, lone surrogates, huge integers
            raise DecodeError(f"not valid JSON: {error}") from error
        if end != len(text):
            raise DecodeError(f"not valid JSON: extra data at character {end}")
        return value


def _object(pairs: list[tuple[str, Any]]) -> object:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DecodeError("not valid JSON: an object has the same key twice")
    return from_tagged(made) if TAG in made else made


def _constant(text: str) -> object:
    raise DecodeError(f"not valid JSON: {text}")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise DecodeError(f"not valid JSON: {text[:50]} is beyond the range of a float")
    return value


def _reason(error: Exception) -> str:
    text = str(error)
    if "Circular reference" in text:
        return "it contains itself; pass a copy without the cycle"
    if "JSON compliant" in text:
        return "it holds NaN or an infinity; pass None or a text"
    if "integer string conversion" in text:
        return "it holds an integer with too many digits; pass it as hexadecimal text"
    if "keys must be" in text:
        return f"{text}; use text keys, or pass a list of [key, value] pairs"
    return f"{type(error).__name__}: {text}"
