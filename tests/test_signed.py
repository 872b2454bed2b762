"""The signer: who may sign, what is refused and why, and that no secret is ever shown."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from dray.core.contracts import Signer
from dray.core.errors import ConfigError, EncodeError, SignatureError
from dray.core.options import build
from dray.plugins.serializers.signed import SignedSerializer
from dray.testing.clock import FakeClock
from dray.testing.harness import plugin_context

OLD, NEW = "old-secret " * 4, "new-secret " * 4
DATA = b"what is signed \x00\xff"


def signer(base: Path | None = None, clock: FakeClock | None = None, **options: Any) -> SignedSerializer:
    made = SignedSerializer(build(SignedSerializer.Options, options), plugin_context("signed", clock, base))
    assert isinstance(made, Signer)
    return made


def private_pem(key: Any, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()  # type: ignore[no-any-return]


def public_pem(key: Any) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()  # type: ignore[no-any-return]


def flips(signature: str) -> list[str]:
    """``signature`` with each character changed in turn, and cut at each place."""
    changed = [
        signature[:index] + ("A" if letter != "A" else "B") + signature[index + 1 :]
        for index, letter in enumerate(signature)
    ]
    return changed + [signature[:index] for index in range(len(signature))]


# --- hmac --------------------------------------------------------------------------------------------------


def hmac_signer(**options: Any) -> SignedSerializer:
    return signer(**{"algorithm": "hmac", "keys": {"old": OLD}, **options})


def test_hmac_signs_and_verifies() -> None:
    made = hmac_signer(max_age="2h", inner="msgpack")
    signature = made.sign(DATA)
    assert signature.startswith("old:")
    assert signature.isascii()
    made.verify(DATA, signature)
    assert (made.inner, made.max_age_s) == ("msgpack", 7200.0)


def test_hmac_anything_changed_is_refused() -> None:
    made = hmac_signer()
    signature = made.sign(DATA)
    for bad in (DATA[:-1], DATA + b"\x00", b""):
        with pytest.raises(SignatureError):
            made.verify(bad, signature)
    for bad_signature in [*flips(signature), signature + "=", signature + ":", " " + signature]:
        with pytest.raises(SignatureError):
            made.verify(DATA, bad_signature)


def test_rotation_with_overlap() -> None:
    before = hmac_signer()
    both = hmac_signer(keys={"old": OLD, "new": NEW}, signing_key="old")
    switched = hmac_signer(keys={"old": OLD, "new": NEW}, signing_key="new")
    after = hmac_signer(keys={"new": NEW})
    both.verify(DATA, before.sign(DATA))
    both.verify(DATA, switched.sign(DATA))
    switched.verify(DATA, both.sign(DATA))
    after.verify(DATA, switched.sign(DATA))
    with pytest.raises(SignatureError, match="'new', which is not known here"):
        before.verify(DATA, after.sign(DATA))


def test_the_same_key_id_with_another_secret_is_refused() -> None:
    with pytest.raises(SignatureError, match="does not fit"):
        hmac_signer(keys={"old": NEW}).verify(DATA, hmac_signer().sign(DATA))


def test_secrets_as_base64_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(OLD.strip() + "\n")
    plain = hmac_signer(keys={"old": OLD.strip()}).sign(DATA)
    encoded = "base64:" + base64.b64encode(OLD.strip().encode()).decode()
    for form in (encoded, "file:secret", f"file:{tmp_path}/secret"):
        hmac_signer(base=tmp_path, keys={"old": form}).verify(DATA, plain)


@given(st.text() | st.binary().map(lambda data: "old:" + base64.urlsafe_b64encode(data).decode()))
@example("")
@example("\ud800")
@example("old:\u00e9")
def test_no_signature_text_breaks_the_verifier(signature: str) -> None:
    with pytest.raises(SignatureError):
        hmac_signer().verify(DATA, signature)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "hmac"}, "keys: is empty"),
        ({"algorithm": "hmac", "keys": {"a": "short"}}, r"keys\.a: the secret is 5 bytes long.*make one with"),
        ({"algorithm": "hmac", "keys": {"a": "base64:" + "A" * 40}}, "30 bytes long"),
        ({"algorithm": "hmac", "keys": {"a": "base64:***"}}, r"keys\.a: is not base64"),
        ({"algorithm": "hmac", "keys": {"a": "file:nowhere"}}, r"keys\.a: file:nowhere cannot be read"),
        ({"algorithm": "hmac", "keys": {"a:b": OLD}}, "no key id"),
        ({"algorithm": "hmac", "keys": {"a": OLD, "b": NEW}}, "signing_key: does not name one of the keys.*a, b"),
        ({"algorithm": "hmac", "keys": {"a": OLD}, "signing_key": "c"}, "signing_key"),
        ({"algorithm": "hmac", "keys": {"a": OLD}, "trust": ["x"]}, "trust: means nothing with the algorithm hmac"),
        ({"algorithm": "hmac", "keys": {"a": OLD}, "inner": "signed"}, "inner"),
        ({"algorithm": "hmac", "keys": {"a": OLD}, "max_age": 0}, "max_age"),
        ({"algorithm": "none", "keys": {"a": OLD}}, "algorithm"),
        ({"algorithm": "ed25519"}, "private_key: is missing"),
        ({"algorithm": "ed25519", "keys": {"a": OLD}}, "keys: means nothing"),
        ({"algorithm": "ed25519", "private_key": "nowhere.pem"}, "private_key: its file cannot be read"),
        ({"algorithm": "ed25519", "private_key": "-----BEGIN X"}, "private_key: is no PEM private key"),
        ({"algorithm": "ed25519", "public_keys": {"a": "-----BEGIN X"}}, r"public_keys\.a: is no PEM public key"),
        ({"algorithm": "x509"}, "trust: is empty"),
        ({"algorithm": "x509", "certificate": "-----BEGIN X"}, "certificate: and private_key go together"),
        ({"algorithm": "x509", "trust": ["-----BEGIN X"]}, "trust: is no PEM certificate"),
        ({"algorithm": "x509", "trust": ["ca.pem"]}, r"trust\.0: ca\.pem cannot be read"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        signer(base=tmp_path, **options)


def test_no_secret_is_shown() -> None:
    key = private_pem(ed25519.Ed25519PrivateKey.generate())
    options = build(SignedSerializer.Options, {"algorithm": "hmac", "keys": {"a": OLD}, "private_key": key})
    assert "old-secret" not in repr(options)
    assert "PRIVATE" not in repr(options)
    for wrong in ({"keys": {"a": "hunter2"}}, {"keys": {"a": "base64:hunter2!"}}, {"private_key": "hunter2"}):
        algorithm = "ed25519" if "private_key" in wrong else "hmac"
        with pytest.raises(ConfigError) as caught:
            signer(algorithm=algorithm, **wrong)
        assert "hunter2" not in str(caught.value)


def test_hmac_does_not_need_the_cryptography_library() -> None:
    script = """
import sys
sys.modules["cryptography"] = None
from dray.core.errors import PluginDriverMissing
from dray.plugins.serializers.signed import SignedSerializer as S
from dray.testing.harness import plugin_context
made = S(S.Options(algorithm="hmac", keys={"a": "x" * 32}), plugin_context("signed"))
made.verify(b"x", made.sign(b"x"))
try:
    S(S.Options(algorithm="x509", trust=["-----BEGIN X"]), plugin_context("signed"))
except PluginDriverMissing as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert 'pip install "dray[signed]"' in done.stdout


# --- ed25519 -----------------------------------------------------------------------------------------------


def test_ed25519_signs_and_verifies(tmp_path: Path) -> None:
    key, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_text(private_pem(key))
    (tmp_path / "pub.pem").write_text(public_pem(key))
    sender = signer(base=tmp_path, algorithm="ed25519", private_key="key.pem", signing_key="web")
    receiver = signer(base=tmp_path, algorithm="ed25519", public_keys={"other": public_pem(other), "web": "pub.pem"})
    signature = sender.sign(DATA)
    sender.verify(DATA, signature)
    receiver.verify(DATA, signature)
    for bad in flips(signature):
        with pytest.raises(SignatureError):
            receiver.verify(DATA, bad)
    with pytest.raises(SignatureError):
        receiver.verify(DATA + b"x", signature)
    with pytest.raises(EncodeError, match="can only verify"):
        receiver.sign(DATA)


def test_ed25519_finds_its_own_key_id() -> None:
    key, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    both = {"a": public_pem(other), "b": public_pem(key)}
    assert signer(algorithm="ed25519", private_key=private_pem(key), public_keys=both).sign(DATA).startswith("b:")
    with pytest.raises(ConfigError, match="does not belong to private_key"):
        signer(algorithm="ed25519", private_key=private_pem(key), public_keys=both, signing_key="a")
    with pytest.raises(ConfigError, match="signing_key: is missing"):
        signer(algorithm="ed25519", private_key=private_pem(key))


def test_ed25519_refuses_other_keys() -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ConfigError, match="is not an Ed25519 key"):
        signer(algorithm="ed25519", private_key=private_pem(curve), signing_key="a")
    with pytest.raises(ConfigError, match="is not an Ed25519 key"):
        signer(algorithm="ed25519", public_keys={"a": public_pem(curve)})
    with pytest.raises(ConfigError, match="is encrypted"):
        secret = private_pem(ed25519.Ed25519PrivateKey.generate(), b"pass")
        signer(algorithm="ed25519", private_key=secret, signing_key="a")


def test_a_public_key_is_never_taken_for_a_shared_secret() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    forged = signer(algorithm="hmac", keys={"web": public_pem(key)}).sign(DATA)
    with pytest.raises(SignatureError):
        signer(algorithm="ed25519", public_keys={"web": public_pem(key)}).verify(DATA, forged)


# --- x509 --------------------------------------------------------------------------------------------------

NOW = datetime.fromtimestamp(FakeClock().time(), UTC)
EC = ec.SECP256R1()


class Identity(NamedTuple):
    certificate: x509.Certificate
    key: Any

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()


def issue(
    name: str,
    issuer: Identity | None = None,
    *,
    key: Any = None,
    ca: bool = False,
    path_length: int | None = None,
    days: tuple[float, float] = (-10, 10),
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (),
) -> Identity:
    key = key or ec.generate_private_key(EC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return Identity(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names.split()})


ROOT = issue("root", ca=True, extensions=((usage(key_cert_sign=True, crl_sign=True), True),))
LEAF = issue("web-1", ROOT, extensions=((usage(digital_signature=True), True),))


def sending(identity: Identity, *intermediates: Identity, clock: FakeClock | None = None) -> SignedSerializer:
    return signer(
        clock=clock,
        algorithm="x509",
        certificate=identity.pem + "".join(each.pem for each in intermediates),
        private_key=private_pem(identity.key),
    )


def trusting(*roots: Identity, clock: FakeClock | None = None, **options: Any) -> SignedSerializer:
    return signer(clock=clock, algorithm="x509", trust=[root.pem for root in roots], **options)


@pytest.mark.parametrize(
    "make_key",
    [
        lambda: rsa.generate_private_key(65537, 2048),
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
    ],
    ids=["rsa", "p256", "p384", "p521"],
)
def test_x509_whoever_trusts_the_authority_can_verify(make_key: Callable[[], Any]) -> None:
    signature = sending(issue("web-2", ROOT, key=make_key())).sign(DATA)
    receiver = trusting(ROOT)
    for _ in range(2):  # the second time the chain is known
        receiver.verify(DATA, signature)
        with pytest.raises(SignatureError, match="does not fit"):
            receiver.verify(DATA + b"x", signature)
    assert signature.isascii()
    assert len(signature) < 2000


def test_x509_every_change_is_refused() -> None:
    signature, receiver = sending(LEAF).sign(DATA), trusting(ROOT)
    receiver.verify(DATA, signature)
    for bad in flips(signature):
        with pytest.raises(SignatureError):
            receiver.verify(DATA, bad)


def test_x509_intermediates_travel_with_the_signature() -> None:
    middle = issue("middle", ROOT, ca=True)
    signature = sending(issue("deep", middle), middle).sign(DATA)
    trusting(ROOT).verify(DATA, signature)
    with pytest.raises(SignatureError):  # without the intermediate there is no path
        trusting(ROOT).verify(DATA, signature.rpartition(".")[0])


@pytest.mark.parametrize(
    ("why", "make_chain"),
    [
        ("another authority", lambda: [issue("web", issue("root", ca=True))]),
        ("self-signed", lambda: [issue("web")]),
        ("issued by a leaf", lambda: [issue("web", LEAF), LEAF]),
        ("expired", lambda: [issue("web", ROOT, days=(-10, -1))]),
        ("not yet valid", lambda: [issue("web", ROOT, days=(1, 10))]),
        ("may not sign", lambda: [issue("web", ROOT, extensions=((usage(key_encipherment=True), True),))]),
        (
            "a server's",
            lambda: [
                issue("web", ROOT, extensions=((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),))
            ],
        ),
        (
            "critical and unknown",
            lambda: [
                issue(
                    "web",
                    ROOT,
                    extensions=((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), True),),
                )
            ],
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_x509_certificates_that_are_refused(why: str, make_chain: Callable[[], list[Identity]]) -> None:
    early = FakeClock(FakeClock().time() - 5 * 86400)
    signature = sending(*make_chain(), clock=early).sign(DATA)
    with pytest.raises(SignatureError, match="not trusted here"):
        trusting(ROOT).verify(DATA, signature)


def test_x509_small_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = issue("web", ROOT, key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(ConfigError, match="too small"):
        sending(weak)
    monkeypatch.setattr("dray.plugins._public_keys._RSA_BITS_MIN", 1024)
    signature = sending(weak).sign(DATA)
    monkeypatch.undo()
    with pytest.raises(SignatureError, match="too small"):
        trusting(ROOT).verify(DATA, signature)


def test_x509_authorities_that_are_refused() -> None:
    cannot = issue("cannot", ROOT, ca=True, extensions=((usage(digital_signature=True), True),))
    expired = issue("expired", ROOT, ca=True, days=(-10, -1))
    short = issue("short", ROOT, ca=True, path_length=0)
    below = issue("below", short, ca=True)
    for chain in ([issue("a", cannot), cannot], [issue("b", expired), expired], [issue("c", below), below, short]):
        early = FakeClock(FakeClock().time() - 5 * 86400)
        signature = sending(*chain, clock=early).sign(DATA)
        with pytest.raises(SignatureError, match="not trusted here"):
            trusting(ROOT).verify(DATA, signature)


def test_x509_an_expired_root_is_not_trusted() -> None:
    root = issue("root", ca=True, days=(-10, -1))
    signature = sending(issue("web", root)).sign(DATA)
    with pytest.raises(SignatureError):
        trusting(root).verify(DATA, signature)


def test_x509_dates_are_checked_each_time() -> None:
    clock = FakeClock()
    sender, receiver = sending(LEAF, clock=clock), trusting(ROOT, clock=clock)
    signature = sender.sign(DATA)
    receiver.verify(DATA, signature)
    clock.advance(11 * 86400)
    with pytest.raises(SignatureError, match="not valid now"):
        receiver.verify(DATA, signature)
    with pytest.raises(EncodeError, match="expired on"):
        sender.sign(DATA)
    with pytest.raises(ConfigError, match="expired on"):
        sending(LEAF, clock=clock)


def test_x509_subjects() -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("web.example"), x509.UniformResourceIdentifier("spiffe://x/web")])
    signature = sending(issue("web-3", ROOT, extensions=((names, False),))).sign(DATA)
    for subject in ("web-3", "CN=web-3", "web.example", "spiffe://x/web"):
        trusting(ROOT, subjects=["other", subject]).verify(DATA, signature)
    with pytest.raises(SignatureError, match="not in subjects"):
        trusting(ROOT, subjects=["web", "example"]).verify(DATA, signature)


def test_x509_the_chain_of_one_does_not_carry_the_signature_of_another() -> None:
    one, two = sending(LEAF).sign(DATA).split(":"), sending(issue("web-4", ROOT)).sign(DATA).split(":")
    receiver = trusting(ROOT)
    for mixed in ([one[0], two[1], one[2]], [two[0], one[1], one[2]], [one[0], one[1], two[2]]):
        with pytest.raises(SignatureError):
            receiver.verify(DATA, ":".join(mixed))


@given(st.text(alphabet="abcABC019-_.:", max_size=60))
@example("a:b:" + ".".join(["AAAA"] * 50))
@example("a:b:" + "A" * 100_000)
def test_x509_no_signature_text_breaks_the_verifier(signature: str) -> None:
    with pytest.raises(SignatureError):
        RECEIVER.verify(DATA, signature)


RECEIVER = trusting(ROOT)


def test_x509_keys_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="does not belong to certificate"):
        signer(algorithm="x509", certificate=LEAF.pem, private_key=private_pem(ROOT.key))
    with pytest.raises(ConfigError, match="neither RSA nor ECDSA"):
        key = ed25519.Ed25519PrivateKey.generate()
        signer(algorithm="x509", certificate=LEAF.pem, private_key=private_pem(key))
    with pytest.raises(EncodeError, match="can only verify"):
        trusting(ROOT).sign(DATA)
    with pytest.raises(SignatureError, match="set trust"):
        sending(LEAF).verify(DATA, sending(LEAF).sign(DATA))
