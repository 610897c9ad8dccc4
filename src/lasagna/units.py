"""Byte counts: what the code calls them, how people write them, how they are printed."""

from __future__ import annotations

import re
from typing import Final, NewType

from lasagna.errors import UsageError

Bytes = NewType("Bytes", int)
"""A count of bytes."""

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
PAGE: Final = 4096

_FACTORS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> Bytes:
    """Read a size as people write it: ``12MB`` (10^6), ``93.5MiB`` (2^20), ``4096``.

    Raises:
        UsageError: the text is not a size, or its unit is unknown.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"{text!r} is not a size: write a number and one of kB, MB, GB, KiB, MiB, GiB, "
            "for example 12MB or 93.5MiB"
        )
    return Bytes(int(float(match[1]) * factor))


def format_bytes(count: int) -> str:
    """A byte count for people, in decimal units with three digits: ``18.8 MB``."""
    value, units = float(abs(count)), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    sign = "-" if count < 0 else ""
    if units[0] == "B":
        return f"{sign}{int(value)} B"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{sign}{value:.{digits}f} {units[0]}"


def whole_pages(size: int) -> int:
    """The size, rounded up to whole pages: what memory of its own takes."""
    return -(-size // PAGE) * PAGE
