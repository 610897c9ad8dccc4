"""Promise: what the threads did when is recorded if asked for and only then, and tells times and
numbers, nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest

from lasagna.enclave import messages as m
from lasagna.enclave.messages import Span
from lasagna.enclave.spans import KEPT, Recorder

from .asking import InThread, client, give, in_stages, in_thread, kept, part, results, run, slices
from .conftest import Sealed


@pytest.fixture
def enclave(squeezenet: Sealed) -> Iterator[InThread]:
    with in_thread(squeezenet) as running:
        give(running, in_stages(squeezenet, running.digest, [3]))
        yield running


def taken(enclave: InThread, *, record: bool) -> tuple[Span, ...]:
    reply = enclave.call(m.TakeSpans(enclave.next_id(), record), m.Spans)
    assert reply.lost == 0
    return reply.spans


def test_spans_are_recorded_from_when_they_are_asked_for_until_they_are_not(
    enclave: InThread, squeezenet: Sealed
) -> None:
    _, request = client(enclave, squeezenet, 1, 0)
    results(enclave, [part(1, request)], 0, 3, keep=True)
    assert taken(enclave, record=True) == ()
    begin = time.perf_counter()
    late = run(enclave, [kept(1)], 3, slices(squeezenet))
    enclave.call(late, m.Ran)
    end = time.perf_counter()
    spans = taken(enclave, record=False)
    computed = [span for span in spans if span.kind == "compute"]
    assert [span.slice for span in computed] == list(range(3, slices(squeezenet)))
    assert {(span.thread, span.rows, span.run) for span in computed} == {("compute 0", 1, late.id)}
    assert {"gather", "compute", "seal", "load"} <= {span.kind for span in spans}
    for span in spans:
        assert begin <= span.begin_s <= span.end_s <= end
        assert span.model == enclave.digest
        assert span.thread in ("main", "loader", "compute 0")
    results(enclave, [part(1, request)], 0, slices(squeezenet))
    assert taken(enclave, record=False) == ()


def test_spans_hold_no_plaintext(enclave: InThread, squeezenet: Sealed) -> None:
    """As they cross the socket: no window of the image, whatever is recorded of it."""
    taken(enclave, record=True)
    values, request = client(enclave, squeezenet, 1, 7)
    results(enclave, [part(1, request)], 0, slices(squeezenet))
    spans = taken(enclave, record=False)
    assert len(spans) > slices(squeezenet)
    crossed = msgspec.msgpack.encode(m.Spans(1, spans, 0))
    image = next(iter(values.values())).tobytes()
    assert not any(image[at : at + 8] in crossed for at in range(0, len(image), 8))


def test_too_many_spans_are_counted_and_the_first_are_kept() -> None:
    recorder = Recorder()
    one = Span("main", "open", 0.0, 1.0, bytes(32), -1, 1, 1)
    recorder.add(one)
    assert recorder.take(record=True) == ((), 0)
    for _ in range(KEPT + 3):
        recorder.add(one)
    spans, lost = recorder.take(record=True)
    assert (len(spans), lost) == (KEPT, 3)
    assert recorder.take(record=False) == ((), 0)
