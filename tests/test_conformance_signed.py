"""The signer kit over each algorithm of ``signed``."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ed25519

from dray.core.contracts import Signer
from dray.testing import SignerConformance
from tests.test_signed import NEW, OLD, ROOT, Identity, issue, private_pem, public_pem, signer

OURS, THEIRS = (ed25519.Ed25519PrivateKey.generate() for _ in range(2))
FOREIGN_ROOT = issue("root", ca=True)
LEAF, FOREIGN = issue("web", ROOT), issue("web", FOREIGN_ROOT)


def from_certificate(identity: Identity, root: Identity) -> Signer:
    key = private_pem(identity.key)
    return signer(algorithm="x509", certificate=identity.pem, private_key=key, trust=[root.pem])


class TestHmac(SignerConformance):
    def make(self) -> Signer:
        return signer(algorithm="hmac", keys={"web": OLD})

    def make_foreign(self) -> Signer:
        return signer(algorithm="hmac", keys={"web": NEW})


class TestEd25519(SignerConformance):
    def make(self) -> Signer:
        return self.with_key(OURS)

    def make_foreign(self) -> Signer:
        return self.with_key(THEIRS)

    @staticmethod
    def with_key(key: ed25519.Ed25519PrivateKey) -> Signer:
        return signer(algorithm="ed25519", private_key=private_pem(key), public_keys={"web": public_pem(key)})


class TestX509(SignerConformance):
    def make(self) -> Signer:
        return from_certificate(LEAF, ROOT)

    def make_foreign(self) -> Signer:
        return from_certificate(FOREIGN, FOREIGN_ROOT)
