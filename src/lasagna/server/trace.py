"""What ran when inside one enclave: the file format of a recording, JSON lines.

The first line is the `Header`, every other a `Span` or `Faults`. Lines are written as things
happen, so whoever kills the recorder loses the last one at most. Times are seconds of a steady
clock since the recording began; what had begun before has a time below 0.

It holds names, slice numbers, sizes and times, which the server's owner sees anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Literal, Self, TypeAlias

import msgspec
from msgspec import Meta

from lasagna.errors import UsageError

FORMAT: Final = 1
MAX_LANES: Final = 1024

Kind: TypeAlias = Literal["open", "compute", "load", "stall", "seal", "gather", "pin"]
"""What a thread did:

- ``open``: decrypt a request's inputs;
- ``compute``: run a slice;
- ``load``: decrypt weights;
- ``stall``: a compute thread waits for weights, or decrypts them itself;
- ``seal``: encrypt outputs;
- ``gather``: copy activations from or to a cut;
- ``pin``: load or give up a slice that stays.
"""

_Count: TypeAlias = Annotated[int, Meta(ge=0)]


class Header(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="t", tag="head"
):
    """What was recorded, and where.

    Attributes:
        format: of the file.
        started: when, ISO 8601 in UTC.
        models: that were served.
        lanes: compute threads.
        emulated: the EPC's profile, such as ``sgx1-128``; "" if nothing was emulated.
        policy: that decided what ran.
        machine: for people.
    """

    format: int = FORMAT
    started: str
    models: tuple[str, ...]
    lanes: Annotated[int, Meta(ge=1, le=MAX_LANES)]
    emulated: str
    policy: str
    machine: str


class Span(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="t",
    tag="span",
):
    """A thread did one thing for a while. Spans of one thread may nest: a stall inside a run.

    Attributes:
        thread: ``compute 0``, ``compute 1``, ..., ``loader`` or ``main``.
        kind: what it did.
        begin_s: from when.
        end_s: until when.
        model: for which model; "" for none.
        slice: for which slice; -1 for none.
        rows: in the batch; 0 where that has no meaning.
        run: the scheduler's number of the run; 0 for none.
    """

    thread: str
    kind: Kind
    begin_s: float
    end_s: float
    model: str
    slice: Annotated[int, Meta(ge=-1)] = -1
    rows: _Count = 0
    run: _Count = 0


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t", tag="faults"):
    """The enclave's page faults since the sample before, in an emulated EPC.

    Attributes:
        at_s: when they were counted.
        pages: how many.
        seconds: that threads spent in them, all threads added up.
    """

    at_s: float
    pages: _Count
    seconds: Annotated[float, Meta(ge=0)]


class _Version(msgspec.Struct):
    """What every version's header has."""

    format: int


_ENCODER: Final = msgspec.json.Encoder()
_ITEM: Final = msgspec.json.Decoder(Span | Faults)


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording, in the order of the file."""

    header: Header
    spans: tuple[Span, ...]
    faults: tuple[Faults, ...]

    def between(self, begin_s: float, end_s: float) -> Trace:
        """The spans that touch a window, uncut, and the samples taken in it."""
        return Trace(
            self.header,
            tuple(one for one in self.spans if one.begin_s < end_s and one.end_s > begin_s),
            tuple(one for one in self.faults if begin_s < one.at_s <= end_s),
        )


class TraceWriter:
    """Writes a recording. What `write` was given is with the kernel when it returns.

    Use it as a context, or `close` it.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Begin a file; one that is there already is overwritten.

        Raises:
            UsageError: it can't be written.
        """
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise UsageError(f"can't write the trace {path}: {error.strerror}") from None
        self._write((header,))

    def write(self, items: Iterable[Span | Faults]) -> None:
        """Append what happened.

        Raises:
            OSError: the file can't be written any more; the disk is full, for example.
        """
        self._write(items)

    def _write(self, items: Iterable[Header | Span | Faults]) -> None:
        self._file.write(_ENCODER.encode_lines(items))
        self._file.flush()

    def close(self) -> None:
        """End the file; a second time it does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_trace(path: Path) -> Trace:
    """Read a recording; a torn last line, of a recorder that was killed, is left out.

    Raises:
        UsageError: there is no such file, or a line of it is not what it should be.
    """
    try:
        with path.open("rb") as file:
            header = _header(path, file.readline())
            spans: list[Span] = []
            faults: list[Faults] = []
            for number, line in enumerate(file, 2):
                item = _item(path, number, line)
                if isinstance(item, Span):
                    spans.append(item)
                elif item is not None:
                    faults.append(item)
    except OSError as error:
        raise UsageError(f"can't read the trace {path}: {error.strerror}") from None
    return Trace(header, tuple(spans), tuple(faults))


def _header(path: Path, line: bytes) -> Header:
    where = f"{path}, line 1"
    try:
        version = msgspec.json.decode(line, type=_Version).format
    except (ValueError, RecursionError):  # msgspec's errors, and UnicodeDecodeError
        raise UsageError(f"{where}: expected the header of a trace of Lasagna") from None
    if version != FORMAT:
        raise UsageError(f"{where}: the trace has format {version}, expected {FORMAT}")
    try:
        return msgspec.json.decode(line, type=Header)
    except ValueError as error:
        raise UsageError(f"{where}: expected the header of a trace: {error}") from None


def _item(path: Path, number: int, line: bytes) -> Span | Faults | None:
    """What a line says; None if it is the torn last one."""
    try:
        item: Span | Faults = _ITEM.decode(line)
        if isinstance(item, Span) and item.end_s < item.begin_s:
            raise ValueError("the span ends before it begins")
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None
        raise UsageError(f"{path}, line {number}: expected a span or faults: {error}") from None
    return item
