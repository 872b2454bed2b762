"""Signed messages: nothing is decompressed, decoded or run unless someone who holds a trusted key sent it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from dray.core.contracts import PluginContext, Seconds, Secret, Signer
from dray.core.errors import PluginDriverMissing
from dray.plugins._keys import HmacKeys, Keys, bad_option

_PEM_START = "-----BEGIN "
_OPTIONS_OF = {
    "hmac": {"keys", "signing_key"},
    "ed25519": {"private_key", "public_keys", "signing_key"},
    "x509": {"certificate", "private_key", "trust", "subjects"},
}


class SignedSerializer(Signer):
    """Signs with the algorithm that the configuration names, and accepts no other, whatever a message says.

    - ``hmac``: shared secrets (SHA-256); ``ed25519``: key pairs; ``x509``: certificates of trusted authorities.
    - Keys are changed with overlap: add the new one everywhere, then sign with it, drop the old ``max_age`` later.
    - The inner serializer, and what bytes are signed, are the codec's affair, and so is ``max_age``.
    """

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of ``signed``. Files are relative to the configuration's folder."""

        algorithm: Literal["hmac", "ed25519", "x509"]
        """How messages are signed: a shared secret, a key pair, or certificates; never taken from a message."""
        inner: str = "json"
        """The serializer that makes the bytes."""
        max_age: Seconds = 604_800.0
        """A message that was issued longer ago is refused."""
        signing_key: str | None = None
        """hmac, ed25519: the id of the key to sign with; not needed when only one can be meant."""
        keys: dict[str, Secret] = field(default_factory=dict, repr=False)
        """hmac: id -> secret of at least 32 bytes, as text, ``base64:...`` or ``file:PATH``."""
        private_key: Secret | None = field(default=None, repr=False)
        """ed25519, x509: PEM text, or the path of a PEM file."""
        public_keys: dict[str, str] = field(default_factory=dict)
        """ed25519: id -> PEM text or path, for all whose messages are accepted."""
        certificate: str | None = None
        """x509: PEM text or path; intermediate certificates follow the certificate in it."""
        trust: list[str] = field(default_factory=list)
        """x509: PEM texts or paths of the authorities' certificates."""
        subjects: list[str] = field(default_factory=list)
        """x509: accept only certificates with one of these subjects (RFC 4514), common names or alternative names."""

    api: ClassVar[int] = 1

    def __init__(self, options: Options, context: PluginContext) -> None:
        super().__init__(options, context)
        self.inner = options.inner
        self.max_age_s = float(options.max_age)
        _check(options)
        try:
            self._keys = _make_keys(options, context)
        except ImportError as error:
            raise PluginDriverMissing(
                f"serializer signed: the algorithm {options.algorithm} needs cryptography 45 or newer: "
                f'pip install "dray[signed]"'
            ) from error

    def sign(self, data: bytes) -> str:
        return self._keys.sign(data)

    def verify(self, data: bytes, signature: str) -> None:
        self._keys.verify(data, signature)


def _check(options: SignedSerializer.Options) -> None:
    """Raise ``ConfigError`` for options that contradict each other."""
    allowed = _OPTIONS_OF.get(options.algorithm)
    if allowed is None:
        raise bad_option("algorithm", f"there is no {options.algorithm!r}", f"choose one of: {', '.join(_OPTIONS_OF)}")
    if options.inner == "signed":
        raise bad_option("inner", "signed cannot be inside itself", "name the serializer that makes the bytes: json")
    if not options.max_age > 0:
        raise bad_option("max_age", "is not positive", 'give a time such as "7d"')
    given = {each.name for each in fields(options) if getattr(options, each.name)}
    strange = sorted((given & set().union(*_OPTIONS_OF.values())) - allowed)
    if strange:
        raise bad_option(
            strange[0], f"means nothing with the algorithm {options.algorithm}", "remove it, or change algorithm"
        )


def _make_keys(options: SignedSerializer.Options, context: PluginContext) -> Keys:
    base = context.base
    if options.algorithm == "hmac":
        secrets = {key_id: _secret(f"keys.{key_id}", text, base) for key_id, text in options.keys.items()}
        return HmacKeys(secrets, options.signing_key)
    private_key = _pem("private_key", options.private_key, base) if options.private_key else None
    if options.algorithm == "ed25519":
        from dray.plugins._public_keys import Ed25519Keys

        return Ed25519Keys(private_key, _pems("public_keys", options.public_keys, base), options.signing_key)
    from dray.plugins._public_keys import CertificateKeys

    certificate = _pem("certificate", options.certificate, base) if options.certificate else None
    trust = [_pem(f"trust.{index}", text, base) for index, text in enumerate(options.trust)]
    return CertificateKeys(certificate, private_key, trust, options.subjects, context.clock)


def _secret(option: str, text: str, base: Path) -> bytes:
    if text.startswith("file:"):
        return _read(option, text, base).rstrip(b"\r\n")
    if not text.startswith("base64:"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("base64:"), validate=True)
    except ValueError as error:
        raise bad_option(option, "is not base64 after base64:", "drop the prefix if it is plain text") from error


def _pems(option: str, texts: Mapping[str, str], base: Path) -> dict[str, bytes]:
    return {key: _pem(f"{option}.{key}", text, base) for key, text in texts.items()}


def _pem(option: str, text: str, base: Path) -> bytes:
    return text.encode() if _PEM_START in text else _read(option, text, base)


def _read(option: str, text: str, base: Path) -> bytes:
    try:
        return (base / text.removeprefix("file:")).read_bytes()
    except (OSError, ValueError) as error:
        # A secret that was taken for a path must not be shown: only what is certainly a path is.
        path = text if text.startswith("file:") or not option.startswith(("keys.", "private_key")) else "its file"
        reason = error.strerror if isinstance(error, OSError) else "no path"
        problem = f"{path} cannot be read ({reason})"
        raise bad_option(option, problem, f"give the path of a file, relative to {base}, or the text itself") from None
