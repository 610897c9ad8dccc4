"""A model ready to run: its sessions, and how a slice is bound to memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import onnxruntime as ort
from numpy.typing import NDArray

from lasagna.enclave.cuts import Cut
from lasagna.enclave.pool import Memory, address
from lasagna.errors import EnclaveError, InvalidInputError
from lasagna.package.format import DTYPES, Details, TensorSpec, Variant
from lasagna.package.forms import Form, aligned, boundary, cut_bytes, extents
from lasagna.package.reader import OpenPackage
from lasagna.trust.keys import ServiceKeys
from lasagna.trust.release import Released

Array: TypeAlias = NDArray[Any]
BINDINGS_KEPT: Final = 1024
"""Bindings a compute thread keeps: combinations of slice, rows, place of weights and of inputs."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose keys are here.

    Attributes:
        digest: of the package.
        name: of the model.
        package: open.
        variant: what runs on this processor, in slices.
        details: its secret part.
        released: the keys, and who gave them.
        service: keys of the service.
    """

    digest: bytes
    name: str
    package: OpenPackage
    variant: Variant
    details: Details
    released: Released
    service: ServiceKeys


@dataclass(slots=True)
class Model:
    """A model that has its place in an arrangement.

    Attributes:
        loaded: keys and package.
        form: how it runs.
        variant: in that form, details: its secret part.
        sessions: by number of the graph's section; all compute threads share them.
        base: number of its first piece.
        cuts: between its stages, by number.
    """

    loaded: LoadedModel
    form: Form
    variant: Variant
    details: Details
    sessions: Mapping[int, ort.InferenceSession]
    base: int
    cuts: Mapping[int, Cut]
    _extents: tuple[int, ...] = field(init=False)
    _input_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive what every run asks."""
        self._extents = extents(self.variant)
        self._input_bytes = cut_bytes(self.variant)[0]

    def specs(self, cut: int) -> list[TensorSpec]:
        """The tensors that cross a cut, by the names under which they are sealed."""
        manifest = self.loaded.package.manifest
        if cut == 0:
            return list(manifest.inputs)
        if cut == len(self.variant.slices):
            return list(manifest.outputs)
        return [self.details.tensors[number] for number in boundary(self.variant, cut)]

    def require(
        self, first: int, last: int, rows: int, activations: Memory, inputs: Memory | None
    ) -> None:
        """Check that a run stays within the model, and within the memory that it is bound to.

        Args:
            first: slice.
            last: one past the last slice.
            rows: of the batch.
            activations: of a thread.
            inputs: a slot for opened inputs; None when they go to the activations.

        Raises:
            InvalidInputError: it does not.
        """
        count = len(self.variant.slices)
        if not first < last <= count:
            raise InvalidInputError(f"slices {first} to {last} of a model that has {count}")
        if rows > 1 and not self.loaded.package.manifest.batchable:
            raise InvalidInputError(f"{rows} rows in one batch of a model that takes no batches")
        most = len(activations) // max(1, *self._extents[first:last])
        if not first and inputs is not None:
            most = min(most, len(inputs) // max(1, self._input_bytes))
        if rows > most:
            raise InvalidInputError(
                f"{rows} rows in one batch; slices {first} to {last} have room for {most}"
            )


@dataclass(slots=True)
class Lane:
    """What one compute thread owns: memory for tensors that cross cuts, and bindings.

    Attributes:
        number: of the thread.
        activations: its memory.
    """

    number: int
    activations: Memory
    _bindings: OrderedDict[tuple[int, int, int, int], ort.IOBinding] = field(
        default_factory=OrderedDict
    )

    def places(
        self, model: Model, rows: int, inputs: Memory | None, tensors: Sequence[int]
    ) -> list[Memory]:
        """Memory of some tensors: inputs in their slot if there is one, else activations."""
        found = []
        of_inputs = {} if inputs is None else input_places(model.variant, inputs, rows)
        for tensor in tensors:
            if tensor in of_inputs:
                found.append(of_inputs[tensor])
                continue
            start = model.variant.places.offsets[tensor] * rows
            size = model.variant.tensor_bytes[tensor] * rows
            found.append(self.activations[start : start + size])
        return found

    def run_slice(
        self, model: Model, number: int, rows: int, weights: Memory, inputs: Memory | None
    ) -> None:
        """Run a slice on the tensors where they lie.

        Args:
            model: the model.
            number: of the slice.
            rows: of the batch.
            weights: its plaintext weights.
            inputs: slot of the model's inputs, unless they lie in the activations.

        Raises:
            EnclaveError: ONNX Runtime failed.
        """
        slot = 0 if inputs is None else address(inputs)
        key = (model.base + number, rows, address(weights), slot)
        binding = self._bindings.get(key)
        session = model.sessions[model.variant.slices[number].graph]
        if binding is None:
            binding = self._bind(session, model, number, rows, weights, inputs)
            self._bindings[key] = binding
            if len(self._bindings) > BINDINGS_KEPT:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise EnclaveError(f"slice {number} failed: {_reason(error)}") from None

    def _bind(
        self,
        session: ort.InferenceSession,
        model: Model,
        number: int,
        rows: int,
        weights: Memory,
        inputs: Memory | None,
    ) -> ort.IOBinding:
        facts, inner = model.variant.slices[number], model.details.slices[number]
        binding = session.io_binding()
        base = address(weights)
        for weight in inner.weights:
            binding.bind_input(
                weight.name, "cpu", 0, DTYPES[weight.dtype], weight.shape, base + weight.offset
            )
        places = self.places(model, rows, inputs, facts.inputs)
        for name, tensor, place in zip(inner.inputs, facts.inputs, places, strict=True):
            spec = model.details.tensors[tensor]
            binding.bind_input(name, "cpu", 0, DTYPES[spec.dtype], spec.shape(rows), address(place))
        places = self.places(model, rows, inputs, facts.outputs)
        for name, tensor, place in zip(inner.outputs, facts.outputs, places, strict=True):
            spec = model.details.tensors[tensor]
            binding.bind_output(
                name, "cpu", 0, DTYPES[spec.dtype], spec.shape(rows), address(place)
            )
        return binding


def input_places(variant: Variant, slot: Memory, rows: int) -> dict[int, Memory]:
    """Where each input of a batch lies in an input slot."""
    found, start = {}, 0
    for tensor in variant.inputs:
        size = variant.tensor_bytes[tensor]
        found[tensor] = slot[start : start + size * rows]
        start += aligned(size) * rows
    return found


def _reason(error: Exception) -> str:
    """Why ONNX Runtime failed, in words for the host: its own quote values of the input."""
    kind = type(error).__name__
    if "Available memory" in str(error):
        return f"it needs more workspace than was planned ({kind})"
    return f"the input's values do not suit the model, an index out of range for example ({kind})"
