"""From a model to one variant in plaintext: optimised, tiled, cut, checked and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from lasagna.errors import ModelError, UsageError
from lasagna.models.bands import split_bands
from lasagna.models.cut import Cuts, cut_graph, held_bytes, needed_memory
from lasagna.models.graph import Array, Graph, contiguous
from lasagna.models.layout import transpose_matmul_weights
from lasagna.models.optimise import compile_variant
from lasagna.models.profile import Profile, profile_slice
from lasagna.models.shapes import TensorInfo, measure_shapes, open_bare, run_bare
from lasagna.models.slices import Slice, make_slices
from lasagna.models.source import Reference, Source
from lasagna.models.tile import tile_graph
from lasagna.units import KIB, MIB

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while sealing goes on."""

SELF_CHECK_TOLERANCE: Final = 1e-4
"""Sliced and plain ONNX Runtime may differ by this, relative to the largest output."""
SMALLEST_SLICE: Final = 4 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What a slice may have; None leaves the choice to ``build_variant``.

    Attributes:
        slice_bytes: bytes of weights, tiles included.
        memory_bytes: bytes of intermediate results inside a slice at batch 1.
    """

    slice_bytes: int | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Built:
    """A variant in plaintext.

    Attributes:
        name: of the variant.
        block: channels per block of its layout, 0 for none.
        tensors: shapes of all tensors.
        slices: in the order they run.
        profiles: of each slice.
        whole: the same layers and weights as one slice.
        whole_profile: of that.
        order: names of the tensors that cross cuts; their places are their numbers.
        difference: to plain ONNX Runtime, relative to the largest output.
    """

    name: str
    block: int
    tensors: Mapping[str, TensorInfo]
    slices: Sequence[Slice]
    profiles: Sequence[Profile]
    whole: Slice
    whole_profile: Profile
    order: tuple[str, ...]
    difference: float


def build_variant(
    source: Source,
    folder: Path,
    *,
    portable: bool,
    limits: Limits,
    timed: bool,
    progress: Progress,
) -> Built:
    """Build one variant.

    Args:
        source: the model.
        folder: an empty directory for plaintext weights, which the result maps.
        portable: for any processor, or for those like this one.
        limits: of slices.
        timed: whether to measure compute times.
        progress: told what goes on.

    Raises:
        ModelError: it can't be cut or run in slices, or the slices give something else.
        UsageError: the limits make no sense.
    """
    kind = "portable" if portable else "native"
    progress(f"optimise ({kind})", 0, 1)
    compiled = compile_variant(source, folder, portable=portable)
    computed = {name for node in compiled.graph.nodes for name in node.output}
    for output in compiled.graph.outputs:
        if output not in computed:
            raise ModelError(f"output {output!r} is the same for all inputs: a constant")
    graph = transpose_matmul_weights(compiled.graph)
    first, second = source.references[0], source.references[1]

    def shapes_of(graph: Graph) -> dict[str, TensorInfo]:
        return measure_shapes(graph, first.inputs, second.inputs, batchable=source.batchable)

    progress(f"measure shapes ({kind})", 0, 1)
    if any(node.op_type == "LRN" for node in graph.nodes):
        graph = split_bands(graph, shapes_of(graph))
    total = sum(array.nbytes for array in graph.weights.values())
    limit = limits.slice_bytes or slice_limit(total)
    if limit < SMALLEST_SLICE:
        raise UsageError(f"slices of {limit} bytes of weights are too small; try 1MiB")
    graph = tile_graph(graph, limit, compiled.block)
    tensors = shapes_of(graph)
    for output in graph.outputs:
        if not tensors[output].separable:
            raise ModelError(
                f"output {output!r} is not computed row by row, with a shape that is always the "
                "same; results are sealed row by row"
            )
    memory = limits.memory_bytes or max(MIB, needed_memory(graph, tensors) // 4)
    cuts = cut_graph(graph, tensors, limit, memory)
    slices = make_slices(graph, tensors, cuts, batchable=source.batchable)
    difference = _self_check(first, slices)
    one = Cuts((0, len(graph.nodes)), ())
    (whole,) = make_slices(graph, tensors, one, batchable=source.batchable)
    held = [*held_bytes(graph, tensors, cuts), *held_bytes(graph, tensors, one)]
    profiles = _profile(
        [*slices, whole], tensors, held, source.batchable, timed, f"profile ({kind})", progress
    )
    order = list(graph.inputs)
    for piece in slices:
        order.extend(piece.outputs)
    return Built(
        name=compiled.name,
        block=compiled.block,
        tensors=tensors,
        slices=slices,
        profiles=profiles[:-1],
        whole=whole,
        whole_profile=profiles[-1],
        order=tuple(order),
        difference=difference,
    )


def slice_limit(total: int) -> int:
    """Weights that a slice may have when the owner does not say.

    Every slice costs a call and every streamed one a turn of the loader, about 50 us each; so few
    are wanted. The ring holds two or three, which should stay a small part of the model; so many
    are wanted. A sixteenth is between the two (docs/experiments/0002-streaming.md); for a model of
    a few megabytes the calls weigh more, and it is up to an eighth.

    Args:
        total: bytes of the model's weights.
    """
    return min(8 * MIB, max(total // 16, min(2 * MIB, total // 8), SMALLEST_SLICE))


def _self_check(reference: Reference, slices: Sequence[Slice]) -> float:
    """Run the slices one after the other and compare with the model as it came."""
    values = dict(reference.inputs)
    for piece in slices:
        pairs = zip(piece.details.inputs, piece.inputs, strict=True)
        feeds = {local: values[name] for local, name in pairs}
        weights = zip(piece.details.weights, piece.weights, strict=True)
        feeds |= {spec.name: contiguous(array) for spec, array in weights}
        session = open_bare(piece.model)
        values.update(zip(piece.outputs, run_bare(session, feeds), strict=True))
    worst = 0.0
    for name, want in reference.outputs.items():
        gap = _difference(values[name], want)
        worst = max(worst, gap)
        if gap > SELF_CHECK_TOLERANCE:
            raise ModelError(
                f"self-check: output {name!r} of the sliced model differs from plain ONNX Runtime "
                f"by {gap:.1e} of its largest value; nothing was written"
            )
    return worst


def _difference(got: Array, want: Array) -> float:
    """The largest difference relative to the largest wanted value; infinite for another shape."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)  # also integers and booleans
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return math.inf
    if not np.isfinite(got[finite]).all():
        return math.inf
    scale = float(np.max(np.abs(want[finite]), initial=1e-30))
    return float(np.max(np.abs(got[finite] - want[finite]), initial=0.0)) / scale


def _profile(
    slices: Sequence[Slice],
    tensors: Mapping[str, TensorInfo],
    held: Sequence[int],
    batchable: bool,
    timed: bool,
    what: str,
    progress: Progress,
) -> list[Profile]:
    """Measure each distinct slice once; equal tiles share a measurement."""
    known: dict[bytes, Profile] = {}
    profiles = []
    for number, (piece, inner) in enumerate(zip(slices, held, strict=True)):
        progress(what, number, len(slices))
        if piece.model not in known:
            known[piece.model] = profile_slice(
                piece, tensors, inner, batchable=batchable, timed=timed
            )
        profiles.append(known[piece.model])
    return profiles
