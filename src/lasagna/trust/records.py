"""Sealed records: one row of one tensor, readable only where it belongs.

::

    record = version (1 byte) | nonce (12) | AES-256-GCM ciphertext | tag (16)

The associated data (:class:`RecordContext`) names the only place where the record opens. So whoever
moves records can delay or drop them, but not read, change, mix up or replay them elsewhere.

Nonces are random, 96 bits, drawn by the caller for every sealing (NIST SP 800-38D, section 8.2.2).
They are not made from the context: a task that is retried in a batch of another size gives slightly
different activations, and two plaintexts under one nonce would reveal both and the authentication
key. Section 8.3 allows 2^32 records under one key; one part of a Run makes at most
``MAX_RECORDS_PER_REQUEST`` of them (:func:`require_record_budget`), so 4096 of a request are within
it. Nothing counts across Runs: a host that repeats a task at will can go beyond, and
docs/reference/records.md says how far it would have to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, Self

from cryptography.exceptions import InvalidTag

from lasagna.errors import RecordError, UsageError
from lasagna.trust.encoding import U32_MAX, canonical, u32
from lasagna.trust.keys import Direction, RecordKey
from lasagna.trust.request import RequestScope
from lasagna.units import GIB

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc.Buffer from Python 3.12 on

RECORD_VERSION: Final = 1
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
HEADER_BYTES: Final = 1 + NONCE_BYTES
RECORD_OVERHEAD: Final = HEADER_BYTES + TAG_BYTES
"""A record is this many bytes (29) longer than its row."""

MAX_RECORDS_PER_REQUEST: Final = 2**20
MAX_ROWS: Final = 2**12
MAX_ROW_BYTES: Final = GIB
MAX_RANK: Final = 8
MAX_NAME_BYTES: Final = 256

ITEM_BYTES: Final = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
"""Bytes of one element, by NumPy's name of the type: all types that tensors can have."""


class RowSpec(Protocol):
    """A tensor's rows as somebody describes them; the fields are those of ``RecordContext``."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def row_shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordContext:
    """Where the rows of one tensor of one request belong; make it once, use it for every row.

    Attributes:
        scope: service, model and request.
        direction: input, activation or output.
        tensor: its name in the model's graph.
        dtype: NumPy's name of the element type, a key of ``ITEM_BYTES``.
        row_shape: the shape of one row, its leading dimension included, such as
            ``(1, 3, 224, 224)``; see ``package.format.TensorSpec``.
        rows: of the whole request, at most ``MAX_ROWS``.
        variant: of activations only, where it is required: the layout the model was optimised for
            (an AVX-512 server can't go on with an AVX2 server's activations).
        boundary: of activations only: the number of the cut between two slices.
        row_bytes: bytes of one row's plaintext.
        aad_prefix: the part of the associated data that all rows share.

    Raises:
        RecordError: a field is out of its range.
    """

    scope: RequestScope
    direction: Direction
    tensor: str
    dtype: str
    row_shape: tuple[int, ...]
    rows: int
    variant: str = ""
    boundary: int = 0
    row_bytes: int = field(init=False, compare=False)
    aad_prefix: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise RecordError(f"a request has 1 to {MAX_ROWS} rows, not {self.rows}")
        if not 0 <= self.boundary <= U32_MAX:
            raise RecordError(f"a boundary is a number from 0 to 2^32 - 1, not {self.boundary}")
        size = require_sealable(self.tensor, self.dtype, self.row_shape)
        if self.direction is Direction.ACTIVATION:
            if not self.variant:
                raise RecordError("activations name the variant of the model they come from")
        elif self.variant or self.boundary:
            raise RecordError(f"{self.direction} records have neither a variant nor a boundary")
        object.__setattr__(self, "row_bytes", size)
        object.__setattr__(self, "aad_prefix", self._encode())

    @classmethod
    def of(
        cls,
        scope: RequestScope,
        direction: Direction,
        spec: RowSpec,
        rows: int,
        *,
        variant: str = "",
        boundary: int = 0,
    ) -> Self:
        """The context of a tensor that is described elsewhere.

        Raises:
            RecordError: a field is out of its range.
        """
        return cls(
            scope=scope,
            direction=direction,
            tensor=spec.name,
            dtype=spec.dtype,
            row_shape=spec.row_shape,
            rows=rows,
            variant=variant,
            boundary=boundary,
        )

    @property
    def called(self) -> str:
        """What errors call it. Names inside the network are secret, those at its ends are not."""
        if self.direction is Direction.ACTIVATION:
            return f"an activation at cut {self.boundary}"
        return f"{self.direction} {self.tensor!r}"

    @property
    def record_bytes(self) -> int:
        """Bytes of one sealed row."""
        return self.row_bytes + RECORD_OVERHEAD

    def _encode(self) -> bytes:
        # Eight fields, always: with the row's four bytes behind them it is still unambiguous.
        return canonical(
            "lasagna/v1/record",
            self.direction.encode(),
            self.scope.service_id + self.scope.model_digest + self.scope.request_id,  # fixed sizes
            _name_bytes("variant", self.variant),
            u32(self.boundary),
            _name_bytes("tensor", self.tensor),
            self.dtype.encode(),
            b"".join(u32(size) for size in self.row_shape),
            u32(self.rows),
        )


def require_record_budget(rows: int, tensors: int) -> None:
    """Refuse rows if one run of them would take more records than fit their keys' budget.

    Args:
        rows: of the request.
        tensors: how many tensors are sealed at the two ends of the run: inputs and outputs, or
            the activations at a cut in place of either.

    Raises:
        RecordError: it is more than ``MAX_RECORDS_PER_REQUEST``.
    """
    if rows * tensors > MAX_RECORDS_PER_REQUEST:
        raise RecordError(
            f"{rows} rows of {tensors} tensors are {rows * tensors} records; "
            f"a request has at most {MAX_RECORDS_PER_REQUEST}: split it"
        )


def seal_record(
    key: RecordKey, context: RecordContext, row: int, plaintext: Buffer, nonce: bytes
) -> bytes:
    """Seal one row; see :func:`seal_record_into`, which saves a copy.

    Returns:
        The record, ``context.record_bytes`` long.
    """
    record = bytearray(context.record_bytes)
    seal_record_into(key, context, row, plaintext, nonce, record)
    return bytes(record)


def seal_record_into(
    key: RecordKey,
    context: RecordContext,
    row: int,
    plaintext: Buffer,
    nonce: bytes,
    out: Buffer,
) -> None:
    """Seal one row into the caller's memory.

    Args:
        key: of the request, for the context's direction.
        context: where the row belongs.
        row: its index in the request, not in a batch.
        plaintext: the row, contiguous, exactly ``context.row_bytes``.
        nonce: 12 bytes fresh from the random generator for this call.
        out: writable, exactly ``context.record_bytes``.

    Raises:
        RecordError: the request has no such row.
        UsageError: a size is wrong, or the key is for another direction.
    """
    aad = _associated_data(key, context, row)
    if len(nonce) != NONCE_BYTES:
        raise UsageError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    data = _flat("plaintext", memoryview(plaintext), context.row_bytes)
    target = _flat("buffer for a record", memoryview(out), context.record_bytes, writable=True)
    target[0] = RECORD_VERSION
    target[1:HEADER_BYTES] = nonce
    key.aead.encrypt_into(nonce, data, aad, target[HEADER_BYTES:])


def open_record_into(
    key: RecordKey, context: RecordContext, row: int, record: Buffer, out: Buffer
) -> None:
    """Open one row into the caller's memory.

    Property: any bytes open exactly as sealed for this context and row, or raise RecordError. Then
    ``out`` is as it was before step 2, and zero after it: never an unauthenticated plaintext.

    1. The row exists, and the record has exactly the size and version the context asks for.
    2. It is authentic for this key, context and row.

    Args:
        key: of the request, for the context's direction.
        context: where the record is presented.
        row: its index in the request.
        record: ``bytes``, a ``bytearray``, or a view of one. Memory that the host can write to is
            refused, copy it first: AES-GCM reads a ciphertext twice, once to check and once to
            decrypt, and what changes in between passes the check (see docs/reference/records.md).
        out: writable, exactly ``context.row_bytes``, not overlapping ``record``.

    Raises:
        RecordError: one of the steps failed.
        UsageError: ``out`` is not such a buffer, the record may be in shared memory, or the key is
            for another direction.
    """
    view = memoryview(record)
    if type(view.obj) not in (bytes, bytearray):
        raise UsageError(
            f"a record in a {type(view.obj).__name__} may change while it is opened: copy it "
            "into bytes or a bytearray first"
        )
    target = _flat("buffer for a row", memoryview(out), context.row_bytes, writable=True)
    # 1. Row, size, version.
    aad = _associated_data(key, context, row)
    if view.nbytes != context.record_bytes or not view.c_contiguous:
        raise RecordError(
            f"a record of {context.called} has {context.record_bytes} bytes, not {view.nbytes}"
        )
    data = view.cast("B")
    if data[0] != RECORD_VERSION:
        raise RecordError(f"the record has version {data[0]}; known is {RECORD_VERSION}")
    # 2. Authenticity.
    try:
        key.aead.decrypt_into(data[1:HEADER_BYTES], data[HEADER_BYTES:], aad, target)
    except InvalidTag:
        # OpenSSL has written the unauthenticated plaintext by now (SP 800-38D, section 7.2: it
        # must not be released).
        target[:] = bytes(context.row_bytes)
        raise RecordError(
            f"row {row} of {context.called} of request "
            f"{context.scope.request_id.hex()} does not open: it was changed, or sealed for "
            "another place"
        ) from None


def _associated_data(key: RecordKey, context: RecordContext, row: int) -> bytes:
    if key.direction is not context.direction:
        raise UsageError(f"a key for {key.direction} records is used for {context.direction}")
    if not 0 <= row < context.rows:
        raise RecordError(f"row {row} is not among the request's {context.rows}")
    return context.aad_prefix + u32(row)


def _flat(name: str, view: memoryview, size: int, *, writable: bool = False) -> memoryview:
    """The same memory as bytes, after a check of its size and kind."""
    if view.nbytes != size or not view.c_contiguous or (writable and view.readonly):
        kind = "contiguous writable" if writable else "contiguous"
        raise UsageError(f"a {name} here is {size} {kind} bytes, not {view.nbytes} bytes")
    return view.cast("B")


def require_sealable(name: str, dtype: str, row_shape: tuple[int, ...]) -> int:
    """Bytes of a row of a tensor, if records can carry it.

    Raises:
        RecordError: why they can't.
    """
    if not name:
        raise RecordError("a tensor has a name")
    _name_bytes("tensor", name)
    return row_bytes(dtype, row_shape)


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row of this type and shape.

    Raises:
        RecordError: records can't carry such a row.
    """
    if dtype not in ITEM_BYTES:
        raise RecordError(f"{dtype!r} is not an element type; known are {', '.join(ITEM_BYTES)}")
    if len(shape) > MAX_RANK or not all(1 <= size <= MAX_ROW_BYTES for size in shape):
        raise RecordError(f"{shape} is not the shape of a row: at most {MAX_RANK} positive sizes")
    size = ITEM_BYTES[dtype] * math.prod(shape)
    if size > MAX_ROW_BYTES:
        raise RecordError(f"a row of {size} bytes is too large; at most {MAX_ROW_BYTES}")
    return size


def _name_bytes(what: str, text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"the {what}'s name is not valid Unicode") from None
    if len(raw) > MAX_NAME_BYTES:
        raise RecordError(f"a {what}'s name has at most {MAX_NAME_BYTES} bytes, not {len(raw)}")
    return raw
