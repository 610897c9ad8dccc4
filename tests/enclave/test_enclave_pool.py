"""Promise: the enclave's memory never grows, and needs nothing special of the kernel."""

from __future__ import annotations

import mmap

import pytest

from lasagna.enclave.pool import Pool, address, aligned
from lasagna.errors import BudgetError
from lasagna.package.format import WEIGHT_ALIGNMENT


def test_pieces_are_aligned_and_never_more_than_there_is() -> None:
    pool = Pool(1000)
    pieces = [pool.take(100), pool.take(1), pool.take(300)]
    assert [piece.size for piece in pieces] == [100, 1, 300]
    assert all(address(piece) % WEIGHT_ALIGNMENT == 0 for piece in pieces)
    assert pool.high_water == aligned(aligned(100) + 1) + 300
    with pytest.raises(BudgetError, match="the pool of 1000 bytes has 488 left, not 500"):
        pool.take(500)


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # madvise(2): EINVAL, as where it is not built
    assert Pool(1000).take(10).size == 10
