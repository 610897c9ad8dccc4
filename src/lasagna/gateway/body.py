"""Reading a request's body: at most so many bytes, decompressed or not, in so much time."""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from starlette.requests import Request

from lasagna.errors import InvalidInputError
from lasagna.units import MIB, format_bytes

ENCODINGS: Final = ("gzip", "deflate")
_AUTO: Final = zlib.MAX_WBITS | 32
"""Reads both gzip (RFC 1952) and zlib (RFC 1950, which is what HTTP calls deflate)."""
_DRAINED_BYTES: Final = 64 * MIB
"""Of a body that is too long so much is still read, and dropped."""
COMPRESS_FROM: Final = 1024
"""Shorter answers are sent as they are."""


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body, decompressed.

    Args:
        request: whose body nobody has read yet.
        limit: bytes, of what is sent and of what it decompresses to.
        timeout_s: in which all of it must arrive.

    Raises:
        InvalidInputError: it is too long, too slow, or not encoded as it says.
        ClientDisconnect: the client went away.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", *ENCODINGS):
        raise InvalidInputError(
            f"the body's encoding is {encoding!r}; accepted are {', '.join(ENCODINGS)}, or none"
        )
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > limit + _DRAINED_BYTES:
                    break
                else:
                    # A client still sends: it reads the answer only when it gets rid of the rest.
                    parts.clear()
    except TimeoutError:
        raise InvalidInputError(f"the body did not arrive within {timeout_s:g} s") from None
    if size > limit:
        raise _too_long(limit)
    body = b"".join(parts)  # once: a growing buffer would be copied again and again
    return decompress(body, limit) if encoding in ENCODINGS else body


def decompress(body: bytes, limit: int) -> bytes:
    """Decompress gzip or zlib.

    Property: any bytes give at most ``limit`` bytes or ``InvalidInputError``.

    Raises:
        InvalidInputError: it is too long, damaged, cut off, or followed by something else.
    """
    engine = zlib.decompressobj(_AUTO)
    try:
        plain = engine.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidInputError("the body is not compressed as it says") from None
    if len(plain) > limit:
        raise _too_long(limit)
    if not engine.eof or engine.unused_data:
        raise InvalidInputError("the compressed body is cut off, or something follows it")
    return plain


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Compress an answer if the client accepts it and it is worth it.

    Args:
        body: not sealed; ciphertext does not get shorter.
        accepted: the header ``Accept-Encoding`` (RFC 9110, section 12.5.3), without regard for
            weights but 0.

    Returns:
        The body to send, and its encoding if it has one.
    """
    if len(body) < COMPRESS_FROM:
        return body, None
    wanted = {}
    for offer in accepted.lower().split(","):
        name, _, weight = offer.partition(";")
        wanted[name.strip()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    for encoding in ENCODINGS:
        if wanted.get(encoding, wanted.get("*", False)):
            bits = zlib.MAX_WBITS | 16 if encoding == "gzip" else zlib.MAX_WBITS
            engine = zlib.compressobj(wbits=bits)
            return engine.compress(body) + engine.flush(), encoding
    return body, None


def _too_long(limit: int) -> InvalidInputError:
    return InvalidInputError(
        f"the body is too long: at most {limit} bytes ({format_bytes(limit)}) are accepted here"
    )
