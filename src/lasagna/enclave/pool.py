"""The enclave's memory: one region of fixed size, handed out in aligned pieces."""

from __future__ import annotations

import contextlib
import mmap
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import BudgetError
from lasagna.package.format import WEIGHT_ALIGNMENT

Memory: TypeAlias = NDArray[np.uint8]
"""Bytes of the enclave's own."""


class Pool:
    """A region that never grows.

    Attributes:
        size: bytes in all.
        high_water: most bytes ever handed out at once. Pieces are never given back, so once the
            model is loaded this is what the plan reserved. It is not what is resident: a page is
            when it was first written, and ONNX Runtime's arena lies elsewhere.
    """

    def __init__(self, size: int) -> None:
        """Reserve the region; pages become resident when they are first written."""
        self.size = size
        self.high_water = 0
        self._used = 0
        region = mmap.mmap(
            -1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)  # weights are read end to end: fewer TLB misses
        self._memory = np.frombuffer(region, dtype=np.uint8)

    def take(self, size: int) -> Memory:
        """The next ``size`` bytes, aligned to a cache line.

        Raises:
            BudgetError: the plan was wrong; the pool has less than that left.
        """
        start = aligned(self._used)
        if start + size > self.size:
            raise BudgetError(
                f"the pool of {self.size} bytes has {self.size - start} left, not {size}"
            )
        self._used = start + size
        self.high_water = max(self.high_water, self._used)
        return self._memory[start : start + size]


def aligned(size: int) -> int:
    """The size, rounded up to whole cache lines."""
    return -(-size // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT


def address(memory: Memory) -> int:
    """Where a piece of memory begins, for binding tensors to it."""
    return int(memory.ctypes.data)
