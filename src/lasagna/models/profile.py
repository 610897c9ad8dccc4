"""Measuring a slice: the workspace ONNX Runtime takes for it, and how long it computes.

The workspace is found the way it will be limited: the slice runs with an arena of a given size,
and the smallest size it runs with is what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import onnxruntime as ort

from lasagna.enclave.sessions import open_slice_session, set_workspace_arena
from lasagna.errors import ModelError
from lasagna.models.graph import Array, contiguous
from lasagna.models.shapes import TensorInfo
from lasagna.models.slices import Slice
from lasagna.package.format import PROFILE_BATCHES
from lasagna.units import KIB, MIB

SMALLEST_ARENA: Final = 64 * KIB
GROWTH: Final = 1.25
"""Step between arena sizes tried: the workspace in the manifest is at most this much too large."""
TIMING_BUDGET_S: Final = 0.15


@dataclass(frozen=True, slots=True)
class Profile:
    """What ``SliceFacts`` says of a slice: bytes and seconds for each of ``PROFILE_BATCHES``.

    Seconds are measured at each; bytes at batch 1 and 2, and estimated from above for more, since
    every size of the arena that is tried takes a session and two runs. Loading tries the largest
    batch.
    """

    workspace: tuple[int, ...]
    compute_s: tuple[float, ...]


def profile_slice(
    piece: Slice,
    tensors: Mapping[str, TensorInfo],
    held: int,
    *,
    batchable: bool,
    timed: bool = True,
) -> Profile:
    """Run a slice on random data.

    Args:
        piece: the slice.
        tensors: shapes of the whole graph's tensors.
        held: bytes of intermediate results at batch 1 (``cut.held_bytes``), where to begin.
        batchable: whether more than one row can be tried.
        timed: measure compute times as well.

    Raises:
        ModelError: it does not run whatever the arena's size.
    """
    rng = np.random.default_rng(0)
    pairs = zip(piece.details.weights, piece.weights, strict=True)
    weights = {spec.name: contiguous(array) for spec, array in pairs}
    tried = PROFILE_BATCHES[:2] if batchable else PROFILE_BATCHES[:1]
    needs = []
    for rows in tried:
        feeds, results = _rows(piece, tensors, rows, rng)
        needs.append(_workspace(piece.model, {**feeds, **weights}, results, held * rows))
    workspace = extend(needs)
    if not timed:
        return Profile(workspace, ())
    set_workspace_arena(max(workspace) * 2)
    session = open_slice_session(piece.model)
    seconds = []
    for rows in PROFILE_BATCHES if batchable else PROFILE_BATCHES[:1]:
        feeds, results = _rows(piece, tensors, rows, rng)
        binding = _bind(session, {**feeds, **weights}, results)
        session.run_with_iobinding(binding)
        runs: list[float] = []
        while len(runs) < 3 or (sum(runs) < TIMING_BUDGET_S and len(runs) < 15):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            runs.append(time.perf_counter() - start)
            if sum(runs) > 2 * TIMING_BUDGET_S:
                break
        seconds.append(median(runs))
    seconds += [seconds[0]] * (len(PROFILE_BATCHES) - len(seconds))
    return Profile(workspace, tuple(seconds))


def extend(needs: Sequence[int]) -> tuple[int, ...]:
    """Workspace for each of ``PROFILE_BATCHES``, from what one and two rows were found to need.

    What was found is up to ``GROWTH`` times too much, so a line through both may be too flat.
    Half of what two rows need is never less than what one row adds.

    Args:
        needs: bytes for one row; and for two, of a model that can be batched.
    """
    per_row = -(-needs[1] // 2) if len(needs) > 1 else 0
    measured = dict(zip(PROFILE_BATCHES, needs, strict=False))
    return tuple(measured.get(b, needs[0] + per_row * (b - 1)) for b in PROFILE_BATCHES)


def _rows(
    piece: Slice, tensors: Mapping[str, TensorInfo], rows: int, rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Random inputs and room for the outputs of so many rows."""
    feeds: dict[str, Array] = {}
    local = dict(zip(piece.inputs, piece.details.inputs, strict=True))
    for name, into in local.items():
        spec = tensors[name].spec
        if np.dtype(spec.dtype).kind == "f":
            feeds[into] = rng.standard_normal(spec.shape(rows)).astype(spec.dtype)
        else:
            feeds[into] = rng.integers(0, 2, size=spec.shape(rows)).astype(spec.dtype)
    shared = {after: feeds[local[before]] for before, after in piece.in_place}
    results = {
        out: shared.get(name, np.zeros(tensors[name].spec.shape(rows), tensors[name].spec.dtype))
        for out, name in zip(piece.details.outputs, piece.outputs, strict=True)
    }
    return feeds, results


def _bind(
    session: ort.InferenceSession, feeds: Mapping[str, Array], results: Mapping[str, Array]
) -> ort.IOBinding:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in results.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding


def _workspace(
    model: bytes, feeds: Mapping[str, Array], results: Mapping[str, Array], guess: int
) -> int:
    """The smallest arena, in steps of ``GROWTH`` from the guess, in which the slice runs."""
    size = guess + SMALLEST_ARENA
    limit = 64 * (size + MIB) + 2 * sum(a.nbytes for a in (*feeds.values(), *results.values()))
    while size < limit:
        set_workspace_arena(size)
        session = open_slice_session(model)
        try:
            for _ in range(2):  # a second run allocates in another order
                session.run_with_iobinding(_bind(session, feeds, results))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            if "Available memory" not in str(error):
                raise ModelError(f"a slice does not run: {str(error).splitlines()[0]}") from None
            size = int(size * GROWTH) + SMALLEST_ARENA
            continue
        return size
    raise ModelError(f"a slice does not run in {limit} bytes of workspace")
