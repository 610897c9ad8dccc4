"""A program whose memory accesses are known, for ``make bench-epc``: run under the EPC emulator.

``python -m lasagna.bench.epc_patterns BYTES`` answers lines on standard input: ``PATTERN THREADS``
touches every page once and writes the seconds that it took.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Final

import numpy as np

from lasagna.units import PAGE

PATTERNS: Final = ("in order", "backwards", "four streams", "shuffled", "random")
"""``shuffled`` is one random order, the same every time; ``random`` is another one each time."""


def order(pattern: str, pages: int, seed: int) -> np.ndarray:
    """In which order the pages are touched.

    Args:
        pattern: one of ``PATTERNS``.
        pages: how many.
        seed: of this time.
    """
    plain = np.arange(pages)
    if pattern == "backwards":
        return plain[::-1].copy()
    if pattern == "four streams":
        return plain.reshape(4, -1).T.reshape(-1).copy()
    if pattern == "shuffled":
        return np.random.default_rng(0).permutation(pages)
    if pattern == "random":
        return np.random.default_rng(seed).permutation(pages)
    return plain


def main() -> None:
    """Answer lines until the input ends."""
    pages = int(sys.argv[1]) // PAGE // 8 * 8
    memory = np.ones(pages * PAGE, np.uint8)
    for number, line in enumerate(sys.stdin):
        pattern, _, count = line.strip().rpartition(" ")
        threads = int(count)
        # Each thread has a part of its own; NumPy releases the lock while it gathers.
        parts = [
            part[0] * PAGE + order(pattern, len(part), number) * PAGE
            for part in np.split(np.arange(pages), threads)
        ]
        workers = [threading.Thread(target=memory.take, args=(part,)) for part in parts]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        sys.stdout.write(f"{time.perf_counter() - begin}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
