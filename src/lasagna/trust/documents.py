"""Strict JSON documents from outside: a size limit first, then a schema, then nothing else."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from lasagna.errors import TrustError

Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""Exactly 32 bytes; base64 in JSON (RFC 4648, section 4)."""
Bytes64 = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=2**16 - 1)]

_SHOWN: Final = 200
_T = TypeVar("_T")


def decode_document(
    raw: bytes,
    decoder: msgspec.json.Decoder[_T],
    *,
    name: str,
    limit: int,
    error: type[TrustError],
) -> _T:
    """Decode an untrusted document. It returns the document or raises ``error``, nothing else.

    Args:
        raw: the document's bytes.
        decoder: made once for the document's type.
        name: what to call it in the error.
        limit: the largest accepted size, in bytes; checked before parsing.
        error: the class to raise.
    """
    if len(raw) > limit:
        raise error(f"{name} has {len(raw)} bytes; at most {limit} are accepted")
    try:
        return decoder.decode(raw)
    except RecursionError:  # also for what stands in an unknown field
        reason = "it is nested too deeply"
    except ValueError as failure:  # msgspec's errors and UnicodeDecodeError
        # The text names the place and the expected type, not the value: no secret is in it.
        reason = "it is not UTF-8" if isinstance(failure, UnicodeDecodeError) else str(failure)
    # Outside the handler: a UnicodeDecodeError kept as context would hold the whole document.
    raise error(f"{name} is malformed: {reason[:_SHOWN]}")
