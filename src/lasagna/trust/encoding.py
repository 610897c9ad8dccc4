"""Unambiguous bytes: what is hashed, signed, authenticated or derived from is encoded here."""

from __future__ import annotations

from typing import Final

U32_MAX: Final = 2**32 - 1


def u32(value: int) -> bytes:
    """Four bytes, big-endian."""
    return value.to_bytes(4, "big")


def canonical(label: str, *fields: bytes) -> bytes:
    """Encode a label and fields: distinct lists have distinct bytes, none a prefix of another.

    Layout: for the label (UTF-8) and then each field, a four-byte big-endian length and the bytes,
    all behind a four-byte count. Reading it back is deterministic, hence it is injective. The label
    separates domains: bytes made for one purpose are never valid for another (RFC 5869, section
    3.2, on the `info` input).
    """
    parts = [u32(1 + len(fields))]
    for part in (label.encode(), *fields):
        parts += (u32(len(part)), part)
    return b"".join(parts)
