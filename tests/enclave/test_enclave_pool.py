"""Promise: the enclave's memory never grows beyond its budget, what is given back can be had again,
and it needs nothing special of the kernel."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.enclave.pool import Area, Memory, Pool, address
from lasagna.errors import BudgetError
from lasagna.units import PAGE, whole_pages


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
    piece = pool.take(PAGE)
    piece[:] = 7
    pool.give_back(piece)
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


def test_pools_that_follow_each_other_use_the_same_pages() -> None:
    """An enclave can't give pages back: in new memory an arrangement would find the EPC full."""
    area = Area(8 * PAGE)
    first = Pool(8 * PAGE, area)
    before = [first.take(3 * PAGE), first.take(5 * PAGE)]
    for piece in before:
        piece[:] = 7
    second = Pool(8 * PAGE, area)
    after = [second.take(6 * PAGE), second.take(2 * PAGE)]
    assert pages_of(before) == pages_of(after)
    assert not any(piece.any() for piece in after)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * PAGE), st.integers(0, 9)), max_size=60))
def test_pieces_of_an_area_are_zeros_never_overlap_and_never_run_out_early(
    steps: list[tuple[bool, int, int]],
) -> None:
    pool, held = Pool(16 * PAGE, Area(16 * PAGE)), list[Memory]()
    for take, size, which in steps:
        if take and pool.used + whole_pages(size) <= pool.size:
            piece = pool.take(size)
            assert piece.size == size
            assert not piece.any()
            piece[:] = 1 + len(held) % 200
            held.append(piece)
        elif held:
            pool.give_back(held.pop(which % len(held)))
        assert (
            len(pages_of(held))
            == pool.used // PAGE
            == sum(whole_pages(p.size) // PAGE for p in held)
        )


def test_an_area_larger_than_the_machine_is_none() -> None:
    pool = Pool(PAGE, Area(2**62))
    assert pool.take(PAGE).size == PAGE


def pages_of(pieces: list[Memory]) -> set[int]:
    return {address(p) // PAGE + n for p in pieces for n in range(whole_pages(p.size) // PAGE)}
