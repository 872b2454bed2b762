"""What all signing keys share, and the shared-secret ones. Needs only the standard library."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Protocol

from dray.core.errors import ConfigError, EncodeError, SignatureError

PURPOSE = b"dray signature 1\0"
"""Goes before what is signed, so that nothing signed with the same key for another purpose passes for a message."""
SECRET_BYTES_MIN = 32
SIGNATURE_CHARS_MAX = 32_768
HOW_TO_MAKE = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(48))"'
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys(Protocol):
    """Signs and verifies in one fixed way; what a message says about its algorithm is never asked."""

    def sign(self, data: bytes) -> str:
        """The signature header; raises ``EncodeError`` when there is no usable key to sign with."""
        ...

    def verify(self, data: bytes, signature: str) -> None:
        """Raises ``SignatureError`` unless ``signature`` was made for ``data`` with a trusted key."""
        ...


class HmacKeys:
    """HMAC-SHA-256 with shared secrets. Header: ``key id ":" base64url``."""

    def __init__(self, secrets: Mapping[str, bytes], signing_key: str | None) -> None:
        if not secrets:
            raise bad_option("keys", "is empty", f"give at least one {{id: secret}}; {HOW_TO_MAKE}")
        for key_id, secret in secrets.items():
            check_key_id("keys", key_id)
            if len(secret) < SECRET_BYTES_MIN:
                raise bad_option(
                    f"keys.{key_id}",
                    f"the secret is {len(secret)} bytes long, at least {SECRET_BYTES_MIN} are needed",
                    HOW_TO_MAKE,
                )
        if signing_key is None and len(secrets) == 1:
            signing_key = next(iter(secrets))
        if signing_key is None or signing_key not in secrets:
            raise bad_option(
                "signing_key", "does not name one of the keys", f"set it to the one to sign with: {', '.join(secrets)}"
            )
        self._secrets = dict(secrets)
        self._signing_key = signing_key

    def sign(self, data: bytes) -> str:
        return self._header(self._signing_key, data)

    def verify(self, data: bytes, signature: str) -> None:
        key_id = signature.partition(":")[0]
        if key_id not in self._secrets:
            raise unknown_key(key_id, self._secrets, "keys")
        # Text against text, all ASCII: a second spelling of the same bytes is refused as well.
        if not hmac.compare_digest(self._header(key_id, data).encode(), signature.encode(errors="replace")):
            raise wrong_signature(f"the key {key_id!r}")

    def _header(self, key_id: str, data: bytes) -> str:
        digest = hmac.digest(self._secrets[key_id], PURPOSE + data, hashlib.sha256)
        return f"{key_id}:{to_base64url(digest)}"


def check_key_id(option: str, key_id: object) -> None:
    """Raise ``ConfigError`` unless ``key_id`` can stand in a header."""
    if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise bad_option(option, f"{key_id!r} is no key id", "use 1 to 64 of A-Z a-z 0-9 . _ -")


def bad_option(option: str, problem: str, next_step: str) -> ConfigError:
    """The error for a wrong option of ``signed``."""
    return ConfigError(f"serializer signed: {option}: {problem}; {next_step}")


def unknown_key(key_id: str, known: Mapping[str, object], option: str) -> SignatureError:
    """The error for a signature by a key that is not known here."""
    return SignatureError(
        f"signed with the key {key_id[:64]!r}, which is not known here ({', '.join(known) or 'none is'}); "
        f"when keys are changed, add the new one to {option} everywhere before anything signs with it"
    )


def wrong_signature(whose: str) -> SignatureError:
    """The error for a signature that does not fit."""
    return SignatureError(
        f"the signature by {whose} does not fit: the message was changed on its way, or the two sides' keys differ"
    )


def no_signing_key(what: str) -> EncodeError:
    """The error for signing with a configuration that can only verify."""
    return EncodeError(f"serializer signed: nothing can be sent, because {what}; this configuration can only verify")


def to_base64url(data: bytes) -> str:
    """Without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """The inverse; raises ``SignatureError``."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise SignatureError("the signature is not base64url text") from error
    if to_base64url(data) != text:  # the bits of the last character that say nothing: one signature, one text
        raise SignatureError("the signature is not base64url text")
    return data
