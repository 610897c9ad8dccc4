"""Promise: the enclave's memory never grows beyond its budget, what is given back can be had again,
and it needs nothing special of the kernel."""

from __future__ import annotations

import mmap

import pytest

from lasagna.enclave.pool import Pool, address
from lasagna.errors import BudgetError
from lasagna.units import PAGE


def test_pieces_begin_at_pages_and_are_never_more_than_there_is() -> None:
    pool = Pool(4 * PAGE)
    pieces = [pool.take(100), pool.take(PAGE), pool.take(0), pool.take(PAGE + 1)]
    assert [piece.size for piece in pieces] == [100, PAGE, 0, PAGE + 1]
    assert all(address(piece) % PAGE == 0 for piece in pieces)
    assert pool.used == pool.high_water == 4 * PAGE
    with pytest.raises(BudgetError, match=r"has 0 B of its 16\.4 kB left, not 4\.10 kB"):
        pool.take(1)


def test_what_is_given_back_can_be_had_again_and_is_zeros() -> None:
    pool = Pool(PAGE)
    pool.take(PAGE)[:] = 7
    pool.give_back(PAGE)
    assert not pool.take(10).any()
    assert (pool.used, pool.high_water) == (PAGE, PAGE)


@pytest.mark.parametrize("size", [2**50, 2**62, 2**70])
def test_more_than_the_system_has_is_an_error_like_more_than_the_budget(size: int) -> None:
    """In the vanilla form, which is not held to the budget, the host's numbers decide."""
    pool = Pool(2**80)
    with pytest.raises(BudgetError, match="the system has no"):
        pool.take(size)
    assert pool.used == 0


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # madvise(2): EINVAL, as where it is not built
    assert Pool(PAGE).take(10).size == 10
