"""Which forms of a sealed model there are, and where its tensors are needed. Pure.

A package has a model once in slices and once as a *whole*, over the same weights; and the whole
once more *frozen*, with its weights as constants of the graph, which ONNX Runtime packs for its
kernels. Whoever plans an enclave's memory and the enclave itself must mean the same by a slice, a
cut and a byte, so both have it from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from lasagna.errors import PackageError
from lasagna.package.format import WEIGHT_ALIGNMENT, SliceFacts, Variant


class Form(StrEnum):
    """How a model is run.

    Attributes:
        SLICED: slice by slice; weights pinned or streamed.
        WHOLE: as one slice, its weights pinned.
        FROZEN: as one slice whose session holds copies of the weights.
        VANILLA: the frozen whole with ONNX Runtime's own arenas: the baseline.
    """

    SLICED = "sliced"
    WHOLE = "whole"
    FROZEN = "frozen"
    VANILLA = "vanilla"


def choose_variant(variants: Sequence[Variant], block: int) -> Variant:
    """The best variant for a processor: its own NCHWc block, else one that runs anywhere.

    Args:
        variants: of a package.
        block: channels in a block of the processor's kernels.

    Raises:
        PackageError: the package has neither.
    """
    for wanted in (block, 0):
        for variant in variants:
            if variant.block == wanted:
                return variant
    has = ", ".join(f"{variant.name} (block {variant.block})" for variant in variants)
    raise PackageError(
        f"this processor has NCHWc block {block}; the package has only {has}: seal it with a "
        "portable variant"
    )


def in_form(variant: Variant, form: Form) -> Variant:
    """The variant in slices, or as one.

    The whole has another name, ``nchwc8/whole``: it has one slice and no cut inside, so numbers of
    slices and cuts mean something else than in ``nchwc8``, and activations of the one must not open
    in the other.
    """
    if form is Form.SLICED:
        return variant
    whole = variant.whole
    if form is not Form.WHOLE:
        whole = msgspec.structs.replace(whole, graph=variant.frozen)
    return msgspec.structs.replace(
        variant, name=f"{variant.name}/whole", slices=(whole,), places=variant.whole_places
    )


def boundary(variant: Variant, cut: int) -> tuple[int, ...]:
    """Tensors that cross a cut; the model's inputs at 0, its outputs at the last."""
    if cut == 0:
        return variant.inputs
    if cut == len(variant.slices):
        return variant.outputs
    return live_at_cut(variant, cut)


def live_at_cut(variant: Variant, cut: int) -> tuple[int, ...]:
    """Tensors that cross the cut before slice ``cut``: made before it, needed at it or later."""
    made = set(variant.inputs).union(*(facts.outputs for facts in variant.slices[:cut]))
    needed = set(variant.outputs).union(*(facts.inputs for facts in variant.slices[cut:]))
    return tuple(sorted(made & needed))


def cut_bytes(variant: Variant) -> tuple[int, ...]:
    """Bytes of a row at each cut, the first and the last included; tensors begin at cache lines."""
    return tuple(
        sum(aligned(variant.tensor_bytes[tensor]) for tensor in boundary(variant, cut))
        for cut in range(len(variant.slices) + 1)
    )


def extents(variant: Variant) -> tuple[int, ...]:
    """How far each slice reaches into the activations of one row, in bytes."""
    return tuple(_extent(variant, n, facts) for n, facts in enumerate(variant.slices))


def _extent(variant: Variant, number: int, facts: SliceFacts) -> int:
    tensors = {*boundary(variant, number), *facts.inputs, *facts.outputs}
    return max(
        (variant.places.offsets[tensor] + aligned(variant.tensor_bytes[tensor]))
        for tensor in tensors
    )


def aligned(size: int) -> int:
    """The size, rounded up to whole cache lines."""
    return -(-size // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
