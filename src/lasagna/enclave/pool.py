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


class Area:
    """One range of addresses from which an enclave's pools cut their pieces, one after the other.

    What an SGX1 enclave has written stays in the EPC until it is evicted, whether it is used or
    not. A new arrangement in new memory would find the old one's pages there, and thrash: 50 page
    faults a request were measured. Thread-safe under its pool's lock.
    """

    def __init__(self, size: int) -> None:
        """Reserve the addresses; pages come when they are written.

        Args:
            size: bytes. An area that is larger than the machine has no place for anything.
        """
        try:
            self._memory = _map(whole_pages(size))
        except BudgetError:
            self._memory = np.empty(0, dtype=np.uint8)
        self._written = 0
        self.clear()

    def clear(self) -> None:
        """Everything is free: whoever had a piece no longer uses it."""
        self._free = [(0, len(self._memory))]

    def take(self, size: int) -> Memory | None:
        """Zeros, of whole pages; None if no free range is that large.

        The smallest range that will do, so that pins that come and go find each other's places.
        """
        found = min((one for one in self._free if one[1] >= size), key=_length, default=None)
        if found is None or not size:
            return None
        self._free.remove(found)
        begin, length = found
        if length > size:
            self._free.append((begin + size, length - size))
        memory = self._memory[begin : begin + size]
        memory[: max(0, self._written - begin)] = 0
        self._written = max(self._written, begin + size)
        return memory

    def give_back(self, memory: Memory) -> bool:
        """Whether this piece was the area's; then it is free again, with its free neighbours."""
        begin = address(memory) - address(self._memory)
        if not 0 <= begin < len(self._memory):
            return False
        end = begin + whole_pages(len(memory))
        for one in [one for one in self._free if one[0] + one[1] == begin or one[0] == end]:
            self._free.remove(one)
            begin, end = min(begin, one[0]), max(end, one[0] + one[1])
        self._free.append((begin, end - begin))
        return True


class Pool:
    """Hands out memory up to a budget. Thread-safe.

    Sizes count in whole pages. What an area has no place for is a mapping of its own: what is given
    back leaves no hole that makes a budget smaller.

    Attributes:
        size: bytes in all.
        used: bytes handed out now, high_water: most at once. Not what is resident: a page is when
            it was first written, and ONNX Runtime's arena lies elsewhere.
    """

    def __init__(self, size: int, area: Area | None = None) -> None:
        """Nothing is handed out.

        Args:
            size: bytes in all.
            area: where pieces are to lie; the pool that had it before is no longer used.
        """
        self.size = size
        self.used = 0
        self.high_water = 0
        self._lock = threading.Lock()
        self._area = area
        if area is not None:
            area.clear()

    def take(self, size: int) -> Memory:
        """Memory of ``size`` bytes, zeros, aligned to a page.

        Raises:
            BudgetError: that is more than is left.
        """
        pages = whole_pages(size)
        with self._lock:
            self._require(pages)
            memory = self._area.take(pages) if self._area is not None else None
            if memory is None:
                memory = _map(pages)
            self._count(pages)
        return memory[:size]

    def buffer(self, size: int) -> bytearray:
        """Zeros in a bytearray: from these ``trust.records`` opens ciphertext. It stays counted.

        Raises:
            BudgetError: that is more than is left.
        """
        pages = whole_pages(size)
        with self._lock:
            self._require(pages)
            try:
                buffer = bytearray(size)
            except (MemoryError, OverflowError):
                raise _too_much(pages) from None
            self._count(pages)
        return buffer

    def give_back(self, memory: Memory) -> None:
        """A piece is no longer used; a mapping of its own goes with the last reference."""
        with self._lock:
            self.used -= whole_pages(len(memory))
            assert self.used >= 0
            if self._area is not None:
                self._area.give_back(memory)

    def _require(self, pages: int) -> None:
        if self.used + pages > self.size:
            raise BudgetError(
                f"the enclave has {format_bytes(self.size - self.used)} of its "
                f"{format_bytes(self.size)} left, not {format_bytes(pages)}"
            )

    def _count(self, pages: int) -> None:
        self.used += pages
        self.high_water = max(self.high_water, self.used)


def _map(pages: int) -> Memory:
    """A mapping of its own.

    Raises:
        BudgetError: of a pool that is larger than the machine.
    """
    try:
        region = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise _too_much(pages) from None
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        region.madvise(mmap.MADV_HUGEPAGE)  # weights are read end to end: fewer TLB misses
    return np.frombuffer(region, dtype=np.uint8)[:pages]


def _too_much(pages: int) -> BudgetError:
    return BudgetError(f"the system has no {format_bytes(pages)}")


def _length(free: tuple[int, int]) -> tuple[int, int]:
    return free[1], free[0]


def address(memory: Memory) -> int:
    """Where a piece of memory begins, for binding tensors to it."""
    return int(memory.ctypes.data)
