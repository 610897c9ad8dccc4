"""Messages as bytes on the socket between host and enclave.

A frame is a little-endian u32 length and that many bytes of MessagePack. The enclave treats what
comes in as hostile: lengths are limited before anything is decoded, and types are checked.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from lasagna.enclave.messages import Command, Reply
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    InvalidInputError,
    LasagnaError,
    ModelNotFoundError,
    PackageError,
    ProtocolError,
    TrustError,
)
from lasagna.units import KIB, MIB

LENGTH: Final = struct.Struct("<I")
DEFAULT_FRAME_LIMIT: Final = 256 * MIB
SMALL: Final = 64 * KIB
"""What is not longer comes and goes among the small things, outside the plan."""

ERRORS: Final[dict[str, type[LasagnaError]]] = {
    error.__name__: error
    for error in (
        BudgetError,
        EnclaveError,
        InvalidInputError,
        ModelNotFoundError,
        PackageError,
        ProtocolError,
        TrustError,
    )
}

_COMMANDS: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(Command)
_REPLIES: Final[msgspec.msgpack.Decoder[Reply]] = msgspec.msgpack.Decoder(Reply)
_ENCODER: Final = msgspec.msgpack.Encoder()
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for malformed input; it does not wrap errors of UTF-8 in field names."""


def error_kind(error: LasagnaError) -> str:
    """The nearest class of ``ERRORS`` for an error that goes over the socket."""
    return next((c.__name__ for c in type(error).__mro__ if c.__name__ in ERRORS), "EnclaveError")


def encode_frame(message: Command | Reply) -> bytearray:
    """A message with its length in front."""
    frame = bytearray(LENGTH.size)
    _ENCODER.encode_into(message, frame, LENGTH.size)
    LENGTH.pack_into(frame, 0, len(frame) - LENGTH.size)
    return frame


def frame_length(head: bytes | bytearray | memoryview, limit: int) -> int:
    """The length that a frame announces.

    Raises:
        ProtocolError: it exceeds the limit.
    """
    (length,) = LENGTH.unpack(head)
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes; the limit is {limit}")
    return int(length)


def decode_command(body: bytes | bytearray | memoryview) -> Command:
    """Parse a frame's body; records stay views of it.

    Raises:
        ProtocolError: it is not a command.
    """
    try:
        return _COMMANDS.decode(body)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed command: {error}") from None


def decode_reply(body: bytes | bytearray) -> Reply:
    """Parse a frame's body.

    Raises:
        ProtocolError: it is not a reply.
    """
    try:
        return _REPLIES.decode(body)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed reply: {error}") from None
