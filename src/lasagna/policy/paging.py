"""Enclave memory that is left to the kernel: what the baselines pay that keep no budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HOT_BYTES: Final = 8_000_000
"""Code and data of a serving process that it touches all the time."""


@dataclass(frozen=True, slots=True)
class Paging:
    """An EPC whose pages the kernel swaps.

    Attributes:
        epc_bytes: of enclave memory that can be resident.
        page_s: seconds of one page's load and of the eviction that makes room for it.
        hot_bytes: of the process that stay resident.
    """

    epc_bytes: int
    page_s: float
    hot_bytes: int = HOT_BYTES

    @property
    def room_bytes(self) -> int:
        """For models."""
        return self.epc_bytes - self.hot_bytes
