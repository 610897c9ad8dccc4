"""Promise: a recording reads back as it was written, whatever happened to the recorder."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasagna.errors import UsageError
from lasagna.server.trace import FORMAT, Faults, Header, Kind, Span, TraceWriter, read_trace

HEADER = Header(
    started="2026-01-02T03:04:05Z",
    models=("net",),
    lanes=2,
    emulated="sgx1-128",
    policy="lasagna",
    machine="2 cores",
)
SPAN = Span("compute 0", "compute", 0.5, 0.75, "net", slice=3, rows=8, run=41)
FAULTS = Faults(1.0, 12, 0.001)

times = st.floats(-1e6, 1e6)
counts = st.integers(0, 2**40)
headers = st.builds(
    Header,
    format=st.just(FORMAT),
    started=st.text(),
    models=st.lists(st.text()).map(tuple),
    lanes=st.integers(1, 1024),
    emulated=st.text(),
    policy=st.text(),
    machine=st.text(),
)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    begin, end = sorted((draw(times), draw(times)))
    kind: Kind = draw(st.sampled_from(get_args(Kind)))
    number, rows, run = draw(st.integers(-1, 2**40)), draw(counts), draw(counts)
    return Span(draw(st.text()), kind, begin, end, draw(st.text()), number, rows, run)


faults = st.builds(Faults, times, counts, st.floats(0, 1e9))


def written(path: Path) -> bytes:
    with TraceWriter(path, HEADER) as writer:
        writer.write([SPAN])
        writer.write([FAULTS, SPAN])
    return path.read_bytes()


@settings(max_examples=40)
@given(headers, st.lists(st.lists(spans() | faults)))
def test_what_was_written_is_read(header: Header, batches: list[list[Span | Faults]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        with TraceWriter(path, header) as writer:
            for batch in batches:
                writer.write(iter(batch))
        trace = read_trace(path)

    items = [item for batch in batches for item in batch]
    assert trace.header == header
    assert trace.spans == tuple(item for item in items if isinstance(item, Span))
    assert trace.faults == tuple(item for item in items if isinstance(item, Faults))


def test_lines_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    """Who kills the recorder loses nothing that `write` has returned from."""
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path, HEADER)
    writer.write([SPAN])

    assert read_trace(path).spans == (SPAN,)

    writer.close()
    writer.close()


def test_wherever_the_last_line_is_torn_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    whole = written(path)
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole) - 1):
        path.write_bytes(whole[:length])

        trace = read_trace(path)

        assert (trace.spans, trace.faults) == ((SPAN,), (FAULTS,))


def test_last_line_that_only_lacks_its_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(written(path).rstrip(b"\n"))

    assert read_trace(path).spans == (SPAN, SPAN)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "truncated"),
        (b'{"t": "span"', "truncated"),
        (b"[]", "object"),
        (b"\xff", "."),
        (b"[" * 100_000, "."),
        (b'{"t": "nap"}', "nap"),
        (b'{"t": "faults", "at_s": 1, "pages": 2, "seconds": 0.1, "more": 1}', "more"),
        (b'{"t": "faults", "at_s": 1, "pages": -2, "seconds": 0.1}', ">= 0"),
        (b'{"t": "faults", "at_s": 1e999, "pages": 2, "seconds": 0.1}', "out of range"),
        (msgspec.json.encode(SPAN).replace(b'"compute"', b'"sleep"'), "sleep"),
        (msgspec.json.encode(SPAN).replace(b"0.75", b"0.25"), "ends before it begins"),
        (msgspec.json.encode(HEADER), "head"),
    ],
)
def test_malformed_line_is_refused_by_its_number(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "trace.jsonl"
    head, first, rest = written(path).split(b"\n", 2)
    path.write_bytes(b"\n".join([head, first, line, rest]))

    with pytest.raises(
        UsageError, match=r"trace\.jsonl, line 3: expected a span or faults: "
    ) as info:
        read_trace(path)
    assert why in str(info.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "expected the header of a trace of Lasagna"),
        (b"\n", "expected the header of a trace of Lasagna"),
        (b'{"t":"he', "expected the header of a trace of Lasagna"),
        (b"\x89PNG\n", "expected the header of a trace of Lasagna"),
        (b"[" * 100_000, "expected the header of a trace of Lasagna"),
        (msgspec.json.encode(SPAN), "expected the header of a trace of Lasagna"),
        (b'{"format": 2, "anything": "else"}\n', "the trace has format 2, expected 1"),
        (b'{"t": "head", "format": 1}\n', "expected the header of a trace: .*started"),
        (
            msgspec.json.encode(HEADER).replace(b'"lanes":2', b'"lanes":1000000000'),
            "expected the header of a trace: .*lanes",
        ),
    ],
)
def test_other_first_line_is_refused(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(line)

    with pytest.raises(UsageError, match=f"trace.jsonl, line 1: {why}"):
        read_trace(path)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't read the trace .*none: No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(UsageError, match=r"can't write the trace .*none/trace: No such file"):
        TraceWriter(tmp_path / "none" / "trace", HEADER)


def test_window_keeps_what_touches_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    written(path)
    trace = read_trace(path)

    assert trace.between(0.6, 0.7).spans == (SPAN, SPAN)
    assert trace.between(0.75, 1.0).spans == trace.between(0.0, 0.5).spans == ()
    assert trace.between(0.9, 1.0).faults == (FAULTS,)
    assert trace.between(1.0, 2.0).faults == ()
