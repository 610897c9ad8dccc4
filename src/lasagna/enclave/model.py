"""A model made ready to run: its memory, its sessions, and how a slice is bound to both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec
import onnxruntime as ort
from numpy.typing import NDArray

from lasagna.enclave.plan import Plan, freeze_plan, live_at_cut, make_plan
from lasagna.enclave.pool import Memory, Pool, address
from lasagna.enclave.sessions import open_slice_session, set_workspace_arena
from lasagna.enclave.weights import WeightStore
from lasagna.errors import BudgetError, PackageError
from lasagna.package.format import DTYPES, Details, TensorSpec, Variant
from lasagna.package.reader import OpenPackage

Array: TypeAlias = NDArray[Any]
UNLIMITED: Final = 2**60
BINDINGS_PER_SLICE: Final = 4
"""Bindings kept for each slice of a thread: combinations of batch, ring slot and input slot."""


@dataclass(slots=True)
class Model:
    """Everything that is set up once.

    Attributes:
        digest: of the package.
        name: of the model.
        variant: what runs.
        details: its secret part.
        plan: how the budget is spent.
        store: its weights.
        inputs: specs of the model's inputs, outputs: of its outputs.
        input_slots: memory for opened inputs that wait: one list of tensors for every slot.
        lanes: what each compute thread owns.
        session_count: how many sessions are open.
    """

    digest: bytes
    name: str
    variant: Variant
    details: Details
    plan: Plan
    store: WeightStore
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_slots: list[list[Memory]]
    lanes: list[Lane]
    session_count: int

    def boundary(self, cut: int) -> tuple[int, ...]:
        """Tensors that cross a cut; the model's inputs at 0, its outputs at the last."""
        if cut == 0:
            return self.variant.inputs
        if cut == len(self.variant.slices):
            return self.variant.outputs
        return live_at_cut(self.variant, cut)

    def specs(self, tensors: Sequence[int]) -> list[TensorSpec]:
        """Their specs, by the names under which they are sealed."""
        return [self.details.tensors[number] for number in tensors]


@dataclass(slots=True)
class Lane:
    """What one compute thread owns: activations, sessions, and bindings of them.

    Attributes:
        number: of the thread.
        activations: its memory for tensors that cross cuts.
        sessions: by number of the graph's section.
    """

    number: int
    activations: Memory
    sessions: dict[int, ort.InferenceSession]
    _bindings: OrderedDict[tuple[int, int, int, int], ort.IOBinding] = field(
        default_factory=OrderedDict
    )

    def places(
        self, model: Model, inputs: Sequence[Memory], tensors: Sequence[int]
    ) -> list[Memory]:
        """Memory of some tensors: inputs in their slot, the others in the activations."""
        found = []
        for tensor in tensors:
            if inputs and tensor in model.variant.inputs:
                found.append(inputs[model.variant.inputs.index(tensor)])
                continue
            batch = model.plan.max_batch
            start = model.variant.places.offsets[tensor] * batch
            found.append(
                self.activations[start : start + model.variant.tensor_bytes[tensor] * batch]
            )
        return found

    def run_slice(
        self, model: Model, number: int, rows: int, weights: Memory, inputs: Sequence[Memory]
    ) -> None:
        """Run a slice on the tensors where they lie.

        Args:
            model: the model.
            number: of the slice.
            rows: of the batch.
            weights: its plaintext weights.
            inputs: slot of the model's inputs, unused when they lie in the activations.
        """
        slot = address(inputs[0]) if inputs else 0
        key = (number, rows, address(weights), slot)
        binding = self._bindings.get(key)
        session = self.sessions[model.variant.slices[number].graph]
        if binding is None:
            binding = self._bind(session, model, number, rows, weights, inputs)
            self._bindings[key] = binding
            if len(self._bindings) > BINDINGS_PER_SLICE * len(model.variant.slices):
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        session.run_with_iobinding(binding)

    def _bind(
        self,
        session: ort.InferenceSession,
        model: Model,
        number: int,
        rows: int,
        weights: Memory,
        inputs: Sequence[Memory],
    ) -> ort.IOBinding:
        facts, inner = model.variant.slices[number], model.details.slices[number]
        binding = session.io_binding()
        base = address(weights)
        for weight in inner.weights:
            binding.bind_input(
                weight.name, "cpu", 0, DTYPES[weight.dtype], weight.shape, base + weight.offset
            )
        places = self.places(model, inputs, facts.inputs)
        for name, tensor, place in zip(inner.inputs, facts.inputs, places, strict=True):
            spec = model.details.tensors[tensor]
            binding.bind_input(name, "cpu", 0, DTYPES[spec.dtype], spec.shape(rows), address(place))
        places = self.places(model, inputs, facts.outputs)
        for name, tensor, place in zip(inner.outputs, facts.outputs, places, strict=True):
            spec = model.details.tensors[tensor]
            binding.bind_output(
                name, "cpu", 0, DTYPES[spec.dtype], spec.shape(rows), address(place)
            )
        return binding


def choose_variant(variants: Sequence[Variant], block: int) -> Variant:
    """The best variant for this processor: its own NCHWc block, else one that runs anywhere.

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


def _fit(
    sliced: Variant, budget: int, threads: int, max_batch: int, name: str, *, pin: bool
) -> tuple[Variant, Plan]:
    """The whole model as one slice when all of it fits, which saves the calls; else in slices.

    The whole has another name, ``nchwc8/whole``: it has one slice and no cut inside, so numbers of
    slices and cuts mean something else than in ``nchwc8``, and activations of the one must not open
    in the other.
    """
    if not pin:
        return sliced, make_plan(sliced, budget, threads, max_batch, name=name, pin=False)
    whole = msgspec.structs.replace(
        sliced,
        name=f"{sliced.name}/whole",
        slices=(sliced.whole,),
        places=sliced.whole_places,
    )
    try:
        plan = make_plan(whole, budget, threads, max_batch, name=name)
    except BudgetError:
        plan = None
    if plan is not None and plan.ring_slots == 0:
        return whole, plan
    return sliced, make_plan(sliced, budget, threads, max_batch, name=name)


def _freeze(
    variant: Variant, details: Details, weights: Memory
) -> tuple[Variant, Details, dict[str, Array]]:
    """The whole with its weights as constants: nothing is bound to a run but activations."""
    (facts,), (inner,) = variant.slices, details.slices
    values: dict[str, Array] = {}
    for spec in inner.weights:
        flat = weights[spec.offset : spec.offset + spec.size]
        values[spec.name] = flat.view(DTYPES[spec.dtype]).reshape(spec.shape)
    return (
        msgspec.structs.replace(
            variant, slices=(msgspec.structs.replace(facts, graph=variant.frozen),)
        ),
        msgspec.structs.replace(details, slices=(msgspec.structs.replace(inner, weights=()),)),
        values,
    )


def prepare_model(
    package: OpenPackage,
    *,
    block: int,
    budget: int,
    threads: int,
    intra_op_threads: int,
    max_batch: int,
    pin: bool = True,
    vanilla: bool = False,
) -> tuple[Model, Pool]:
    """Plan, reserve memory, load pinned weights, open sessions, and try every slice once.

    The vanilla runtime is the same but for what it is a baseline of: its budget is unlimited, its
    sessions have ONNX Runtime's own arenas, and whoever limits its memory pages.

    Raises:
        BudgetError: it does not fit.
        PackageError: the package is inconsistent, was changed, or does not run here.
    """
    manifest = package.manifest
    sliced = choose_variant(manifest.variants, block)
    wish = max_batch if manifest.batchable else 1
    budget = UNLIMITED if vanilla else budget
    variant, plan = _fit(sliced, budget, threads, wish, manifest.name, pin=pin)
    details = package.details(sliced)
    frozen: Plan | None = None
    if variant is not sliced:
        details = msgspec.structs.replace(details, slices=(details.whole,))
        frozen = freeze_plan(plan, threads, budget)
    plan = frozen or plan
    pool = Pool(plan.total_bytes - plan.workspace_bytes - plan.session_bytes)
    stagings = [pool.take(plan.staging_bytes) for _ in range(plan.staging_count)]
    pinned = {n: pool.take(variant.slices[n].weight_bytes) for n in sorted(plan.pinned)}
    ring = [pool.take(plan.slot_bytes) for _ in range(plan.ring_slots)]
    store = WeightStore(package, variant, pinned, ring, stagings)
    store.load_pinned()
    set_workspace_arena(plan.workspace_bytes + plan.session_bytes)
    constants: dict[str, Array] = {}
    if frozen is not None:
        variant, details, constants = _freeze(variant, details, pinned[0])
    graphs = {
        section: package.read_section(section)
        for section in sorted({facts.graph for facts in variant.slices})
    }
    lanes = [
        Lane(
            number,
            pool.take(plan.activation_bytes),
            {
                section: open_slice_session(graph, intra_op_threads, constants, own_arena=vanilla)
                for section, graph in graphs.items()
            },
        )
        for number in range(threads)
    ]
    slots = [
        [pool.take(variant.tensor_bytes[t] * plan.max_batch) for t in variant.inputs]
        for _ in range(plan.input_slots)
    ]
    model = Model(
        digest=package.package.model_digest,
        name=manifest.name,
        variant=variant,
        details=details,
        plan=plan,
        store=store,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        input_slots=slots,
        lanes=lanes,
        session_count=threads * len(graphs),
    )
    _try_out(model)
    return model, pool


def _try_out(model: Model) -> None:
    """Run every distinct graph once at the largest batch, on whatever is in memory.

    The workspace was measured where the model was sealed, at batch 1 and 2, and extended to larger
    batches. Should kernels here need more, this is where it shows, before the first request and not
    during one.
    """
    inputs = model.input_slots[0] if model.input_slots else []
    for lane in model.lanes:
        tried = set()
        for number, facts in enumerate(model.variant.slices):
            if facts.graph in tried:
                continue
            tried.add(facts.graph)
            weights = model.store.pinned.get(number)
            weights = model.store.ring[0] if weights is None else weights
            try:
                lane.run_slice(model, number, model.plan.max_batch, weights, inputs)
            except Exception as error:  # ONNX Runtime's exceptions have no common base but this
                if "Available memory" in str(error):
                    raise BudgetError(
                        f"slice {number} of {model.name!r} needs more than the "
                        f"{model.plan.workspace_bytes} bytes of workspace planned for batch "
                        f"{model.plan.max_batch}; seal the model on a machine like this one"
                    ) from None
                # Anything else may be the data's fault, which is none: an index, say.
