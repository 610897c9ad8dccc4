"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from lasagna.errors import UsageError

_BYTES = 32

AllowMeasurement = Annotated[
    list[str],
    typer.Option(
        help="Measurement of an enclave that is allowed (lasagna measure); may be repeated."
    ),
]
InsecureAllowEmulated = Annotated[
    bool,
    typer.Option(
        "--insecure-allow-emulated", help="Accept enclaves without SGX, which protect nothing."
    ),
]


def digests_of(option: str, values: Sequence[str]) -> frozenset[bytes]:
    """Values of 32 bytes in hexadecimal digits.

    Raises:
        UsageError: there is none, or one is something else.
    """
    if not values:
        raise UsageError(f"{option} is needed: {2 * _BYTES} hexadecimal digits")
    return frozenset(_digest(option, value) for value in values)


def _digest(option: str, text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != _BYTES:
        raise UsageError(f"{option} takes {2 * _BYTES} hexadecimal digits, not {text[:80]!r}")
    return raw
