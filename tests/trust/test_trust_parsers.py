"""One property for each parser of bytes from outside: it accepts, or raises its own error."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from lasagna.errors import EvidenceError, KeyRefusedError, PackageError, RecordError, TrustError
from lasagna.trust.evidence import (
    InsecureEmulatedQuoter,
    KeyRequestClaims,
    ServiceClaims,
    attest,
    decode_attested,
    decode_claims,
    decode_evidence,
)
from lasagna.trust.grant import grant
from lasagna.trust.keys import ContentKey, SecretKey, ServiceSecret, service_keys
from lasagna.trust.model_keys import ModelKeys, decode_model_keys, encode_model_keys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.release import GRANT_BYTES, make_key_request, open_grant
from lasagna.trust.request import CAPSULE_BYTES, RequestScope, open_capsule
from lasagna.trust.signing import verify_manifest
from lasagna.trust.verifier import UnixSeconds, verify_service

QUOTER = InsecureEmulatedQuoter(measurement=b"m" * 32, signer=b"s" * 32)
POLICY = MeasurementIn(frozenset({QUOTER.measurement}))
NOW = UnixSeconds(0)
OWNER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
SERVICE = service_keys(ServiceSecret(SecretKey(bytes(32))))
PENDING = make_key_request(bytes(32), QUOTER)
DOCUMENT = decode_attested(attest(ServiceClaims(1, b"k" * 32, b"b" * 32), QUOTER))
SEEDS = [
    attest(KeyRequestClaims(1, b"k" * 32, b"p" * 32, b"n" * 32), QUOTER),
    DOCUMENT.evidence,
    DOCUMENT.claims,
    encode_model_keys(ModelKeys(bytes(32), ContentKey(SecretKey(bytes(32))), bytes(32))),
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["version", "role", "kind", "quote", "claims", "evidence", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
).map(msgspec.json.encode)
NESTED = (
    st.integers(1, 3000).map(lambda depth: b"[" * depth)
    | st.integers(1, 900).map(lambda depth: b'{"quote":' * depth)
    | st.integers(1, 1018).map(lambda depth: b'{"a":' + b"[" * depth)  # in a field to be skipped
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid document with a piece replaced."""
    seed = draw(st.sampled_from(SEEDS))
    start = draw(st.integers(0, len(seed)))
    end = draw(st.integers(start, min(len(seed), start + 40)))
    return seed[:start] + draw(st.binary(max_size=10) | JSON) + seed[end:]


ANY = st.binary(max_size=300) | JSON | NESTED | mutated()


@pytest.mark.parametrize("depth", [1000, 1018])  # 1 KiB is the limit of claims
def test_a_deeply_nested_unknown_field_is_refused(depth: int) -> None:
    with pytest.raises(EvidenceError, match="malformed"):
        decode_claims(b'{"a":' + b"[" * depth)


@settings(deadline=None)
@given(ANY)
def test_property_an_attested_document_decodes_or_raises_evidence_error(raw: bytes) -> None:
    try:
        document = decode_attested(raw)
    except EvidenceError:
        return
    assert decode_attested(msgspec.json.encode(document)) == document


@settings(deadline=None)
@given(ANY)
def test_property_evidence_decodes_or_raises_evidence_error(raw: bytes) -> None:
    try:
        evidence = decode_evidence(raw)
    except EvidenceError:
        return
    assert len(evidence.quote.measurement) == len(evidence.quote.signer) == 32
    assert len(evidence.quote.report_data) == 64


@settings(deadline=None)
@given(ANY)
def test_property_claims_decode_or_raise_evidence_error(raw: bytes) -> None:
    try:
        claims = decode_claims(raw)
    except EvidenceError:
        return
    assert claims.version == 1
    assert len(claims.public_key) == 32


@settings(deadline=None)
@given(ANY, ANY)
def test_property_verification_raises_evidence_error(evidence: bytes, claims: bytes) -> None:
    try:
        verified = verify_service(
            evidence,
            claims,
            policy=POLICY,
            brokers={b"b" * 32},
            now=NOW,
            insecure_allow_emulated=True,
        )
    except EvidenceError:
        return
    assert verified == decode_claims(DOCUMENT.claims)  # the only ones that were quoted


@settings(deadline=None)
@given(ANY)
def test_property_model_keys_decode_or_raise_trust_error(raw: bytes) -> None:
    try:
        keys = decode_model_keys(raw)
    except TrustError:
        return
    assert decode_model_keys(encode_model_keys(keys)) == keys


@settings(deadline=None)
@given(ANY)
def test_property_a_key_request_is_refused_by_trust_errors_only(raw: bytes) -> None:
    try:
        sealed = grant(
            raw,
            keys=[],
            broker_key=Ed25519PrivateKey.from_private_bytes(bytes(32)),
            policy=POLICY,
            now=NOW,
            insecure_allow_emulated=True,
        )
    except (EvidenceError, KeyRefusedError):
        return
    raise AssertionError(f"a broker without keys released {len(sealed)} bytes")


def sized(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=size + 1) | st.binary(min_size=size - 1, max_size=size - 1).map(
        lambda body: b"\x01" + body
    )


@settings(deadline=None)
@given(sized(GRANT_BYTES))
def test_property_a_grant_opens_or_raises_key_refused_error(raw: bytes) -> None:
    try:
        open_grant(PENDING, raw)
    except KeyRefusedError:
        return
    raise AssertionError("nobody sealed this grant")


@settings(deadline=None)
@given(sized(CAPSULE_BYTES))
def test_property_a_capsule_opens_or_raises_record_error(raw: bytes) -> None:
    scope = RequestScope(
        service_id=SERVICE.service_id, model_digest=bytes(32), request_id=bytes(16)
    )
    try:
        open_capsule(SERVICE, scope, raw)
    except RecordError:
        return
    raise AssertionError("nobody sealed this capsule")


@settings(deadline=None)
@given(
    # Not any 32 bytes: a key of low order, such as 32 zeros, has signatures that anyone can make.
    st.just(OWNER.public_key().public_bytes_raw()) | st.binary(max_size=31),
    st.binary(max_size=40),
    st.binary(max_size=70) | sized(64),
)
def test_property_a_signature_verifies_or_raises_package_error(
    public_key: bytes, manifest: bytes, signature: bytes
) -> None:
    try:
        verify_manifest(public_key, manifest, signature)
    except PackageError:
        return
    raise AssertionError("nobody signed this manifest")
