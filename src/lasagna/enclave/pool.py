"""The enclave's memory: one region of fixed size, handed out in aligned pieces."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import BudgetError

ALIGNMENT: Final = 64


class Pool:
    """A region that never grows.

    Attributes:
        size: bytes in all.
        high_water: most bytes ever handed out at once.
    """

    def __init__(self, size: int) -> None:
        """Reserve the region; pages become resident when they are first written."""
        self.size = size
        self.high_water = 0
        self._used = 0
        region = mmap.mmap(
            -1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        region.madvise(mmap.MADV_HUGEPAGE)  # weights are read end to end: fewer TLB misses
        self._memory = np.frombuffer(region, dtype=np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """The next ``size`` bytes, aligned to a cache line.

        Raises:
            BudgetError: the plan was wrong; the pool has less than that left.
        """
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > self.size:
            raise BudgetError(
                f"the pool of {self.size} bytes has {self.size - start} left, not {size}"
            )
        self._used = start + size
        self.high_water = max(self.high_water, self._used)
        return self._memory[start : start + size]


def address(memory: NDArray[np.uint8]) -> int:
    """Where a piece of memory begins, for binding tensors to it."""
    return int(memory.ctypes.data)
