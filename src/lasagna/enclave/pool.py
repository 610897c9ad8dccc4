"""The enclave's memory: pieces of it, never more than the budget in all."""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import BudgetError
from lasagna.units import format_bytes, whole_pages

Memory: TypeAlias = NDArray[np.uint8]
"""Bytes of the enclave's own."""


class Pool:
    """Hands out memory up to a budget. Thread-safe.

    Every piece is a mapping of its own, so that what is given back leaves no hole that only a
    smaller piece fits. Sizes count in whole pages.

    Attributes:
        size: bytes in all.
        used: bytes handed out now, high_water: most at once. Not what is resident: a page is when
            it was first written, and ONNX Runtime's arena lies elsewhere.
    """

    def __init__(self, size: int) -> None:
        """Nothing is handed out."""
        self.size = size
        self.used = 0
        self.high_water = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Memory:
        """Memory of ``size`` bytes, zeros, aligned to a page.

        Raises:
            BudgetError: that is more than is left.
        """
        pages = self._count(size)
        try:
            region = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):  # of a pool that is larger than the machine
            self.give_back(size)
            raise BudgetError(f"the system has no {format_bytes(pages)}") from None
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)  # weights are read end to end: fewer TLB misses
        return np.frombuffer(region, dtype=np.uint8)[:size]

    def buffer(self, size: int) -> bytearray:
        """Zeros in a bytearray: from these ``trust.records`` opens ciphertext.

        Raises:
            BudgetError: that is more than is left.
        """
        pages = self._count(size)
        try:
            return bytearray(size)
        except (MemoryError, OverflowError):
            self.give_back(size)
            raise BudgetError(f"the system has no {format_bytes(pages)}") from None

    def give_back(self, size: int) -> None:
        """A piece of this size is no longer used; it is unmapped with its last reference."""
        with self._lock:
            self.used -= whole_pages(size)
            assert self.used >= 0

    def _count(self, size: int) -> int:
        """Take note of whole pages for so many bytes; how many bytes that is."""
        pages = whole_pages(size)
        with self._lock:
            if self.used + pages > self.size:
                raise BudgetError(
                    f"the enclave has {format_bytes(self.size - self.used)} of its "
                    f"{format_bytes(self.size)} left, not {format_bytes(pages)}"
                )
            self.used += pages
            self.high_water = max(self.high_water, self.used)
        return pages


def address(memory: Memory) -> int:
    """Where a piece of memory begins, for binding tensors to it."""
    return int(memory.ctypes.data)
