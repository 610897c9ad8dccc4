"""Which enclaves are allowed: small policies that raise, composed with AllOf and AnyOf.

A policy returns nothing, so that no caller can forget to look at what it returned. Policies judge
what the processor reports; what the enclave itself claims is the verifier's affair.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Protocol

from lasagna.errors import EvidenceError, UsageError


@dataclass(frozen=True, slots=True)
class Report:
    """What appraised evidence says about an enclave, whatever kind of evidence it was.

    Attributes:
        kind: of the evidence.
        measurement: 32 bytes, of the code (MRENCLAVE).
        signer: 32 bytes, hash of the key that signed the code (MRSIGNER).
        product_id: which of the signer's products.
        svn: its security version number.
        debug: whether a debugger may read the enclave.
        report_data: 64 bytes that the enclave said.
    """

    kind: str
    measurement: bytes
    signer: bytes
    product_id: int
    svn: int
    debug: bool
    report_data: bytes


class Policy(Protocol):
    """A condition on an enclave."""

    def verify(self, report: Report) -> None:
        """Return if the enclave is allowed.

        Raises:
            EvidenceError: it isn't; the message says what was found and what is allowed.
        """
        ...


@dataclass(frozen=True, slots=True, init=False)
class AllOf:
    """Every one of the policies, of which there is at least one."""

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy) -> None:
        _require_some("AllOf", len(policies))
        object.__setattr__(self, "policies", policies)

    def verify(self, report: Report) -> None:
        """Raise what the first policy raises that doesn't allow the enclave."""
        for policy in self.policies:
            policy.verify(report)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf:
    """At least one of the policies."""

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy) -> None:
        _require_some("AnyOf", len(policies))
        object.__setattr__(self, "policies", policies)

    def verify(self, report: Report) -> None:
        """Raise if no policy allows the enclave, with all their reasons."""
        reasons: list[str] = []
        for policy in self.policies:
            try:
                policy.verify(report)
            except EvidenceError as refusal:
                reasons.append(str(refusal))
            else:
                return
        raise EvidenceError("no alternative allows this enclave: " + "; ".join(reasons))


@dataclass(frozen=True, slots=True)
class MeasurementIn:
    """The code is one of these builds: 32-byte MRENCLAVE values."""

    allowed: frozenset[bytes]

    def __post_init__(self) -> None:
        _require_digests("MeasurementIn", self.allowed)

    def verify(self, report: Report) -> None:
        """Compare the measurement."""
        _require_member(
            "measurement",
            report.measurement,
            self.allowed,
            "if the enclave runs the version that you trust, that is what lasagna measure prints",
        )


@dataclass(frozen=True, slots=True)
class SignerIn:
    """One of these signed the code: 32-byte MRSIGNER values.

    A signer's every program, and every version, passes; ask for product and version too.
    """

    allowed: frozenset[bytes]

    def __post_init__(self) -> None:
        _require_digests("SignerIn", self.allowed)

    def verify(self, report: Report) -> None:
        """Compare the signer."""
        _require_member("signer", report.signer, self.allowed)


@dataclass(frozen=True, slots=True)
class ProductIs:
    """The code is this product of its signer."""

    product_id: int

    def verify(self, report: Report) -> None:
        """Compare the product id."""
        if report.product_id != self.product_id:
            raise EvidenceError(
                f"product id {report.product_id} is not allowed; allowed is {self.product_id}"
            )


@dataclass(frozen=True, slots=True)
class MinimumSvn:
    """The code's security version is this or later."""

    svn: int

    def verify(self, report: Report) -> None:
        """Compare the security version number."""
        if report.svn < self.svn:
            raise EvidenceError(
                f"security version {report.svn} is too old; allowed is {self.svn} or later"
            )


@dataclass(frozen=True, slots=True)
class NotDebug:
    """No debugger can read the enclave. The verifier asks this of every enclave, by itself."""

    def verify(self, report: Report) -> None:
        """Refuse a debug enclave."""
        if report.debug:
            raise EvidenceError(
                "a debug enclave is not allowed: its host can read it; allowed are production ones"
            )


def _require_some(name: str, count: int) -> None:
    if not count:
        raise UsageError(f"{name} of nothing would allow every enclave or none: name what is meant")


def _require_digests(name: str, values: frozenset[bytes]) -> None:
    _require_some(name, len(values))
    for value in values:
        if len(value) != 32:
            raise UsageError(f"{name} takes values of 32 bytes; one has {len(value)}")


def _require_member(name: str, found: bytes, allowed: frozenset[bytes], hint: str = "") -> None:
    matches = [hmac.compare_digest(found, value) for value in allowed]
    if not any(matches):
        listed = ", ".join(sorted(value.hex() for value in allowed))
        reason = f"{name} {found.hex()} is not allowed; allowed: {listed}"
        raise EvidenceError(f"{reason} ({hint})" if hint else reason)
