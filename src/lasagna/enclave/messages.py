"""What host and enclave say to each other over their socket.

A frame is a little-endian u32 length and that many bytes of MessagePack: one ``Command`` (host to
enclave) or one ``Reply`` (enclave to host). A reply carries the ``id`` of its command; replies may
come in another order than the commands. The enclave speaks first, with ``Hello``.

Everything here is public to the host: ids, sizes, times, sealed bytes. The enclave treats what
comes in as hostile: lengths are limited before anything is decoded, and types are checked.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

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
from lasagna.units import MIB

LENGTH: Final = struct.Struct("<I")
PROTOCOL_VERSION: Final = 1
DEFAULT_FRAME_LIMIT: Final = 256 * MIB

_Id = Annotated[int, Meta(ge=0, le=2**53)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Path = Annotated[str, Meta(min_length=1, max_length=4096)]
_Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    id: _Id


class Attest(_Message, frozen=True, tag="attest"):
    """Ask for evidence that binds the service's public key to this enclave. Reply: Attested."""

    nonce: bytes | None = None


class RequestKeys(_Message, frozen=True, tag="request-keys"):
    """Open a package and ask for its keys. Reply: KeysRequested, to relay to the key broker."""

    path: _Path


class Load(_Message, frozen=True, tag="load"):
    """Make the package of the last RequestKeys ready to run. Reply: Loaded.

    ``max_batch`` is a wish: the plan takes the largest batch up to it that fits the budget.
    Without ``pin`` every slice is streamed, which takes the least memory. ``vanilla`` is the
    baseline: an ordinary session of the whole model, whatever memory it takes.
    """

    grant: bytes
    max_batch: Annotated[int, Meta(ge=1, le=4096)]
    pin: bool = True
    vanilla: bool = False


class SealedRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request: its capsule, and a record for every row of every input (or live tensor)."""

    request_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    capsule: Annotated[bytes, Meta(max_length=4096)]
    rows: Annotated[int, Meta(ge=1, le=4096)]
    records: tuple[tuple[memoryview, ...], ...]


class Infer(_Message, frozen=True, tag="infer"):
    """Run slices first..last (exclusive) on rows of some requests, as one batch. Reply: Inferred.

    With ``first`` > 0 the records are the activations that cross that cut; with ``last`` below the
    number of slices, activations come back. 0 for ``last`` means to the end.
    """

    model: _Digest
    requests: Annotated[tuple[SealedRows, ...], Meta(min_length=1, max_length=4096)]
    first: Annotated[int, Meta(ge=0, le=2**20)] = 0
    last: Annotated[int, Meta(ge=0, le=2**20)] = 0


class GetStats(_Message, frozen=True, tag="get-stats"):
    """Ask for counters. Reply: Stats."""


class Stop(_Message, frozen=True, tag="stop"):
    """Finish what runs, then exit. Reply: Stopped."""


Command: TypeAlias = Attest | RequestKeys | Load | Infer | GetStats | Stop


class Hello(_Message, frozen=True, tag="hello"):
    """First frame after connecting (id 0).

    ``block`` is the NCHWc block of this processor's kernels, which decides the variant it runs.
    """

    version: int
    budget_bytes: _Count
    compute_threads: int
    intra_op_threads: int
    block: int
    insecure_emulated: bool


class Attested(_Message, frozen=True, tag="attested"):
    """Evidence and claims, for ``trust.verifier.verify_service``."""

    document: bytes


class KeysRequested(_Message, frozen=True, tag="keys-requested"):
    """What the key broker needs to release the keys of a package."""

    request: bytes
    package_id: bytes
    name: str


class PlanFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model was fitted into the budget. All sizes in bytes."""

    variant: str
    slices: int
    pinned_slices: tuple[int, ...]
    weight_bytes: _Count
    pinned_bytes: _Count
    ring_slots: int
    slot_bytes: _Count
    activation_bytes: _Count
    """For all compute threads together."""
    input_bytes: _Count
    """Staging memory for inputs of requests that wait; 0 when inputs go to the activations."""
    staging_bytes: _Count
    """Ciphertext on its way to be decrypted."""
    workspace_bytes: _Count
    session_bytes: _Count
    """Room for weights that sessions hold packed, for all compute threads; 0 where they don't."""
    max_batch: int
    sessions: int
    total_bytes: _Count


class Loaded(_Message, frozen=True, tag="loaded"):
    """The model is ready."""

    model: _Digest
    name: str
    plan: PlanFacts
    load_s: float


class InferResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records by output (or live tensor) and row; or an error of one request of the batch."""

    records: tuple[tuple[bytes, ...], ...] = ()
    error: str = ""
    kind: str = ""


class Timings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds spent on one Infer, each counted once.

    ``wait_s`` is for a compute thread, ``stall_s`` for weights that were not there yet, on the
    thread that ran it.
    """

    open_s: float
    wait_s: float
    compute_s: float
    stall_s: float
    seal_s: float


class Inferred(_Message, frozen=True, tag="inferred"):
    """Results in the order of the requests."""

    results: tuple[InferResult, ...]
    timings: Timings


class Stats(_Message, frozen=True, tag="stats"):
    """Counters since the enclave started. Times in seconds, of all threads; sizes in bytes.

    ``pool_high_water`` is what was handed out of the pool (see ``enclave.pool.Pool``), not what is
    resident.
    """

    pool_bytes: _Count
    pool_high_water: _Count
    workspace_bytes: _Count
    entries: _Count
    requests: _Count
    rows: _Count
    slice_runs: _Count
    loads: _Count
    loaded_bytes: _Count
    load_s: float
    compute_s: float
    stall_s: float
    open_s: float
    seal_s: float


class Stopped(_Message, frozen=True, tag="stopped"):
    """Nothing runs any more; the process exits."""


class Failed(_Message, frozen=True, tag="failed"):
    """A command could not be carried out; ``kind`` is an error class of ``ERRORS``."""

    kind: str
    message: str


Reply: TypeAlias = Hello | Attested | KeysRequested | Loaded | Inferred | Stats | Stopped | Failed

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


def frame_length(head: bytes | bytearray, limit: int) -> int:
    """The length that a frame announces.

    Raises:
        ProtocolError: it exceeds the limit.
    """
    (length,) = LENGTH.unpack(head)
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes; the limit is {limit}")
    return int(length)


def decode_command(body: bytes | bytearray) -> Command:
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
