"""Running slices for a batch of requests on one compute thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lasagna.enclave.messages import InferResult, Timings
from lasagna.enclave.model import Lane, Model
from lasagna.enclave.pool import Memory
from lasagna.enclave.records import OpenRequest
from lasagna.errors import EnclaveError


@dataclass(slots=True)
class Job:
    """One Infer command on its way through the enclave.

    Attributes:
        id: of the command.
        first: first slice to run, last: one past the last.
        requests: those that opened, and the errors of those that did not, in order.
        rows: of the batch.
        inputs: the input slot that holds the opened rows; empty when none is kept apart.
        opened: whether the rows are in enclave memory already.
        open_s: seconds that opening took.
        queued_at: when it began to wait for a compute thread.
        wait_s: seconds that it waited.
    """

    id: int
    first: int
    last: int
    requests: list[OpenRequest | InferResult]
    rows: int = 0
    inputs: list[Memory] = field(default_factory=list)
    opened: bool = False
    open_s: float = 0.0
    queued_at: float = 0.0
    wait_s: float = 0.0


def _reason(error: Exception) -> str:
    """Why ONNX Runtime failed, in words for the host: its own quote values of the input."""
    kind = type(error).__name__
    if "Available memory" in str(error):
        return f"it needs more workspace than was planned ({kind})"
    return f"the input's values do not suit the model, an index out of range for example ({kind})"


def run_job(model: Model, lane: Lane, job: Job) -> tuple[tuple[InferResult, ...], Timings]:
    """Run the job's slices and seal what they give.

    Raises:
        EnclaveError: ONNX Runtime failed in a slice.
        PackageError: a slice's weights do not open.
    """
    begin = time.perf_counter()
    stalled = model.store.stall_s[lane.number]
    if job.rows:
        for number in range(job.first, job.last):
            weights = model.store.acquire(lane.number, number)
            try:
                lane.run_slice(model, number, job.rows, weights, job.inputs)
            except Exception as error:  # ONNX Runtime's exceptions have no common base but this
                raise EnclaveError(f"slice {number} failed: {_reason(error)}") from None
            finally:
                model.store.release(lane.number, number)
    computed = time.perf_counter()
    at_end = job.last == len(model.variant.slices)
    tensors = model.boundary(job.last)
    specs = list(model.outputs) if at_end else model.specs(tensors)
    places = lane.places(model, job.inputs, tensors)
    cut = None if at_end else job.last
    results = tuple(
        request if isinstance(request, InferResult) else request.seal(specs, places, cut)
        for request in job.requests
    )
    stall = model.store.stall_s[lane.number] - stalled
    timings = Timings(
        open_s=job.open_s,
        wait_s=job.wait_s,
        compute_s=max(0.0, computed - begin - stall),
        stall_s=stall,
        seal_s=time.perf_counter() - computed,
    )
    return results, timings
