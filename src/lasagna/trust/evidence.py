"""What an enclave claims about itself, and the evidence that an enclave claims it.

An enclave encodes its :data:`Claims` and has its processor quote their hash::

    report_data (64 bytes) = SHA-256(claims) | 32 zero bytes

so that whoever believes the quote believes the claims. The hash is over the claims' bytes as sent:
they need no canonical form. RA-TLS binds claims in the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol, TypeAlias

import msgspec

from lasagna.errors import EvidenceError
from lasagna.trust.documents import U16, Bytes32, Bytes64, decode_document
from lasagna.trust.keys import service_id
from lasagna.units import KIB

REPORT_DATA_BYTES: Final = 64
CHALLENGE_MIN_BYTES: Final = 16
MAX_EVIDENCE_BYTES: Final = 64 * KIB
"""A DCAP quote has about 5 KiB, its collateral about 20."""
MAX_CLAIMS_BYTES: Final = 1 * KIB
MAX_ATTESTED_BYTES: Final = 100 * KIB
"""Both of the above in base64, with room to spare."""

Challenge = Annotated[bytes, msgspec.Meta(min_length=CHALLENGE_MIN_BYTES, max_length=64)]
"""A verifier's nonce: 16 to 64 bytes."""


class ServiceClaims(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="service"
):
    """An enclave's: I hold the private key of this public key; this broker gave it to me.

    There is no service id: it follows from the public key, and can't contradict it.

    Attributes:
        version: of this document.
        public_key: X25519; clients seal capsules to it.
        broker: Ed25519, the broker that released the service's secret. Without it anyone could
            release a secret of their own to a genuine enclave, and read what clients send there.
        nonce: the verifier's, if it asked for fresh evidence.
    """

    version: Literal[1]
    public_key: Bytes32
    broker: Bytes32
    nonce: Challenge | None = None

    @property
    def service_id(self) -> bytes:
        """16 bytes, see :func:`lasagna.trust.keys.service_id`."""
        return service_id(self.public_key)


class KeyRequestClaims(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="key-request"
):
    """An enclave's: I hold the private key of this public key; seal this package's keys to it.

    Attributes:
        version: of this document.
        public_key: X25519, made for this request alone.
        package_id: 32 bytes.
        nonce: the broker's, if it asked for fresh evidence.
    """

    version: Literal[1]
    public_key: Bytes32
    package_id: Bytes32
    nonce: Challenge | None = None


Claims: TypeAlias = ServiceClaims | KeyRequestClaims


class EmulatedQuote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of an SGX report that verification looks at, written by anyone.

    Attributes:
        measurement: of the enclave's code (MRENCLAVE).
        signer: hash of the key that signed it (MRSIGNER).
        product_id: which of the signer's products (ISVPRODID).
        svn: its security version number (ISVSVN).
        debug: whether a debugger may read the enclave.
        report_data: what the enclave said.
    """

    measurement: Bytes32
    signer: Bytes32
    product_id: U16
    svn: U16
    debug: bool
    report_data: Bytes64


class InsecureEmulatedEvidence(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="insecure-emulated",
):
    """Evidence of nothing: no processor vouches for it. For development without SGX."""

    quote: EmulatedQuote


Evidence: TypeAlias = InsecureEmulatedEvidence
"""Every kind of evidence, told apart by ``kind``. A kind is added here (``sgx-dcap`` with quote and
collateral), given a branch in ``verifier._appraise`` and a :class:`Quoter`; callers stay."""


class Quoter(Protocol):
    """The enclave's way to have its processor vouch for something."""

    def quote(self, report_data: bytes) -> Evidence:
        """Evidence that this enclave said these 64 bytes."""
        ...


@dataclass(frozen=True, slots=True)
class InsecureEmulatedQuoter:
    """Makes :class:`InsecureEmulatedEvidence` of an enclave that is an ordinary process."""

    measurement: bytes
    signer: bytes
    product_id: int = 0
    svn: int = 0
    debug: bool = False

    def quote(self, report_data: bytes) -> InsecureEmulatedEvidence:
        """Evidence that protects nothing."""
        return InsecureEmulatedEvidence(
            EmulatedQuote(
                self.measurement, self.signer, self.product_id, self.svn, self.debug, report_data
            )
        )


class Attested(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Claims with their evidence, both as bytes: what is sent to a verifier."""

    version: Literal[1]
    evidence: bytes
    claims: bytes


_ATTESTED: Final = msgspec.json.Decoder(Attested)
_EVIDENCE: Final[msgspec.json.Decoder[Evidence]] = msgspec.json.Decoder(Evidence)
_CLAIMS: Final[msgspec.json.Decoder[Claims]] = msgspec.json.Decoder(Claims)


def report_data_of(claims: bytes) -> bytes:
    """What an enclave has quoted for its claims: SHA-256 of them, then 32 zero bytes."""
    return hashlib.sha256(claims).digest().ljust(REPORT_DATA_BYTES, b"\0")


def attest(claims: Claims, quoter: Quoter) -> bytes:
    """Claims and their evidence in one document, for :func:`decode_attested`.

    Raises:
        EvidenceError: a field of the claims has a wrong length (a nonce comes from outside).
    """
    raw = msgspec.json.encode(claims)
    decode_claims(raw)  # an enclave doesn't claim what no verifier would read
    evidence = msgspec.json.encode(quoter.quote(report_data_of(raw)))
    return msgspec.json.encode(Attested(1, evidence, raw))


def decode_attested(raw: bytes) -> Attested:
    """Split a document of :func:`attest`; nothing in it is verified yet.

    Property: any bytes give a document or :class:`EvidenceError`.
    """
    return decode_document(
        raw, _ATTESTED, name="attested document", limit=MAX_ATTESTED_BYTES, error=EvidenceError
    )


def decode_evidence(raw: bytes) -> Evidence:
    """Read evidence, which is not verified by that.

    Property: any bytes give evidence or :class:`EvidenceError`.
    """
    return decode_document(
        raw, _EVIDENCE, name="evidence", limit=MAX_EVIDENCE_BYTES, error=EvidenceError
    )


def decode_claims(raw: bytes) -> Claims:
    """Read claims, which are not verified by that.

    Property: any bytes give claims or :class:`EvidenceError`.
    """
    return decode_document(
        raw, _CLAIMS, name="claims document", limit=MAX_CLAIMS_BYTES, error=EvidenceError
    )
