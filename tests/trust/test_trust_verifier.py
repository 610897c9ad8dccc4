"""The numbered steps of verification: one test for each thing that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from lasagna.errors import EvidenceError, UsageError
from lasagna.trust.evidence import (
    MAX_CLAIMS_BYTES,
    MAX_EVIDENCE_BYTES,
    Attested,
    Claims,
    InsecureEmulatedQuoter,
    KeyRequestClaims,
    ServiceClaims,
    attest,
    decode_attested,
    report_data_of,
)
from lasagna.trust.keys import service_id
from lasagna.trust.policy import MeasurementIn, Policy, Report
from lasagna.trust.verifier import UnixSeconds, verify_key_request, verify_service

NOW = UnixSeconds(1_751_328_000)
QUOTER = InsecureEmulatedQuoter(measurement=b"m" * 32, signer=b"s" * 32)
POLICY = MeasurementIn(frozenset({QUOTER.measurement}))
BROKER = b"b" * 32
NONCE = b"n" * 32
SERVICE = ServiceClaims(1, b"k" * 32, BROKER, NONCE)
KEY_REQUEST = KeyRequestClaims(1, b"k" * 32, b"p" * 32, NONCE)


def attested(claims: Claims, quoter: InsecureEmulatedQuoter = QUOTER) -> Attested:
    return decode_attested(attest(claims, quoter))


def verify(document: Attested, **changes: Any) -> ServiceClaims:
    arguments: dict[str, Any] = {
        "policy": POLICY,
        "brokers": {BROKER},
        "now": NOW,
        "insecure_allow_emulated": True,
    }
    return verify_service(document.evidence, document.claims, **(arguments | changes))


def test_a_service_is_verified() -> None:
    claims = verify(attested(SERVICE), nonce=NONCE, brokers={b"x" * 32, BROKER})
    assert claims == SERVICE
    assert claims.service_id == service_id(SERVICE.public_key)


def test_a_key_request_is_verified() -> None:
    document = attested(KEY_REQUEST)
    claims = verify_key_request(
        document.evidence,
        document.claims,
        policy=POLICY,
        now=NOW,
        nonce=NONCE,
        insecure_allow_emulated=True,
    )
    assert claims == KEY_REQUEST


def test_the_report_data_is_the_hash_and_zeros() -> None:
    assert report_data_of(b"").hex() == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" + "00" * 32
    )


# Step 1


def test_oversize_evidence_is_refused_before_it_is_parsed() -> None:
    big = msgspec.structs.replace(attested(SERVICE), evidence=b"[" * (MAX_EVIDENCE_BYTES + 1))
    with pytest.raises(EvidenceError, match="65537 bytes; at most 65536"):
        verify(big)


@pytest.mark.parametrize(
    "kind", ["sgx-dcap", "emulated", "InsecureEmulatedEvidence", "insecure-Emulated", ""]
)
def test_evidence_of_an_unknown_kind_is_refused(kind: str) -> None:
    document = attested(SERVICE)
    changed = document.evidence.replace(b"insecure-emulated", kind.encode())
    with pytest.raises(EvidenceError, match="evidence is malformed"):
        verify(msgspec.structs.replace(document, evidence=changed))


# Step 2


def test_emulated_evidence_is_refused_unless_the_caller_says_so() -> None:
    document = attested(SERVICE)
    with pytest.raises(EvidenceError, match="anyone can write it"):
        verify_service(document.evidence, document.claims, policy=POLICY, brokers={BROKER}, now=NOW)
    document = attested(KEY_REQUEST)
    with pytest.raises(EvidenceError, match="anyone can write it"):
        verify_key_request(document.evidence, document.claims, policy=POLICY, now=NOW)


def test_no_environment_variable_allows_emulated_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("INSECURE_ALLOW_EMULATED", "LASAGNA_INSECURE_ALLOW_EMULATED"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(EvidenceError, match="anyone can write it"):
        verify(attested(SERVICE), insecure_allow_emulated=False)


# Steps 3 and 4


def test_a_debug_enclave_is_refused_whatever_the_policy_says() -> None:
    with pytest.raises(EvidenceError, match="debug enclave"):
        verify(attested(SERVICE, replace(QUOTER, debug=True)))


def test_an_enclave_of_other_code_is_refused() -> None:
    with pytest.raises(EvidenceError, match="measurement 7878"):
        verify(attested(SERVICE, replace(QUOTER, measurement=b"x" * 32)))


def test_the_policy_is_asked_about_every_field_of_the_report() -> None:
    seen: list[Report] = []

    class Seeing:
        def verify(self, report: Report) -> None:
            seen.append(report)

    policy: Policy = Seeing()
    verify(attested(SERVICE, replace(QUOTER, svn=5, product_id=6)), policy=policy)
    assert [(r.kind, r.measurement, r.signer, r.product_id, r.svn, r.debug) for r in seen] == [
        ("insecure-emulated", b"m" * 32, b"s" * 32, 6, 5, False)
    ]


# Step 5


def test_claims_that_the_enclave_did_not_make_are_refused() -> None:
    """The host puts its own key in front of genuine evidence."""
    own = msgspec.structs.replace(SERVICE, public_key=b"h" * 32)
    swapped = Attested(1, attested(SERVICE).evidence, attested(own).claims)
    with pytest.raises(EvidenceError, match="made for other claims"):
        verify(swapped)


def test_report_data_with_anything_behind_the_hash_is_refused() -> None:
    class Chatty:
        def quote(self, report_data: bytes) -> Any:
            return QUOTER.quote(report_data[:32] + b"\x01" * 32)

    with pytest.raises(EvidenceError, match="made for other claims"):
        verify(decode_attested(attest(SERVICE, Chatty())))


# Step 6


def quoted(claims: bytes) -> Attested:
    """Evidence for claims that no honest enclave would make."""
    return Attested(1, msgspec.json.encode(QUOTER.quote(report_data_of(claims))), claims)


@pytest.mark.parametrize(
    "change",
    [
        lambda claims: claims | {"version": 2},
        lambda claims: claims | {"role": "admin"},
        lambda claims: claims | {"extra": 1},
        lambda claims: claims | {"package_id": claims["broker"]},
        lambda claims: claims | {"public_key": "AAAA"},
        lambda claims: claims | {"nonce": "AAAA"},
        lambda claims: {key: claims[key] for key in claims if key != "broker"},
        lambda claims: {key: claims[key] for key in claims if key != "role"},
        lambda claims: [claims],
    ],
)
def test_claims_of_another_shape_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    claims = msgspec.json.decode(msgspec.json.encode(SERVICE), type=dict[str, Any])
    verify(quoted(msgspec.json.encode(claims)))
    with pytest.raises(EvidenceError, match="claims document is malformed"):
        verify(quoted(msgspec.json.encode(change(claims))))


def test_oversize_claims_are_refused() -> None:
    with pytest.raises(EvidenceError, match="at most 1024"):
        verify(quoted(b" " * (MAX_CLAIMS_BYTES + 1)))


def test_an_enclave_does_not_claim_what_no_verifier_would_read() -> None:
    """The host passes it a nonce of a megabyte."""
    with pytest.raises(EvidenceError, match="claims document"):
        attest(msgspec.structs.replace(SERVICE, nonce=bytes(10**6)), QUOTER)


# Step 7


def test_a_key_request_is_not_a_service() -> None:
    with pytest.raises(EvidenceError, match="role 'key-request'; expected 'service'"):
        verify(attested(KEY_REQUEST))


def test_a_service_is_not_a_key_request() -> None:
    document = attested(SERVICE)
    with pytest.raises(EvidenceError, match="role 'service'; expected 'key-request'"):
        verify_key_request(
            document.evidence,
            document.claims,
            policy=POLICY,
            now=NOW,
            insecure_allow_emulated=True,
        )


# Step 8


def test_evidence_made_for_another_nonce_is_refused() -> None:
    with pytest.raises(EvidenceError, match="may be old"):
        verify(attested(SERVICE), nonce=b"o" * 32)


def test_evidence_without_a_nonce_is_refused_where_one_is_demanded() -> None:
    with pytest.raises(EvidenceError, match="may be old"):
        verify(attested(msgspec.structs.replace(SERVICE, nonce=None)), nonce=NONCE)


@pytest.mark.parametrize("nonce", [b"", b"short"])
def test_a_nonce_that_is_none_is_the_callers_mistake(nonce: bytes) -> None:
    with pytest.raises(UsageError, match="at least 16 bytes"):
        verify(attested(msgspec.structs.replace(SERVICE, nonce=None)), nonce=nonce)


# Step 9


def test_a_genuine_enclave_of_an_unknown_broker_is_refused() -> None:
    """See test_trust_attacks_release.py for the attack that this stops."""
    with pytest.raises(EvidenceError, match=r"come from broker 6262.*trusted: 7878"):
        verify(attested(SERVICE), brokers={b"x" * 32})


def test_a_client_must_name_a_broker() -> None:
    with pytest.raises(UsageError, match="name the key broker"):
        verify(attested(SERVICE), brokers=set())
