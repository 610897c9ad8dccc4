"""Carrying out a division of the enclave's memory: pieces, sessions, and room at the cuts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final

import msgspec
import onnxruntime as ort

from lasagna.enclave import messages as m
from lasagna.enclave.cuts import Cut
from lasagna.enclave.model import Array, Lane, LoadedModel, Model
from lasagna.enclave.pieces import Piece, pieces_of
from lasagna.enclave.pool import Memory, Pool
from lasagna.enclave.sessions import open_slice_session, set_workspace_arena
from lasagna.enclave.spans import Recorder
from lasagna.enclave.weights import Weights
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    InvalidInputError,
    LasagnaError,
    ModelNotFoundError,
    PackageError,
)
from lasagna.package.format import CHUNK_BYTES, DTYPES, TAG_BYTES, Details, Variant
from lasagna.package.forms import Form, boundary, in_form

UNLIMITED: Final = 2**60


class RefusedModelError(Exception):
    """One model can't run in an arrangement that the others could run in."""

    def __init__(self, model: bytes, reason: LasagnaError) -> None:
        """Name the model and the reason."""
        super().__init__(str(reason))
        self.model = model
        self.reason = reason


@dataclass(slots=True)
class Arrangement:
    """What runs use.

    Attributes:
        models: by digest.
        weights: of all of them.
        lanes: one for every compute thread.
        input_slots: memory for opened inputs of runs that wait.
        frames: memory for runs on their way in.
        pool: where all memory comes from.
        workspace_bytes: of ONNX Runtime's arena.
    """

    models: Mapping[bytes, Model]
    weights: Weights
    lanes: Sequence[Lane]
    input_slots: Sequence[Memory]
    frames: Sequence[bytearray]
    pool: Pool
    workspace_bytes: int


@dataclass(slots=True)
class Sessions:
    """Sessions, kept from one arrangement to the next while their arena stays as it is."""

    shared_threads: bool = False
    _arena: int = -1
    _open: dict[tuple[bytes, int], ort.InferenceSession] = field(default_factory=dict)

    def arena(self, size: int) -> None:
        """Open sessions in an arena of this size from now on."""
        if size != self._arena:
            self._open.clear()  # they hold the old one
            set_workspace_arena(size)
            self._arena = size

    def of(
        self, loaded: LoadedModel, variant: Variant, constants: Mapping[str, Array], form: Form
    ) -> dict[int, ort.InferenceSession]:
        """The sessions of a model, by section."""
        found = {}
        for section in sorted({facts.graph for facts in variant.slices}):
            session = None if constants else self._open.get((loaded.digest, section))
            if session is None:
                graph = loaded.package.read_section(section)
                own_arena = form is Form.VANILLA
                session = open_slice_session(
                    graph, constants, own_arena=own_arena, shared_threads=self.shared_threads
                )
            if not constants:  # those are inside: they go with the arrangement
                self._open[loaded.digest, section] = session
            found[section] = session
        return found

    def forget(self, digest: bytes) -> None:
        """A model is gone."""
        for key in [key for key in self._open if key[0] == digest]:
            del self._open[key]


def arrange(
    command: m.Arrange,
    loaded: Mapping[bytes, LoadedModel],
    sessions: Sessions,
    recorder: Recorder,
    *,
    budget: int,
    threads: int,
) -> Arrangement:
    """Reserve memory, open sessions, and try every graph once.

    Args:
        command: the division.
        loaded: models whose keys are here, by digest.
        sessions: kept from arrangements before.
        recorder: of spans.
        threads: that compute, in all.
        budget: bytes of enclave memory in all. The vanilla form, being what others are compared
            with, is not held to it: whoever limits its memory pages.

    Raises:
        BudgetError: it does not fit.
        ModelNotFoundError: a model is not loaded.
        InvalidInputError: stages that are not the model's, or a batch that has no room.
        RefusedModelError: a model's weights or graphs do not open or do not run here, or need more
            memory than was planned.
    """
    vanilla = any(wish.form is Form.VANILLA for wish in command.models)
    if command.workspace_bytes > budget and not vanilla:
        raise BudgetError(f"a workspace of {command.workspace_bytes} bytes; the budget is {budget}")
    pool = Pool(UNLIMITED if vanilla else budget - command.workspace_bytes)
    bases, pieces = _number(command.models, loaded)
    largest = max((piece.size for piece in pieces), default=0)
    staging = min(CHUNK_BYTES, largest) + TAG_BYTES
    weights = Weights(
        pieces,
        [pool.take(command.slot_bytes) for _ in range(command.ring_slots)],
        [pool.take(staging) for _ in range(command.lanes + 1)],
        pool,
        recorder,
        width=threads // command.lanes,
        cores=command.cores,
    )
    lanes = [Lane(number, pool.take(command.activation_bytes)) for number in range(command.lanes)]
    slots = [pool.take(command.input_bytes) for _ in range(command.input_slots)]
    coming = [pool.buffer(command.frame_bytes) for _ in range(command.frame_slots)]
    sessions.arena(command.workspace_bytes)
    models = {}
    for wish, base in zip(command.models, bases, strict=True):
        with _about(wish.model, PackageError):
            models[wish.model] = _model(wish, loaded[wish.model], sessions, weights, base)
    slot = command.slot_bytes if command.ring_slots else -1
    streamed = max((p.size for n, p in enumerate(pieces) if not weights.is_pinned(n)), default=-1)
    if streamed > slot:
        raise BudgetError(
            f"slices of up to {streamed} bytes are to pass through {command.ring_slots} slots of "
            f"{command.slot_bytes}"
        )
    arrangement = Arrangement(models, weights, lanes, slots, coming, pool, command.workspace_bytes)
    for wish in command.models:
        with _about(wish.model, BudgetError, PackageError):
            _try_out(arrangement, models[wish.model], wish)
    return arrangement


@contextlib.contextmanager
def _about(model: bytes, *kinds: type[LasagnaError]) -> Iterator[None]:
    """Say of such errors that they are this model's, not the arrangement's."""
    try:
        yield
    except kinds as error:
        raise RefusedModelError(model, error) from None


def _number(
    wishes: Sequence[m.ModelWish], loaded: Mapping[bytes, LoadedModel]
) -> tuple[list[int], list[Piece]]:
    """Number the slices of all models through: where each begins, and the pieces."""
    bases, pieces = [], list[Piece]()
    for wish in wishes:
        model = loaded.get(wish.model)
        if model is None:
            raise ModelNotFoundError(f"no model {wish.model.hex()[:16]} is loaded here")
        if sum(other.model == wish.model for other in wishes) > 1:
            raise InvalidInputError(f"model {model.name!r} is named twice")
        bases.append(len(pieces))
        pieces += pieces_of(wish.model, model.package, in_form(model.variant, wish.form).slices)
    return bases, pieces


def _model(
    wish: m.ModelWish, loaded: LoadedModel, sessions: Sessions, weights: Weights, base: int
) -> Model:
    variant, details = in_form(loaded.variant, wish.form), loaded.details
    _check_stages(wish, variant)
    constants: dict[str, Array] = {}
    if wish.form is not Form.SLICED:
        details = msgspec.structs.replace(details, slices=(details.whole,))
        memory = weights.pin_now(base)
        if wish.form is not Form.WHOLE:
            details, constants = _freeze(details, memory)
    cuts = {}
    for number in sorted(set(wish.pinned)):
        if wish.form is Form.SLICED and number < len(variant.slices):
            weights.pin_now(base + number)
    for stage in wish.stages[1:]:
        sizes = [variant.tensor_bytes[tensor] for tensor in boundary(variant, stage.first)]
        # One piece for all tensors, as the plan has it: each would be rounded up to a page.
        memory = weights.pool.take(sum(sizes) * stage.held_rows)
        ends = [size * stage.held_rows for size in accumulate(sizes, initial=0)]
        memories = [memory[begin:end] for begin, end in pairwise(ends)]
        cuts[stage.first] = Cut(sizes, memories, stage.held_rows)
    opened = sessions.of(loaded, variant, constants, wish.form)
    return Model(loaded, wish.form, variant, details, opened, base, cuts)


def _check_stages(wish: m.ModelWish, variant: Variant) -> None:
    at = 0
    for stage in wish.stages:
        if stage.first != at or not stage.first < stage.last <= len(variant.slices):
            raise InvalidInputError(
                f"a stage of slices {stage.first} to {stage.last}; the next begins at {at}, and "
                f"the model has {len(variant.slices)}"
            )
        at = stage.last
    if at != len(variant.slices):
        raise InvalidInputError(f"the stages end at {at}, the model at {len(variant.slices)}")


def _freeze(details: Details, weights: Memory) -> tuple[Details, dict[str, Array]]:
    """The whole with its weights as constants: nothing is bound to a run but activations."""
    (inner,) = details.slices
    values: dict[str, Array] = {}
    for spec in inner.weights:
        flat = weights[spec.offset : spec.offset + spec.size]
        values[spec.name] = flat.view(DTYPES[spec.dtype]).reshape(spec.shape)
    return msgspec.structs.replace(
        details, slices=(msgspec.structs.replace(inner, weights=()),)
    ), values


def _try_out(arrangement: Arrangement, model: Model, wish: m.ModelWish) -> None:
    """Run every distinct graph once at the largest batch, on whatever is in memory.

    The workspace was measured where the model was sealed, at batch 1 and 2, and extended to larger
    batches. Should kernels here need more, this is where it shows, before the first request and not
    during one.

    Raises:
        BudgetError: the workspace is too small.
    """
    inputs = arrangement.input_slots[0] if arrangement.input_slots else None
    for lane in arrangement.lanes:
        tried = set()
        for stage in wish.stages:
            model.require(stage.first, stage.last, stage.rows, lane.activations, inputs)
            for number in range(stage.first, stage.last):
                graph = model.variant.slices[number].graph
                if (graph, stage.rows) in tried:
                    continue
                tried.add((graph, stage.rows))
                weights = _some_weights(arrangement, model, number)
                try:
                    lane.run_slice(
                        model, number, stage.rows, weights, None if stage.first else inputs
                    )
                except EnclaveError as error:
                    if "workspace" in str(error):
                        raise BudgetError(
                            f"slice {number} of {model.loaded.name!r} needs more than the "
                            f"{arrangement.workspace_bytes} bytes of workspace planned for batch "
                            f"{stage.rows}; seal the model on a machine like this one"
                        ) from None
                    # Anything else may be the data's fault, which is none: an index, say.


def _some_weights(arrangement: Arrangement, model: Model, number: int) -> Memory:
    weights = arrangement.weights
    if weights.is_pinned(model.base + number):
        return weights.memory_of(model.base + number)
    return weights.ring[0]
