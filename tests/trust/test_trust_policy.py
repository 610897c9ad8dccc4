"""Policies raise, say what was found and what is allowed, and never mean 'anything'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasagna.errors import EvidenceError, UsageError
from lasagna.trust.policy import (
    AllOf,
    AnyOf,
    MeasurementIn,
    MinimumSvn,
    NotDebug,
    Policy,
    ProductIs,
    Report,
    SignerIn,
)

REPORT = Report(
    kind="test",
    measurement=b"m" * 32,
    signer=b"s" * 32,
    product_id=7,
    svn=3,
    debug=False,
    report_data=bytes(64),
)
OTHER = frozenset({b"x" * 32, b"y" * 32})
ALLOWING: list[Policy] = [
    MeasurementIn(OTHER | {REPORT.measurement}),
    SignerIn(frozenset({REPORT.signer})),
    ProductIs(7),
    MinimumSvn(3),
    MinimumSvn(0),
    NotDebug(),
]
REFUSING: list[tuple[Policy, str]] = [
    (MeasurementIn(OTHER), f"measurement {'6d' * 32} is not allowed.*{'78' * 32}, {'79' * 32}"),
    (SignerIn(OTHER), f"signer {'73' * 32} is not allowed.*{'78' * 32}, {'79' * 32}"),
    (ProductIs(8), "product id 7 is not allowed; allowed is 8"),
    (MinimumSvn(4), "security version 3 is too old; allowed is 4 or later"),
]


def _name(value: object) -> str:
    """Of a case, the same in every process; the order of a set is not."""
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("policy", ALLOWING, ids=_name)
def test_a_policy_returns_nothing_when_it_allows(policy: Policy) -> None:
    verify: Callable[[Report], object] = policy.verify
    assert verify(REPORT) is None


@pytest.mark.parametrize(("policy", "message"), REFUSING, ids=_name)
def test_a_policy_raises_and_says_why(policy: Policy, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        policy.verify(REPORT)


def test_a_debug_enclave_is_refused() -> None:
    with pytest.raises(EvidenceError, match="its host can read it"):
        NotDebug().verify(replace(REPORT, debug=True))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=4))
def test_all_of_and_any_of_are_what_they_are_called(wanted: list[bool]) -> None:
    policies: list[Policy] = [ProductIs(7 if allows else 8) for allows in wanted]
    for policy, allows in ((AllOf(*policies), all(wanted)), (AnyOf(*policies), any(wanted))):
        if allows:
            policy.verify(REPORT)
        else:
            with pytest.raises(EvidenceError):
                policy.verify(REPORT)


def test_policies_nest() -> None:
    ours = AllOf(SignerIn(frozenset({REPORT.signer})), ProductIs(7), MinimumSvn(2))
    AnyOf(MeasurementIn(OTHER), ours).verify(REPORT)


def test_any_of_gives_every_reason() -> None:
    with pytest.raises(EvidenceError, match=r"product id 7.*; security version 3"):
        AnyOf(ProductIs(8), MinimumSvn(4)).verify(REPORT)


@pytest.mark.parametrize("make", [AllOf, AnyOf])
def test_a_combination_of_nothing_is_refused(make: Callable[[], Policy]) -> None:
    with pytest.raises(UsageError, match="of nothing"):
        make()


@pytest.mark.parametrize("make", [MeasurementIn, SignerIn])
def test_an_empty_list_of_the_allowed_is_refused(
    make: Callable[[frozenset[bytes]], Policy],
) -> None:
    with pytest.raises(UsageError, match="of nothing"):
        make(frozenset())
    with pytest.raises(UsageError, match="32 bytes; one has 31"):
        make(frozenset({bytes(32), bytes(31)}))
