"""The conformance kit for signers: what :class:`~dray.core.contracts.Signer` promises, as tests.

A plugin's test module holds a subclass with two methods::

    from dray.testing import SignerConformance, plugin_context

    class TestMine(SignerConformance):
        def make(self):
            return MySigner(MySigner.Options(key=OURS), plugin_context("mine"))

        def make_foreign(self):
            return MySigner(MySigner.Options(key=THEIRS), plugin_context("mine"))

``DRAY_CONFORMANCE_REPORT=path`` writes down what was proven.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dray.core.contracts import API_VERSION, Signer
from dray.core.errors import SignatureError
from dray.testing.harness import Background
from dray.testing.kit import Conformance

DATA = b"5:dray1 what is signed \x00\xff"

# One test method runs in many subclasses: that is what a kit is for.
_settings = settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None, max_examples=50)


class SignerConformance(Conformance, ABC):
    """What every signer must do."""

    kind = "serializers"

    @abstractmethod
    def make(self) -> Signer:
        """A signer, built as the core builds it; each call stands for another process with the same configuration."""

    @abstractmethod
    def make_foreign(self) -> Signer:
        """A signer of the same kind that somebody else runs: its key is not trusted here."""

    def sample(self) -> Signer:
        return self.make()

    def test_says_what_it_needs(self) -> None:
        signer = self.make()
        assert signer.api == API_VERSION
        assert signer.inner
        assert 0 < signer.max_age_s <= math.inf

    @_settings
    @given(st.binary(max_size=2000))
    @example(b"")
    def test_another_process_verifies_what_was_signed(self, data: bytes) -> None:
        signature = self.make().sign(data)
        assert signature.isascii()
        assert signature.isprintable(), "it travels as the text of a header"
        self.make().verify(data, signature)

    def test_every_changed_byte_is_refused(self) -> None:
        signer = self.make()
        signature = signer.sign(DATA)
        for offset in range(len(DATA)):
            changed = bytearray(DATA)
            changed[offset] ^= 0x01
            _refused(signer, bytes(changed), signature)
        for other in (b"", DATA[:-1], DATA + b"\x00", b"\x00" + DATA):
            _refused(signer, other, signature)

    def test_every_changed_letter_of_the_signature_is_refused(self) -> None:
        signer = self.make()
        signature = signer.sign(DATA)
        for at, letter in enumerate(signature):
            _refused(signer, DATA, f"{signature[:at]}{'A' if letter != 'A' else 'B'}{signature[at + 1 :]}")
            _refused(signer, DATA, signature[:at])
        for extra in ("=", ":", " ", "\n", "\x00", signature):
            _refused(signer, DATA, signature + extra)
            _refused(signer, DATA, extra + signature)

    def test_a_foreign_signature_is_refused(self) -> None:
        ours, theirs = self.make(), self.make_foreign()
        theirs.verify(DATA, theirs.sign(DATA))
        _refused(ours, DATA, theirs.sign(DATA))
        _refused(theirs, DATA, ours.sign(DATA))

    def test_a_signature_of_something_else_is_refused(self) -> None:
        signer = self.make()
        _refused(signer, DATA, signer.sign(b"another message"))

    @_settings
    @given(st.text(max_size=300))
    @example("")
    @example("\ud800")
    @example("\u00e9" * 100)
    @example("A" * 100_000)
    def test_no_text_breaks_it(self, signature: str) -> None:
        _refused(self.make(), DATA, signature)

    def test_threads_do_not_disturb_each_other(self) -> None:
        signer = self.make()

        def work(number: int) -> None:
            for step in range(20):
                data = f"{number} {step}".encode()
                signer.verify(data, signer.sign(data))

        background = Background()
        for number in range(8):
            background.start(work, number)
        background.join()

    def test_it_does_not_tell_its_keys(self) -> None:
        signer = self.make()
        with pytest.raises(SignatureError) as caught:
            signer.verify(DATA, "")
        assert str(caught.value)
        assert repr(signer.options) == repr(self.make().options), "nothing that differs from one run to the next"


def _refused(signer: Signer, data: bytes, signature: str) -> None:
    """``SignatureError`` with a text, and nothing else."""
    with pytest.raises(SignatureError) as caught:
        signer.verify(data, signature)
    assert str(caught.value)
