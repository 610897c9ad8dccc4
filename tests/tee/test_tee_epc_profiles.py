"""Promise: every charge of the emulator is a published figure, at the end of its range that was
asked for, and what is not known is refused by name."""

from __future__ import annotations

import pytest

from lasagna.errors import LasagnaError, UsageError
from lasagna.tee import epc
from lasagna.tee.epc_profiles import ENDS, profile, profiles


def test_every_profile_has_ordered_ranges_and_sources() -> None:
    assert set(profiles()) == {"none", "sgx1-128", "sgx1-256", "sgx2-512", "sgx2-icelake"}
    for one in profiles().values():
        for field in one.__struct_fields__[1:]:
            figure = getattr(one, field)
            assert figure.at("low") <= figure.at("typical") <= figure.at("high"), field
            assert figure.source
        assert one.costs().epc_bytes == one.costs().limit_pages * 4096


def test_sgx1_as_published() -> None:
    """SGX-COSTS: 23,936 pages; a fault and a page-in are 40,000 cycles at 3.5 GHz."""
    typical = profile("sgx1-128").costs()
    assert typical.limit_pages == 23_936
    assert typical.load_ns == pytest.approx(40_000 / 3.5, rel=0.02)
    loads = [profile("sgx1-128").costs(end).load_ns for end in ENDS]
    assert loads == sorted(loads)
    assert loads[0] < loads[-1]


def test_a_profile_like_another_differs_in_size_only() -> None:
    small, large = profile("sgx1-128").costs(), profile("sgx1-256").costs()
    assert large.epc_bytes == 198_705_152
    assert (small.load_ns, small.evict_ns) == (large.load_ns, large.evict_ns)


def test_unknown_profiles_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no profile 'sgx3'; there are: none, sgx1-128"):
        profile("sgx3")


@pytest.mark.parametrize("pages", [0, 255, 2**40])
def test_limits_out_of_range_are_refused(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="the limit must be"):
        epc.emulator_environment(profile("none").costs(), limit_pages=pages)


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epc, "_FILE", "no-such-library.so")
    with pytest.raises(LasagnaError, match="apt install libssl-dev"):
        epc.emulator_library()
