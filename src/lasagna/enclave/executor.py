"""One run: rows of some requests through some slices, as one batch, on one compute thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lasagna.enclave.arrangement import Arrangement
from lasagna.enclave.channel import Frame
from lasagna.enclave.cuts import Owner
from lasagna.enclave.frames import error_kind
from lasagna.enclave.messages import Part, PartResult, Run, Span
from lasagna.enclave.model import Lane, Model, input_places
from lasagna.enclave.pieces import Course
from lasagna.enclave.pool import Memory
from lasagna.enclave.records import OpenRequest
from lasagna.errors import InvalidInputError, LasagnaError, RecordError
from lasagna.package.forms import boundary
from lasagna.trust.records import require_record_budget

MAX_REQUESTS: Final = 2**16
"""Requests whose keys are here at once; a host that opens more has lost count."""


class Requests:
    """Requests of which the enclave holds something, by the host's number. Thread-safe."""

    def __init__(self) -> None:
        """None is here."""
        self._open: dict[int, OpenRequest] = {}
        self._lock = threading.Lock()

    def opened(self, part: Part, model: Model, tensors: int) -> OpenRequest:
        """The request of a part; its capsule is opened when its first rows come.

        Args:
            part: of a run.
            model: that it is for.
            tensors: of which each row is opened or sealed in the run.

        Raises:
            RecordError: the capsule does not open, or is another request's.
            InvalidInputError: the host has lost count.
        """
        require_record_budget(part.count, tensors)
        known = self._open.get(part.request)
        sealed = part.sealed
        loaded = model.loaded
        if known is None and sealed is None:
            raise InvalidInputError(f"request {part.request} is not here")
        if known is None:
            assert sealed is not None
            known = OpenRequest(part.request, sealed, loaded.service, loaded.digest)
            with self._lock:
                if len(self._open) >= MAX_REQUESTS:
                    raise InvalidInputError(f"{len(self._open)} requests are open already")
                self._open[part.request] = known
        elif sealed is not None and sealed.request_id != known.request_id:
            raise InvalidInputError(f"request {part.request} is another one")
        if known.model != loaded.digest:
            raise InvalidInputError(f"request {part.request} is for another model")
        if part.first + part.count > known.rows:
            raise InvalidInputError(
                f"rows up to {part.first + part.count} of a request that has {known.rows}"
            )
        return known

    def holds(self, request: OpenRequest) -> bool:
        """Whether the request is still wanted."""
        return self._open.get(request.owner.number) is request

    def left(self, part: Part, request: OpenRequest) -> None:
        """These rows have left the enclave; the last ones take the request with them."""
        with self._lock:
            request.left -= part.count
            if request.left <= 0 and self.holds(request):
                del self._open[part.request]

    def forget(self, number: int) -> Owner | None:
        """Nobody wants the request any more; whose rows at the cuts to free, if it was here."""
        with self._lock:
            request = self._open.pop(number, None)
        return None if request is None else request.owner

    def forget_model(self, digest: bytes) -> None:
        """The model is gone, and with it the keys of its requests."""
        with self._lock:
            for number in [n for n, request in self._open.items() if request.model == digest]:
                del self._open[number]


@dataclass(slots=True)
class Job:
    """One Run command on its way through the enclave.

    Attributes:
        command: as it came.
        arrangement: that it runs in.
        model: that it is for.
        requests: of its parts in order, or why a part can't run.
        rows: of the batch. Those of parts that can't run are zeros, and nobody sees what becomes
            of them.
        course: what was announced to the weights.
        inputs: the input slot that holds the opened rows; None when none is kept apart.
        opened: whether sealed rows are in enclave memory already.
        frame: that brought them, as long as they are not.
        open_s: processor seconds that opening took; seal_s: and sealing.
        queued_at: when it began to wait for a compute thread.
        wait_s: seconds that it waited.
        copy_s: seconds of copying from and to cuts; compute_s, stall_s: of those.
    """

    command: Run
    arrangement: Arrangement
    model: Model
    requests: list[OpenRequest | PartResult]
    rows: int
    course: Course | None = None
    inputs: Memory | None = None
    opened: bool = False
    frame: Frame | None = None
    open_s: float = 0.0
    queued_at: float = 0.0
    wait_s: float = 0.0
    copy_s: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0
    seal_s: float = 0.0

    def span(self, thread: str, kind: str, begin_s: float, number: int = -1) -> float:
        """Record what was done since then; the time now."""
        end_s = time.perf_counter()
        recorder = self.arrangement.weights.recorder
        if recorder.on:
            command = self.command
            recorder.add(
                Span(thread, kind, begin_s, end_s, command.model, number, self.rows, command.id)
            )
        return end_s

    def release(self) -> None:
        """The rows are in enclave memory, or nobody wants them."""
        if self.frame is not None:
            self.frame.release()

    def parts(self) -> list[tuple[Part, OpenRequest, int]]:
        """Those that run, each with where its rows begin in the batch."""
        found, at = [], 0
        for part, request in zip(self.command.parts, self.requests, strict=True):
            if isinstance(request, OpenRequest):
                found.append((part, request, at))
            at += part.count
        return found


def open_requests(requests: Requests, command: Run, model: Model) -> list[OpenRequest | PartResult]:
    """Find or open the request of every part.

    A part whose capsule or rows don't open is no reason not to run the others.

    Raises:
        InvalidInputError: the host has lost count; nothing of the run can be done.
    """
    found: list[OpenRequest | PartResult] = []
    left = 0 if command.keep else len(boundary(model.variant, command.last))
    for part in command.parts:
        came = 0 if part.sealed is None else len(boundary(model.variant, command.first))
        try:
            found.append(requests.opened(part, model, came + left))
        except RecordError as error:
            found.append(refused(error))
    return found


def refused(error: LasagnaError) -> PartResult:
    """What is said of one request that can't run."""
    return PartResult(error=str(error), kind=error_kind(error))


def open_sealed(job: Job, lane: Lane | None) -> None:
    """Bring the rows of every part that came in sealed into memory, one after the other.

    Args:
        job: the run.
        lane: whose activations they go to, unless the job has an input slot.
    """
    command, model = job.command, job.model
    cut = command.first
    specs, named = model.specs(cut), (model.variant.name, cut)
    if lane is None:
        assert job.inputs is not None
        places = list(input_places(model.variant, job.inputs, job.rows).values())
    else:
        places = lane.places(model, job.rows, None, boundary(model.variant, cut))
    at = 0
    for index, (part, request) in enumerate(zip(command.parts, job.requests, strict=True)):
        failed = None
        if isinstance(request, OpenRequest) and part.sealed is not None:
            try:
                request.open_into(part, part.sealed, specs, places, at, named)
            except LasagnaError as error:
                failed = job.requests[index] = refused(error)
        if failed is not None or isinstance(request, PartResult):
            for spec, place in zip(specs, places, strict=True):
                place[at * spec.row_bytes : (at + part.count) * spec.row_bytes] = 0
        at += part.count
    job.opened = True
    job.release()


def run_job(job: Job, lane: Lane, requests: Requests) -> tuple[PartResult, ...]:
    """Run the job's slices; keep the rows at the next cut, or seal what they give.

    Raises:
        EnclaveError: ONNX Runtime failed in a slice.
        PackageError: a slice's weights do not open.
        InvalidInputError: the host has lost count of its rows.
    """
    command, model = job.command, job.model
    thread = f"compute {lane.number}"
    begin = time.perf_counter()
    if command.parts[0].sealed is None:
        _gather(job, lane, requests)
        job.copy_s += job.span(thread, "gather", begin) - begin
    elif not job.opened:
        cpu = time.thread_time()
        open_sealed(job, lane)
        job.open_s += time.thread_time() - cpu
        job.span(thread, "open", begin)
    if job.parts():
        _compute(job, lane, thread)
    begin = time.perf_counter()
    tensors = boundary(model.variant, command.last)
    places = lane.places(model, job.rows, job.inputs, tensors)
    if command.keep:
        _keep(job, places, requests)
        results = tuple(
            PartResult() if isinstance(request, OpenRequest) else request
            for request in job.requests
        )
        job.copy_s += job.span(thread, "gather", begin) - begin
        return results
    cpu = time.thread_time()
    results = _seal(job, places, requests)
    job.seal_s = time.thread_time() - cpu
    job.span(thread, "seal", begin)
    return results


def _gather(job: Job, lane: Lane, requests: Requests) -> None:
    """Copy the rows from their cut. Those of a request that was forgotten meanwhile are zeros."""
    command, model = job.command, job.model
    cut = model.cuts.get(command.first)
    if cut is None:
        raise InvalidInputError(f"no rows are kept at cut {command.first}")
    places = lane.places(model, job.rows, None, boundary(model.variant, command.first))
    at = 0
    for index, (part, request) in enumerate(zip(command.parts, job.requests, strict=True)):
        if isinstance(request, OpenRequest):
            try:
                for row in range(part.count):
                    cut.copy_out((request.owner, part.first + row), places, at + row)
            except InvalidInputError:
                if requests.holds(request):
                    raise
                job.requests[index] = PartResult()
        if isinstance(job.requests[index], PartResult):
            for size, place in zip(cut.sizes, places, strict=True):
                place[at * size : (at + part.count) * size] = 0
        at += part.count


def _compute(job: Job, lane: Lane, thread: str) -> None:
    model, weights, course = job.model, job.arrangement.weights, job.course
    assert course is not None
    stalled = weights.stall_s[lane.number]
    start = time.perf_counter()
    for number in range(job.command.first, job.command.last):
        slot = weights.acquire(lane.number, course, model.base + number)
        begin = time.perf_counter()
        try:
            lane.run_slice(model, number, job.rows, slot.memory, job.inputs)
        finally:
            weights.release(course, slot)
        job.span(thread, "compute", begin, number)
    job.stall_s = weights.stall_s[lane.number] - stalled
    job.compute_s = time.perf_counter() - start - job.stall_s


def _keep(job: Job, places: Sequence[Memory], requests: Requests) -> None:
    command = job.command
    before, after = job.model.cuts.get(command.first), job.model.cuts[command.last]
    for part, request, at in job.parts():
        if not requests.holds(request):
            continue
        for row in range(part.first, part.first + part.count):
            after.put((request.owner, row), places, at + row - part.first)
            if before is not None:
                before.drop((request.owner, row))
        if not requests.holds(request):  # it was forgotten meanwhile
            after.forget(request.owner)


def _seal(job: Job, places: Sequence[Memory], requests: Requests) -> tuple[PartResult, ...]:
    command, model = job.command, job.model
    specs = model.specs(command.last)
    end = command.last == len(model.variant.slices)
    cut = None if end else (model.variant.name, command.last)
    before = model.cuts.get(command.first)
    sealed = {}
    for part, request, at in job.parts():
        if not requests.holds(request):
            continue
        sealed[id(part)] = request.seal(part, specs, places, at, cut)
        if before is not None:
            for row in range(part.first, part.first + part.count):
                before.drop((request.owner, row))
        requests.left(part, request)
    return tuple(
        sealed.get(id(part), PartResult()) if isinstance(request, OpenRequest) else request
        for part, request in zip(command.parts, job.requests, strict=True)
    )
