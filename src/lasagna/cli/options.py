"""Options that several commands share, and what becomes of their values."""

from __future__ import annotations

import errno
import socket
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


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens for TCP connections.

    Raises:
        UsageError: there is no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        hint = ": stop what uses it, or give another --port" if taken else ""
        raise UsageError(f"can't listen on {host}, port {port}: {error}{hint}") from None
    # Connections inherit it. asyncio sets it only for sockets whose protocol number it was told,
    # and an answer in two writes then waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _digest(option: str, text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != _BYTES:
        raise UsageError(f"{option} takes {2 * _BYTES} hexadecimal digits, not {text[:80]!r}")
    return raw
