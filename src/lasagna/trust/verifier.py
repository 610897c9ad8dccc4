"""Believe an enclave's claims, or raise.

The steps, each of which raises :class:`EvidenceError`:

1. The evidence is small, well-formed and of a known kind.
2. It is appraised: a quote's signatures, revocations and dates are checked, which gives a report.
   Emulated evidence is refused, unless the caller's code allows it by name.
3. The enclave is not a debug enclave.
4. The caller's policy allows it.
5. The report data is the hash of the claims: the enclave said them.
6. The claims are small and well-formed; they are parsed only now.
7. They are of the role that is expected.
8. They hold the caller's nonce, if there is one.
9. Of a service: a broker that the caller trusts released its secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Set as AbstractSet
from typing import Final, NewType, TypeVar, assert_never

from lasagna.errors import EvidenceError, UsageError
from lasagna.trust.evidence import (
    CHALLENGE_MIN_BYTES,
    Claims,
    Evidence,
    InsecureEmulatedEvidence,
    KeyRequestClaims,
    ServiceClaims,
    decode_claims,
    decode_evidence,
    report_data_of,
)
from lasagna.trust.policy import NotDebug, Policy, Report

UnixSeconds = NewType("UnixSeconds", int)
"""A time, in seconds since 1970-01-01 UTC."""

_ROLE_OF: Final = {ServiceClaims: "service", KeyRequestClaims: "key-request"}
_C = TypeVar("_C", ServiceClaims, KeyRequestClaims)


def verify_service(
    evidence: bytes,
    claims: bytes,
    *,
    policy: Policy,
    brokers: AbstractSet[bytes],
    now: UnixSeconds,
    nonce: bytes | None = None,
    insecure_allow_emulated: bool = False,
) -> ServiceClaims:
    """A client's check before it seals an input to a service.

    Args:
        evidence: as received.
        claims: as received.
        policy: which enclaves may read the input.
        brokers: Ed25519 public keys (32 bytes) of the key brokers whose services the client trusts.
            A genuine enclave serves any broker; this says whose secret it may hold.
        now: for the dates in quotes and their collateral.
        nonce: demands evidence made for it.
        insecure_allow_emulated: accept evidence that anyone can write. It protects nothing.

    Returns:
        The claims: seal to their ``public_key``.

    Raises:
        EvidenceError: a step failed.
        UsageError: no broker is named, or the nonce is too short to be one.
    """
    if not brokers:
        raise UsageError("name the key broker whose services are trusted")
    service = _verify(ServiceClaims, evidence, claims, policy, now, nonce, insecure_allow_emulated)
    # 9. A trusted broker released the service's secret.
    if not any(hmac.compare_digest(service.broker, broker) for broker in brokers):
        listed = ", ".join(sorted(broker.hex() for broker in brokers))
        raise EvidenceError(
            f"the service's keys come from broker {service.broker.hex()}; trusted: {listed}"
        )
    return service


def verify_key_request(
    evidence: bytes,
    claims: bytes,
    *,
    policy: Policy,
    now: UnixSeconds,
    nonce: bytes | None = None,
    insecure_allow_emulated: bool = False,
) -> KeyRequestClaims:
    """A key broker's check before it releases a package's keys; arguments as above.

    Returns:
        The claims: seal the keys of their ``package_id`` to their ``public_key``.

    Raises:
        EvidenceError: a step failed.
    """
    return _verify(KeyRequestClaims, evidence, claims, policy, now, nonce, insecure_allow_emulated)


def _verify(
    role: type[_C],
    evidence_bytes: bytes,
    claims_bytes: bytes,
    policy: Policy,
    now: UnixSeconds,
    nonce: bytes | None,
    insecure_allow_emulated: bool,
) -> _C:
    if nonce is not None and len(nonce) < CHALLENGE_MIN_BYTES:
        raise UsageError(f"a nonce has at least {CHALLENGE_MIN_BYTES} bytes, not {len(nonce)}")
    # 1. Evidence of a known kind.
    evidence = decode_evidence(evidence_bytes)
    # 2. Its appraisal.
    report = _appraise(evidence, now, insecure_allow_emulated)
    # 3. Not a debug enclave.
    NotDebug().verify(report)
    # 4. An enclave that the caller allows.
    policy.verify(report)
    # 5. The enclave said these claims.
    if not hmac.compare_digest(report.report_data, report_data_of(claims_bytes)):
        raise EvidenceError("the evidence was made for other claims than these")
    # 6. The claims themselves.
    claims: Claims = decode_claims(claims_bytes)
    # 7. Their role.
    if not isinstance(claims, role):
        raise EvidenceError(
            f"the claims are of role {_ROLE_OF[type(claims)]!r}; expected {_ROLE_OF[role]!r}"
        )
    # 8. Freshness.
    if nonce is not None and not hmac.compare_digest(claims.nonce or b"", nonce):
        raise EvidenceError("the evidence was not made for this nonce: it may be old")
    return claims


def _appraise(evidence: Evidence, now: UnixSeconds, insecure_allow_emulated: bool) -> Report:
    """Evidence in, what it proves out. ``now`` is for kinds with dates; emulated has none."""
    match evidence:
        case InsecureEmulatedEvidence(quote):
            if not insecure_allow_emulated:
                raise EvidenceError(
                    "the evidence is emulated: no processor vouches for it, anyone can write it. "
                    "Only insecure_allow_emulated (--insecure-allow-emulated) accepts that"
                )
            return Report(
                kind="insecure-emulated",
                measurement=quote.measurement,
                signer=quote.signer,
                product_id=quote.product_id,
                svn=quote.svn,
                debug=quote.debug,
                report_data=quote.report_data,
            )
        case _:
            assert_never(evidence)
