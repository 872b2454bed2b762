"""Signing keys in two halves: Ed25519, and X.509 certificates. Needs the ``cryptography`` library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store

from dray.core.clock import Clock
from dray.core.errors import EncodeError, SignatureError
from dray.plugins._keys import (
    PURPOSE,
    SIGNATURE_CHARS_MAX,
    bad_option,
    check_key_id,
    from_base64url,
    no_signing_key,
    to_base64url,
    unknown_key,
    wrong_signature,
)

_INTERMEDIATES_MAX = 4
_KNOWN_CHAINS_MAX = 256
_RSA_BITS_MIN = 2048
_EC_BITS_MIN = 256
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)
_CertificateKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


class Ed25519Keys:
    """Ed25519. Header: ``key id ":" base64url``. With public keys alone it verifies and cannot sign."""

    def __init__(self, private_key: bytes | None, public_keys: Mapping[str, bytes], signing_key: str | None) -> None:
        self._public = {key_id: _ed25519_public(key_id, pem) for key_id, pem in public_keys.items()}
        self._private: Ed25519PrivateKey | None = None
        self._signing_key = ""
        if private_key is not None:
            self._private = _ed25519_private(private_key)
            self._signing_key = self._own_key_id(self._private.public_key(), signing_key)
            self._public[self._signing_key] = self._private.public_key()
        elif not public_keys:
            raise bad_option("private_key", "is missing, and public_keys is empty", "give one or both")

    def _own_key_id(self, own: Ed25519PublicKey, signing_key: str | None) -> str:
        if signing_key is None:
            signing_key = next((key_id for key_id, key in self._public.items() if key == own), None)
            if signing_key is None:
                raise bad_option(
                    "signing_key", "is missing", "set it to the id under which others know the private key"
                )
        check_key_id("signing_key", signing_key)
        if self._public.get(signing_key, own) != own:
            raise bad_option(
                f"public_keys.{signing_key}", "does not belong to private_key", "correct one of them, or signing_key"
            )
        return signing_key

    def sign(self, data: bytes) -> str:
        if self._private is None:
            raise no_signing_key("private_key is not set")
        return f"{self._signing_key}:{to_base64url(self._private.sign(PURPOSE + data))}"

    def verify(self, data: bytes, signature: str) -> None:
        key_id, _, value = signature.partition(":")
        public = self._public.get(key_id)
        if public is None:
            raise unknown_key(key_id, self._public, "public_keys")
        try:
            public.verify(from_base64url(value[:SIGNATURE_CHARS_MAX]), PURPOSE + data)
        except InvalidSignature as error:
            raise wrong_signature(f"the key {key_id!r}") from error


class _Signatory(NamedTuple):
    """The holder of a certificate, and what its chain says of it."""

    fingerprint: str
    subject: str
    key: _CertificateKey
    not_before: float
    not_after: float


class CertificateKeys:
    """X.509 certificates: RSA (PSS, SHA-256) or ECDSA, whichever the certificate's key is.

    Header: ``fingerprint ":" base64url ":" chain``, the chain being certificate and intermediates in DER, base64url,
    joined by dots: whoever trusts the authority needs nothing else.

    - The chain must lead to ``trust``, be valid now, and be made of authorities that may sign certificates
      (``cryptography.x509.verification`` checks the path: signatures, dates, path lengths, name constraints).
    - Key usage, where stated, must allow digital signatures; extended key usage client authentication.
    - With ``subjects``, the certificate's subject (RFC 4514), common name or an alternative name must be among them.
    - Chains that passed are remembered; their dates are checked each time.
    """

    def __init__(
        self,
        certificate: bytes | None,
        private_key: bytes | None,
        trust: Sequence[bytes],
        subjects: Sequence[str],
        clock: Clock,
    ) -> None:
        if (certificate is None) != (private_key is None):
            raise bad_option("certificate", "and private_key go together, and one is missing", "give both or none")
        if certificate is None and not trust:
            raise bad_option("trust", "is empty, and certificate is missing", "give one or both")
        self._clock = clock
        self._subjects = frozenset(subjects)
        self._known: dict[str, _Signatory] = {}
        anchors = [anchor for pem in trust for anchor in _certificates("trust", pem)]
        self._store = Store(anchors) if anchors else None
        self._private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | None = None
        if certificate is not None and private_key is not None:
            chain = _certificates("certificate", certificate)
            self._private = _certificate_private(private_key, chain[0])
            try:
                self._own = _signatory(chain[0], chain)
            except ValueError as error:
                raise bad_option(
                    "certificate", str(error), "use RSA from 2048 bits up, or ECDSA from P-256 up"
                ) from error
            self._own_chain = ".".join(to_base64url(each.public_bytes(Encoding.DER)) for each in chain)
            if clock.time() >= self._own.not_after:
                raise bad_option("certificate", f"expired on {_day(self._own.not_after)}", "renew it")

    def sign(self, data: bytes) -> str:
        if self._private is None:
            raise no_signing_key("certificate and private_key are not set")
        if self._clock.time() >= self._own.not_after:
            raise EncodeError(f"serializer signed: certificate: expired on {_day(self._own.not_after)}; renew it")
        if isinstance(self._private, rsa.RSAPrivateKey):
            signature = self._private.sign(PURPOSE + data, _PSS, hashes.SHA256())
        else:
            signature = self._private.sign(PURPOSE + data, _ecdsa(self._private.curve))
        return f"{self._own.fingerprint}:{to_base64url(signature)}:{self._own_chain}"

    def verify(self, data: bytes, signature: str) -> None:
        parts = signature.split(":", 3)
        if len(parts) != 3 or len(signature) > SIGNATURE_CHARS_MAX:
            raise SignatureError("the signature is not in the form that certificates make")
        fingerprint, value, chain = parts
        signatory = self._known.get(chain) or self._check_chain(chain)
        whose = f"{signatory.subject!r} (certificate {signatory.fingerprint})"
        if not signatory.not_before <= self._clock.time() <= signatory.not_after:
            raise SignatureError(
                f"signed by {whose}, whose certificate or an authority's is not valid now; renew it while messages "
                f"signed with the old one can still run out"
            )
        if fingerprint != signatory.fingerprint:
            raise SignatureError(f"the signature names another certificate than that of {whose}")
        try:
            if isinstance(signatory.key, rsa.RSAPublicKey):
                signatory.key.verify(from_base64url(value), PURPOSE + data, _PSS, hashes.SHA256())
            else:
                signatory.key.verify(from_base64url(value), PURPOSE + data, _ecdsa(signatory.key.curve))
        except InvalidSignature as error:
            raise wrong_signature(whose) from error

    def _check_chain(self, chain: str) -> _Signatory:
        if self._store is None:
            raise SignatureError("no certificate can be trusted: set trust to the authorities' certificates")
        encoded = chain.split(".", _INTERMEDIATES_MAX + 1)
        if len(encoded) > _INTERMEDIATES_MAX + 1:
            raise SignatureError(f"the signature brings more than {_INTERMEDIATES_MAX} intermediate certificates")
        try:
            leaf, *others = [x509.load_der_x509_certificate(from_base64url(each)) for each in encoded]
            verified = self._verifier(self._store).verify(leaf, others)
            signatory = _signatory(leaf, verified.chain)
            names = _names(leaf)
        except SignatureError:
            raise
        except Exception as error:  # whatever the parser says of hostile bytes, and VerificationError
            raise SignatureError(f"the signature's certificate is not trusted here: {error}") from error
        if self._subjects and not self._subjects & names:
            raise SignatureError(
                f"signed by {signatory.subject!r}, whose names ({', '.join(sorted(names))}) are not in subjects"
            )
        if len(self._known) >= _KNOWN_CHAINS_MAX:
            self._known.clear()
        self._known[chain] = signatory
        return signatory

    def _verifier(self, store: Store) -> x509.verification.ClientVerifier:
        authority = (
            ExtensionPolicy.permit_all()
            .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _may_be_authority)
            .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_sign_certificates)
        )
        holder = (
            ExtensionPolicy.permit_all()
            .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_sign)
            .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_be_client)
        )
        now = datetime.fromtimestamp(self._clock.time(), UTC)
        return (
            PolicyBuilder()
            .store(store)
            .time(now)
            .max_chain_depth(_INTERMEDIATES_MAX)
            .extension_policies(ca_policy=authority, ee_policy=holder)
            .build_client_verifier()
        )


# --- what a certificate must allow -------------------------------------------------------------------------


def _may_be_authority(_: Policy, certificate: x509.Certificate, constraints: x509.BasicConstraints) -> None:
    if not constraints.ca:
        raise ValueError(f"{certificate.subject.rfc4514_string()!r} is no authority (basic constraints)")


def _may_sign_certificates(_: Policy, certificate: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError(f"{certificate.subject.rfc4514_string()!r} may not sign certificates (key usage)")


def _may_sign(_: Policy, certificate: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.digital_signature:
        raise ValueError(f"{certificate.subject.rfc4514_string()!r} may not sign (key usage)")


def _may_be_client(_: Policy, certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
    allowed = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if usage is not None and not allowed & set(usage):
        raise ValueError(f"{certificate.subject.rfc4514_string()!r} may not be a client (extended key usage)")


# --- reading keys and certificates -------------------------------------------------------------------------


def _signatory(leaf: x509.Certificate, chain: Sequence[x509.Certificate]) -> _Signatory:
    for certificate in chain:
        key_size = getattr(certificate.public_key(), "key_size", 0)
        if key_size < (_RSA_BITS_MIN if isinstance(certificate.public_key(), rsa.RSAPublicKey) else _EC_BITS_MIN):
            raise ValueError(f"the key of {certificate.subject.rfc4514_string()!r} is too small ({key_size} bits)")
    key = leaf.public_key()
    if not isinstance(key, _CertificateKey):
        raise ValueError("the certificate's key is neither RSA nor ECDSA")
    return _Signatory(
        fingerprint=hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest()[:16],
        subject=leaf.subject.rfc4514_string(),
        key=key,
        not_before=max(each.not_valid_before_utc.timestamp() for each in chain),
        not_after=min(each.not_valid_after_utc.timestamp() for each in chain),
    )


def _names(certificate: x509.Certificate) -> set[str]:
    """The subject, its common names, and the alternative names that are text or addresses."""
    names = {certificate.subject.rfc4514_string()}
    names.update(str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return names
    kinds = (x509.DNSName, x509.RFC822Name, x509.UniformResourceIdentifier, x509.IPAddress)
    names.update(str(each.value) for each in alternative if isinstance(each, kinds))
    return names


def _certificates(option: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise bad_option(
            option, f"is no PEM certificate ({error})", "it starts with -----BEGIN CERTIFICATE-----"
        ) from error


def _private_key(pem: bytes) -> object:
    try:
        return load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise bad_option("private_key", "is encrypted", "decrypt it: openssl pkey -in KEY -out NEW") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise bad_option(
            "private_key", "is no PEM private key", "it starts with -----BEGIN PRIVATE KEY-----"
        ) from error


def _ed25519_private(pem: bytes) -> Ed25519PrivateKey:
    key = _private_key(pem)
    if not isinstance(key, Ed25519PrivateKey):
        raise bad_option("private_key", "is not an Ed25519 key", "make one with: openssl genpkey -algorithm ed25519")
    return key


def _ed25519_public(key_id: str, pem: bytes) -> Ed25519PublicKey:
    option = f"public_keys.{key_id}"
    check_key_id("public_keys", key_id)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise bad_option(option, "is no PEM public key", "make it with: openssl pkey -in KEY -pubout") from error
    if not isinstance(key, Ed25519PublicKey):
        raise bad_option(option, "is not an Ed25519 key", "make it with: openssl pkey -in KEY -pubout")
    return key


def _certificate_private(pem: bytes, certificate: x509.Certificate) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    key = _private_key(pem)
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        raise bad_option("private_key", "is neither RSA nor ECDSA", "choose another key for the certificate")
    if key.public_key() != certificate.public_key():
        raise bad_option("private_key", "does not belong to certificate", "correct one of them")
    return key


def _ecdsa(curve: ec.EllipticCurve) -> ec.ECDSA:
    if curve.key_size <= 256:
        return ec.ECDSA(hashes.SHA256())
    return ec.ECDSA(hashes.SHA384() if curve.key_size <= 384 else hashes.SHA512())


def _day(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).date().isoformat()
