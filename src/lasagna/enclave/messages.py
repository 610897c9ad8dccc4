"""What host and enclave say to each other over their socket; ``frames`` has it as bytes.

One ``Command`` goes from host to enclave, one ``Reply`` comes back, with the ``id`` of its command;
replies may come in another order than the commands. The enclave speaks first, with ``Hello``.

Everything here is public to the host: ids, sizes, times, sealed bytes.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from lasagna.package.forms import Form

PROTOCOL_VERSION: Final = 4
MAX_CORES: Final = 4096

_Id = Annotated[int, Meta(ge=0, le=2**53)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Path = Annotated[str, Meta(min_length=1, max_length=4096)]
_Rows = Annotated[int, Meta(ge=1, le=4096)]
_Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    id: _Id


class SealedRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client or another enclave sealed of one request.

    Attributes:
        request_id: the client's, bound into every record.
        capsule: the request's keys for this service.
        rows: of the whole request.
        records: one for every row of every input (or tensor at the cut).
    """

    request_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    capsule: Annotated[bytes, Meta(max_length=4096)]
    rows: Annotated[int, Meta(ge=1, le=4096)]
    records: tuple[tuple[memoryview, ...], ...]


class Attest(_Message, frozen=True, tag="attest"):
    """Ask for evidence that binds a model's service to this enclave. Reply: Attested."""

    model: _Digest
    nonce: bytes | None = None


class RequestKeys(_Message, frozen=True, tag="request-keys"):
    """Open a package and ask for its keys. Reply: KeysRequested, to relay to the key broker."""

    path: _Path


class Load(_Message, frozen=True, tag="load"):
    """Take the keys of the last RequestKeys, and with them the model. Reply: Loaded.

    The model can run when an Arrange has given it memory.
    """

    grant: bytes


class Unload(_Message, frozen=True, tag="unload"):
    """Forget a model and its keys; it must not be in the arrangement. Reply: Done."""

    model: _Digest


class StageWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Slices ``first`` to ``last``, exclusive, of up to ``rows`` rows at once.

    ``held_rows`` may be at the cut before it, in enclave memory; 0 for the first stage, whose rows
    come in sealed.
    """

    first: Annotated[int, Meta(ge=0, le=2**20)]
    last: Annotated[int, Meta(ge=1, le=2**20)]
    rows: _Rows
    held_rows: Annotated[int, Meta(ge=0, le=2**16)]


class ModelWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one model is to be run.

    ``pinned`` are slices to keep from the start; other forms than ``sliced`` have one, which is
    always kept.
    """

    model: _Digest
    form: Form
    stages: Annotated[tuple[StageWish, ...], Meta(min_length=1, max_length=4096)]
    pinned: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**20)], ...], Meta(max_length=2**20)] = ()


class Arrange(_Message, frozen=True, tag="arrange"):
    """Divide the memory among these models. Reply: Arranged.

    Nothing may be in the enclave. All sizes in bytes. Models that are not named get no memory.

    Attributes:
        models: to serve.
        lanes: batches that are computed at once: one for each thread, or one for all together. What
            an enclave's first models have fixed stays.
        ring_slots: for weights that are streamed, each of slot_bytes.
        input_slots: for opened inputs of runs that wait; 0 to open them when the run begins.
        input_bytes: of such a slot.
        activation_bytes: of one lane.
        workspace_bytes: of ONNX Runtime's arena, for all compute threads.
        cores: processors for computing and loading. Where computing needs all of them, weights are
            loaded only while it pauses.
        frame_slots: for runs on their way in, with the ciphertext of their rows; frame_bytes: of
            each.
    """

    models: Annotated[tuple[ModelWish, ...], Meta(max_length=1024)]
    lanes: Annotated[int, Meta(ge=1, le=1024)]
    ring_slots: Annotated[int, Meta(ge=0, le=64)]
    slot_bytes: _Count
    input_slots: Annotated[int, Meta(ge=0, le=256)]
    input_bytes: _Count
    activation_bytes: _Count
    workspace_bytes: _Count
    cores: Annotated[int, Meta(ge=1, le=MAX_CORES)] = MAX_CORES
    frame_slots: Annotated[int, Meta(ge=0, le=2048)] = 0
    frame_bytes: _Count = 0


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows ``first`` to ``first + count`` of one request, in a run.

    Attributes:
        request: the host's number for it, in this enclave's life.
        first: row, and count: of rows that run.
        sealed: where the rows come in sealed; else they stand at the cut before the run.
    """

    request: _Id
    first: Annotated[int, Meta(ge=0, le=4095)]
    count: _Rows
    sealed: SealedRows | None = None


class Run(_Message, frozen=True, tag="run"):
    """Run slices first..last (exclusive) on rows of some requests, as one batch. Reply: Ran.

    With ``keep`` the rows stay at the cut before ``last``, for a later run; else they come back
    sealed, as outputs or, before the model's end, as activations for another enclave. ``first`` > 0
    with sealed rows goes on from such activations.
    """

    model: _Digest
    first: Annotated[int, Meta(ge=0, le=2**20)]
    last: Annotated[int, Meta(ge=1, le=2**20)]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=4096)]
    keep: bool = False


class Forget(_Message, frozen=True, tag="forget"):
    """Free what is here of a request. Reply: Done."""

    request: _Id


class Pin(_Message, frozen=True, tag="pin"):
    """Load a slice into memory of its own and keep it. Reply: Done."""

    model: _Digest
    slice: Annotated[int, Meta(ge=0, le=2**20)]


class Unpin(_Message, frozen=True, tag="unpin"):
    """Give up a pinned slice's memory, as soon as no run uses it. Reply: Done."""

    model: _Digest
    slice: Annotated[int, Meta(ge=0, le=2**20)]


class TakeSpans(_Message, frozen=True, tag="take-spans"):
    """Hand over what was recorded since the last time, and go on or stop. Reply: Spans."""

    record: bool


class GetStats(_Message, frozen=True, tag="get-stats"):
    """Ask for counters. Reply: Stats."""


class Stop(_Message, frozen=True, tag="stop"):
    """Finish what runs, then exit. Reply: Stopped."""


Command: TypeAlias = (
    Attest
    | RequestKeys
    | Load
    | Unload
    | Arrange
    | Run
    | Forget
    | Pin
    | Unpin
    | TakeSpans
    | GetStats
    | Stop
)


class Hello(_Message, frozen=True, tag="hello"):
    """First frame after connecting (id 0).

    ``block`` is the NCHWc block of this processor's kernels, which decides the variant it runs.
    """

    version: int
    budget_bytes: _Count
    compute_threads: int
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


class Loaded(_Message, frozen=True, tag="loaded"):
    """The model's keys and description are here. ``variant`` is what runs on this processor."""

    model: _Digest
    name: str
    variant: str
    load_s: float


class Arranged(_Message, frozen=True, tag="arranged"):
    """Every model of the arrangement can run, with ``pool_bytes`` handed out.

    Or there is none, because the one that is ``refused`` can't, for a reason as in ``Failed``.
    """

    pool_bytes: _Count
    arrange_s: float
    refused: bytes = b""
    kind: str = ""
    error: str = ""


class Done(_Message, frozen=True, tag="done"):
    """A command without a result was carried out."""


class PartResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records by output (or tensor at the cut) and row; or an error of this request alone."""

    records: tuple[tuple[bytes, ...], ...] = ()
    error: str = ""
    kind: str = ""


class Timings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds spent on one Run, each counted once.

    ``wait_s`` is for a compute thread, ``stall_s`` for weights that were not there yet, on the
    thread that ran it, with those that it loaded ahead then; ``copy_s`` from and to the cuts.
    ``load_bytes`` were decrypted by all threads in ``load_s`` since the last reply. ``open_s``,
    ``seal_s`` and ``load_s`` are of the processor: what others do beside them doesn't count.
    """

    open_s: float
    wait_s: float
    compute_s: float
    stall_s: float
    copy_s: float
    seal_s: float
    load_bytes: _Count
    load_s: float


class Ran(_Message, frozen=True, tag="ran"):
    """Results in the order of the parts."""

    results: tuple[PartResult, ...]
    timings: Timings


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a thread did from ``begin_s`` to ``end_s``, in seconds of the system's steady clock.

    Attributes:
        thread: ``compute 0``, ``loader`` or ``main``.
        kind: ``open``, ``load``, ``stall``, ``compute``, ``gather``, ``seal`` or ``pin``.
        begin_s: from, end_s: to.
        model: its digest.
        slice: number, or -1.
        rows: of the batch, or 0.
        run: id of the Run command, or 0.
    """

    thread: str
    kind: str
    begin_s: float
    end_s: float
    model: _Digest
    slice: int
    rows: int
    run: _Id


class Spans(_Message, frozen=True, tag="spans"):
    """What was recorded, by time of its end; ``lost`` were too many to keep."""

    spans: tuple[Span, ...]
    lost: _Count


class Stats(_Message, frozen=True, tag="stats"):
    """Counters since the enclave started. Times in seconds, of all threads; sizes in bytes.

    ``pool_bytes`` and ``pool_high_water`` are what is and was handed out of the pool (see
    ``enclave.pool.Pool``), not what is resident.
    """

    pool_bytes: _Count
    pool_high_water: _Count
    workspace_bytes: _Count
    entries: _Count
    runs: _Count
    rows: _Count
    """That reached a model's end, or left for another enclave."""
    slice_runs: _Count
    row_slices: _Count
    """Tasks: slices times rows."""
    loads: _Count
    loaded_bytes: _Count
    load_s: float
    compute_s: float
    stall_s: float
    open_s: float
    copy_s: float
    seal_s: float


class Stopped(_Message, frozen=True, tag="stopped"):
    """Nothing runs any more; the process exits."""


class Failed(_Message, frozen=True, tag="failed"):
    """A command could not be carried out; ``kind`` is an error class of ``ERRORS``."""

    kind: str
    message: str


Reply: TypeAlias = (
    Hello
    | Attested
    | KeysRequested
    | Loaded
    | Arranged
    | Ran
    | Spans
    | Done
    | Stats
    | Stopped
    | Failed
)
