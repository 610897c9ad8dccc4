"""Which slices to keep in memory, so that loading the others costs least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

STEPS: Final = 12
"""Halvings in the search for a rate, beyond which pins hardly change."""
HIGHEST: Final = 64
"""Doublings after which no rate is high enough."""


def choose_pinned(
    sizes: Sequence[int], times: Sequence[float], room: int, ring: int
) -> frozenset[int]:
    """Which slices to keep so that loading the others hides behind computing.

    Slices run in a cycle and are loaded ahead by as much as the ring holds. While slices compute,
    credit grows with the bytes that could be loaded meanwhile, up to the ring; a slice is streamed
    when the credit covers it, else pinned. The smallest rate of credit that pins no more than fits
    spreads what must be streamed evenly over the cycle, so no stretch of it waits for the loader.
    (An LRU cache would miss on every slice of a cycle that exceeds it.)

    Args:
        sizes: bytes of all slices, in order.
        times: seconds that each computes.
        room: bytes for pinned weights.
        ring: bytes of the ring.

    Returns:
        Numbers of the slices to pin; their weights take at most ``room`` bytes.
    """
    low, high = 0.0, sum(sizes) / max(sum(times), 1e-12)  # a turn's bytes in a turn's time
    for _ in range(HIGHEST):
        if sum(sizes[n] for n in _pins(sizes, times, high, ring)) <= room:
            break
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = sum(sizes[n] for n in _pins(sizes, times, middle, ring)) <= room
        low, high = (low, middle) if fits else (middle, high)
    chosen = _pins(sizes, times, high, ring)
    left = room - sum(sizes[n] for n in chosen)
    if left < 0:  # no rate is high enough: a slice larger than the ring can't be streamed ahead
        chosen, left = set(), room
    for number in sorted(set(range(len(sizes))) - chosen, key=lambda n: (-sizes[n], n)):
        if sizes[number] <= left:
            chosen.add(number)
            left -= sizes[number]
    return frozenset(chosen)


def _pins(sizes: Sequence[int], times: Sequence[float], rate: float, ring: int) -> set[int]:
    """Slices that the credit does not cover; the second turn of the cycle counts."""
    credit, most, pins = 0.0, float(ring), list[int]()
    for turn in range(2):
        for number, (size, seconds) in enumerate(zip(sizes, times, strict=True)):
            if credit >= size:
                credit -= size
            elif turn:
                pins.append(number)
            credit += rate * seconds
            if credit > most:  # not min(): this is asked for every slice, some ten thousand times
                credit = most
    return set(pins)
