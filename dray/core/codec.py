"""A call or a result to bytes and back: serializer, compressor, signature, accept list, size limits.

Outwards: serialize, compress above a size, sign. Inwards the reverse, verification first: nothing unverified is
decompressed or decoded. The signature covers the bytes, the message's id and queue, and every header.

Header keys (values are text): ``task`` name; ``type`` serializer; ``enc`` compressor; ``v`` envelope version (absent:
1); ``attempt`` retries so far; ``crashes`` processes it killed; ``eta``, ``expires`` (epoch seconds); ``issued`` and
``sig`` when signed; ``prio``; ``soft``, ``hard`` time limits in seconds; ``retry`` policy; ``ignore``, ``track`` ("1");
``rexp`` seconds that the result is kept; ``since`` when a worker first did not know the task; ``x-NAME`` the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dray.core import wire
from dray.core.clock import Clock
from dray.core.contracts import Compressor, Serializer, Signer
from dray.core.errors import ContentRefused, DecodeError, EncodeError, SignatureError
from dray.core.message import Delivery, Outgoing, State, StoredResult

VERSION = "1"
_LISTS = (list, tuple)
_HISTORY = frozenset({"attempt", "crashes", "since", "eta", "expires", "issued", "sig"})
"""Headers that say what has happened to a call so far, or when it was meant to be."""
_LEVELS = frozenset("0123456789")
FUTURE_S = 300.0
"""A signed message may come from a clock that is this much ahead of ours."""


class Codec:
    """Encodes and decodes calls and results. Stateless after construction; any thread."""

    def __init__(
        self,
        *,
        serializer: Serializer,
        signer: Signer | None,
        accept: Mapping[str, Serializer],
        compressor: Compressor | None,
        compress_over: int,
        load_serializer: Callable[[str], Serializer],
        load_compressor: Callable[[str], Compressor],
        encodings: Collection[str],
        max_bytes: int,
        clock: Clock,
    ) -> None:
        self.serializer = serializer
        self.signer = signer
        self.type = serializer.name
        self._accept = dict(accept)
        self._compressor = compressor
        self._over = compress_over if compressor is not None else 1 << 62
        self._load_serializer = load_serializer
        self._load_compressor = load_compressor
        self._encodings = frozenset(encodings)
        self._compressors: dict[str, Compressor] = {} if compressor is None else {compressor.name: compressor}
        self._serializers: dict[str, Serializer] = {serializer.name: serializer, **self._accept}
        self._max = max_bytes
        self._clock = clock
        self._dumps = serializer.dumps

    # --- calls ---------------------------------------------------------------------------------------------

    def encode_call(
        self,
        headers: Mapping[str, str],
        queue: str,
        task_id: str,
        arguments: tuple[tuple[object, ...], Mapping[str, object]],
        compression: str | None = None,
    ) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of a call; ``headers["type"]`` names the serializer. Raises ``EncodeError``."""
        kind = headers["type"]
        body = (self._dumps if kind == self.type else self._serializer(kind).dumps)(arguments)
        if compression is not None or len(body) > self._over:
            headers, body = self._compress(headers, body, compression)
        if self.signer is not None:
            headers = self.seal(headers, queue, task_id, body)
        return headers, body

    def decode_call(self, delivery: Delivery) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of a call. Raises ``DecodeError`` or a subclass for anything that is not a sound, trusted call."""
        headers = delivery.headers
        if "v" in headers and headers["v"] != VERSION:
            raise DecodeError(
                f"envelope version {headers['v'][:20]!r}; this worker understands {VERSION}: upgrade dray"
            )
        if not delivery.id.isprintable():
            raise DecodeError(f"task id {delivery.id[:80]!r}: control characters")
        if self.signer is not None:
            self._verify(headers, delivery.queue, delivery.id, delivery.body)
        value: Any = self._decode(headers, delivery.body)
        if type(value) in _LISTS and len(value) == 2:
            args, kwargs = value
            if type(args) in _LISTS and type(kwargs) is dict and (not kwargs or all(type(k) is str for k in kwargs)):
                return args, kwargs
        raise DecodeError("the body is not [list of arguments, mapping of keyword arguments]")

    def seal(self, headers: Mapping[str, str], queue: str, task_id: str, body: bytes) -> Mapping[str, str]:
        """``headers`` with issue time and signature when signing is on; whatever changes a header calls it again."""
        if self.signer is None:
            return headers
        fresh = {**headers, "issued": repr(self._clock.time())}
        fresh.pop("sig", None)
        fresh["sig"] = self.signer.sign(_signed_bytes(b"call", fresh, queue, task_id, body))
        return fresh

    def resend(self, delivery: Delivery, changes: Mapping[str, str], not_before: float | None = None) -> Outgoing:
        """The same call once more, with some headers changed: a retry, a re-armed delay."""
        headers = {**delivery.headers, **changes}
        headers.pop("eta", None)
        if not_before is not None:
            headers["eta"] = repr(not_before)
        sealed = self.seal(headers, delivery.queue, delivery.id, delivery.body)
        priority, expires_at = min(int_header(headers, "prio", 0), 9), float_header(headers, "expires")
        return Outgoing(delivery.queue, delivery.id, delivery.body, sealed, priority, not_before, expires_at)

    def check(self, delivery: Delivery) -> None:
        """Raises ``SignatureError`` for a message that this app would not run; any is fine when signing is off.

        To be asked before a message is signed again that was not decoded here: nobody else's words get our signature.
        """
        if self.signer is not None:
            self._verify(delivery.headers, delivery.queue, delivery.id, delivery.body)

    def renew(self, delivery: Delivery) -> Outgoing:
        """The same call as if it were made now: for a dead letter. Raises ``CodecError`` when it is not genuine."""
        if self.signer is not None:
            unsigned = {key: value for key, value in delivery.headers.items() if key != "sig"}
            self._check_signature(
                delivery.headers, _signed_bytes(b"call", unsigned, delivery.queue, delivery.id, delivery.body)
            )
        headers = {key: value for key, value in delivery.headers.items() if key not in _HISTORY}
        sealed = self.seal(headers, delivery.queue, delivery.id, delivery.body)
        priority = headers.get("prio", "0")
        return Outgoing(delivery.queue, delivery.id, delivery.body, sealed, int(priority) if priority in _LEVELS else 0)

    # --- results -------------------------------------------------------------------------------------------

    def encode_result(self, task_id: str, value: object, state: State = State.SUCCESS) -> bytes:
        """The body of a ``StoredResult``. Raises ``EncodeError``."""
        headers: Mapping[str, str] = {"type": self.type}
        body = self._dumps(value)
        if len(body) > self._over:
            headers, body = self._compress(headers, body, None)
        if self.signer is not None:
            headers = dict(headers)
            headers["sig"] = self.signer.sign(_signed_bytes(b"result", headers, state, task_id, body))
        return wire.pack(headers, body)

    def decode_result(self, stored: StoredResult) -> Any:
        """The value in a ``StoredResult``. Raises ``DecodeError``."""
        headers, body = wire.unpack(stored.body)
        if self.signer is not None:
            unsigned = {key: value for key, value in headers.items() if key != "sig"}
            self._check_signature(headers, _signed_bytes(b"result", unsigned, stored.state, stored.id, body))
        return self._decode(headers, body)

    # --- the layers ----------------------------------------------------------------------------------------

    def _compress(self, headers: Mapping[str, str], body: bytes, name: str | None) -> tuple[Mapping[str, str], bytes]:
        if name == "none":
            return headers, body
        compressor = self._find_compressor(name) if name is not None else self._compressor
        assert compressor is not None, "only called with a name or a default"  # noqa: S101
        smaller = compressor.compress(body)
        if len(smaller) >= len(body):
            return headers, body
        return {**headers, "enc": compressor.name}, smaller

    def _decode(self, headers: Mapping[str, str], body: bytes) -> object:
        kind = headers.get("type", "")
        serializer = self._accept.get(kind)
        if serializer is None:
            accepted = ", ".join(self._accept)
            raise ContentRefused(
                f"content type {kind[:40]!r} is not accepted; accept: [{accepted}] in the configuration"
            )
        encoding = headers.get("enc")
        if encoding is not None:
            if encoding not in self._encodings:
                accepted = ", ".join(sorted(self._encodings))
                raise ContentRefused(f"encoding {encoding[:40]!r} is not accepted; compression.accept is [{accepted}]")
            body = self._find_compressor(encoding).decompress(body, self._max)
        elif len(body) > self._max:
            raise DecodeError(f"a body of {len(body)} bytes is over message_max ({self._max})")
        return serializer.loads(body)

    def _serializer(self, name: str) -> Serializer:
        found = self._serializers.get(name)
        if found is None:
            found = self._load_serializer(name)
            if not isinstance(found, Serializer):
                raise EncodeError(f"{name!r} is no serializer of its own: choose it as the configuration's serializer")
            self._serializers[name] = found
        return found

    def _find_compressor(self, name: str) -> Compressor:
        found = self._compressors.get(name)
        if found is None:
            found = self._compressors[name] = self._load_compressor(name)
        return found

    def _verify(self, headers: Mapping[str, str], queue: str, task_id: str, body: bytes) -> None:
        unsigned = {key: value for key, value in headers.items() if key != "sig"}
        self._check_signature(headers, _signed_bytes(b"call", unsigned, queue, task_id, body))
        assert self.signer is not None  # noqa: S101
        issued, now = float_header(headers, "issued"), self._clock.time()
        due = float_header(headers, "eta") or 0.0  # a message that was meant to wait is not old before its time
        if issued is None or issued > now + FUTURE_S or max(issued, due) < now - self.signer.max_age_s:
            raise SignatureError(f"signed at {headers.get('issued')!r}, not within max_age: sign and send it again")

    def _check_signature(self, headers: Mapping[str, str], data: bytes) -> None:
        assert self.signer is not None  # noqa: S101
        signature = headers.get("sig")
        if signature is None:
            raise SignatureError("not signed; this app accepts signed messages only")
        self.signer.verify(data, signature)


def _signed_bytes(kind: bytes, headers: Mapping[str, str], queue: str, task_id: str, body: bytes) -> bytes:
    """What is signed: each part with its length in front, so that no two messages give the same bytes."""
    parts = [b"dray1", kind, queue.encode("utf-8", "surrogatepass"), task_id.encode("utf-8", "surrogatepass")]
    for key in sorted(headers):
        parts += (key.encode("utf-8", "surrogatepass"), headers[key].encode("utf-8", "surrogatepass"))
    parts.append(body)
    return b"".join(b"%d:%b" % (len(part), part) for part in parts)


def float_header(headers: Mapping[str, str], name: str) -> float | None:
    """A finite number in a header; None when absent. Raises ``DecodeError``."""
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DecodeError(f"the header {name!r} is not a number: {text[:40]!r}")
    return value


def int_header(headers: Mapping[str, str], name: str, default: int) -> int:
    """A whole number of 0 or more in a header. Raises ``DecodeError``."""
    text = headers.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise DecodeError(f"the header {name!r} is not a whole number of 0 or more: {text[:40]!r}")
    return int(text)
