"""Promise: what the host plans fits the enclave as the enclave counts; what does not fit, or was
measured wrongly or elsewhere, is found when memory is arranged and not when a request runs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from lasagna.enclave import messages as m
from lasagna.enclave.arrangement import Arrangement, RefusedModelError
from lasagna.enclave.model import LoadedModel, Model
from lasagna.errors import BudgetError, InvalidInputError, ModelNotFoundError, PackageError
from lasagna.package.format import SliceFacts
from lasagna.package.forms import Form, boundary
from lasagna.policy.plan import Style
from lasagna.units import MIB, whole_pages

from .conftest import Sealed
from .placing import loaded_model, placed, planned

ROOMY = 60 * MIB


@pytest.fixture(scope="module")
def loaded(squeezenet: Sealed) -> LoadedModel:
    return loaded_model(squeezenet)


@pytest.mark.parametrize("staged", [True, False], ids=["staged", "one stage"])
@pytest.mark.parametrize(
    ("budget", "rows", "threads"),
    [
        (8_000_000, 1, 1),
        (12_000_000, 4, 1),
        (12_000_000, 32, 1),
        (16_000_000, 32, 2),
        (40_000_000, 8, 2),
        (60_000_000, 4, 1),
        (200_000_000, 8, 3),
    ],
)
def test_what_the_host_plans_the_enclave_has_room_for(
    loaded: LoadedModel, budget: int, rows: int, threads: int, staged: bool
) -> None:
    style = Style(staged=staged, max_rows=rows)
    plan, command = planned(loaded, budget, rows=rows, threads=threads, style=style)
    made = placed(loaded, command, budget)
    assert made.pool.used + made.workspace_bytes <= plan.total_bytes <= budget
    assert made.pool.size + made.workspace_bytes == budget
    stages = plan.stages["squeezenet"]
    assert sorted(made.models[loaded.digest].cuts) == [stage.first for stage in stages[1:]]
    pinned = [n for n in range(len(made.weights.pieces)) if made.weights.is_pinned(n)]
    assert pinned == sorted(plan.pinned["squeezenet"])


def test_a_cut_of_several_tensors_takes_what_the_plan_has_for_it(loaded: LoadedModel) -> None:
    """Rounded to pages once, not for each tensor: with many cuts that was more than was planned."""
    variant = loaded.variant
    count = len(variant.slices)
    cut = max(range(1, count), key=lambda n: len(boundary(variant, n)))
    sizes = [variant.tensor_bytes[tensor] for tensor in boundary(variant, cut)]
    assert len(sizes) > 1
    _, command = planned(loaded, ROOMY, rows=1, style=Style(staged=False, pin=False, whole=False))
    (wish,) = command.models
    stages = (m.StageWish(0, cut, 1, 0), m.StageWish(cut, count, 1, 3))
    whole = placed(loaded, command, ROOMY)
    cut_up = placed(loaded, replace(command, models=(replace(wish, stages=stages),)), ROOMY)
    assert cut_up.pool.used - whole.pool.used == whole_pages(3 * sum(sizes))


def starved(facts: SliceFacts) -> SliceFacts:
    return replace(facts, workspace=(1024,) * 4)


@pytest.mark.parametrize("form", [Form.SLICED, Form.WHOLE])
def test_workspace_that_was_measured_too_small_is_found_when_memory_is_arranged(
    squeezenet: Sealed, form: Form
) -> None:
    loaded = loaded_model(squeezenet)
    variant = loaded.variant
    slices = tuple(starved(facts) for facts in variant.slices)
    wrong = replace(variant, slices=slices, whole=starved(variant.whole))
    told = LoadedModel(
        loaded.digest,
        loaded.name,
        loaded.package,
        wrong,
        loaded.details,
        loaded.released,
        loaded.service,
    )
    _, command = planned(told, ROOMY, rows=2, form=form)
    with pytest.raises(RefusedModelError, match=r"slice \d+ of 'squeezenet' needs more") as refused:
        placed(told, command, ROOMY)
    assert refused.value.model == loaded.digest
    assert type(refused.value.reason) is BudgetError


def run_once(arrangement: Arrangement, model: Model) -> NDArray[np.float32]:
    """The first output for a ramp as the first input."""
    lane, weights = arrangement.lanes[0], arrangement.weights
    inputs = arrangement.input_slots[0] if arrangement.input_slots else None
    (place,) = lane.places(model, 1, inputs, model.variant.inputs)
    place.view(np.float32)[:] = np.linspace(0, 1, len(place) // 4, dtype=np.float32)
    loader = threading.Thread(target=weights.load_ahead, daemon=True)
    loader.start()
    course = weights.announce(model.base, model.base + len(model.variant.slices))
    for number in range(len(model.variant.slices)):
        slot = weights.acquire(0, course, model.base + number)
        lane.run_slice(model, number, 1, slot.memory, inputs)
        weights.release(course, slot)
    weights.close()
    loader.join(30)
    (out,) = lane.places(model, 1, inputs, model.variant.outputs)
    return out.view(np.float32).copy()


def test_all_forms_compute_the_same(loaded: LoadedModel, squeezenet: Sealed) -> None:
    """Constants that ONNX Runtime packs, inputs that it does not, and slices: one model."""
    answers = []
    for form, budget in (
        (Form.SLICED, 10 * MIB),
        (Form.SLICED, ROOMY),
        (Form.WHOLE, ROOMY),
        (Form.FROZEN, ROOMY),
        (Form.VANILLA, MIB),  # whatever memory it takes
    ):
        plan, command = planned(loaded, budget, form=form)
        assert plan.costs["squeezenet"].form == form
        made = placed(loaded, command, budget)
        answers.append(run_once(made, made.models[loaded.digest]))
    shape = squeezenet.manifest.inputs[0].row_shape
    ramp = np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    expected = squeezenet.expected({squeezenet.manifest.inputs[0].name: ramp})
    assert np.ptp(expected) > 0
    for answer in answers:
        np.testing.assert_allclose(answer, expected.ravel(), rtol=1e-4, atol=1e-6)


# What a hostile or mistaken host asks for.


def changed(command: m.Arrange, **to: object) -> m.Arrange:
    """Other sizes."""
    return replace(command, **to)


def wished(command: m.Arrange, **to: object) -> m.Arrange:
    """Another wish for its only model."""
    (wish,) = command.models
    return replace(command, models=(replace(wish, **to),))


@pytest.mark.parametrize(
    "stages",
    [
        [(1, None)],
        [(0, 2)],
        [(0, 2), (3, None)],
        [(0, 3), (2, None)],
        [(0, 3), (3, 3), (3, None)],
        [(0, None), (0, None)],
        [(0, 10_000)],
    ],
)
def test_stages_that_are_not_the_models_are_refused(
    loaded: LoadedModel, stages: list[tuple[int, int | None]]
) -> None:
    _, command = planned(loaded, ROOMY, form=Form.SLICED)
    count = len(loaded.variant.slices)
    asked = tuple(m.StageWish(first, last or count, 1, 0) for first, last in stages)
    with pytest.raises(InvalidInputError, match="stage"):
        placed(loaded, wished(command, stages=asked), ROOMY)


def test_a_division_beyond_the_budget_is_refused(loaded: LoadedModel) -> None:
    _, command = planned(loaded, 10 * MIB, form=Form.SLICED)
    count = len(loaded.variant.slices)
    greedy = (m.StageWish(0, 3, 1, 0), m.StageWish(3, count, 1, 2**16))
    for asked in (
        changed(command, workspace_bytes=11 * MIB),
        changed(command, activation_bytes=2**53),
        changed(command, ring_slots=64, slot_bytes=MIB),
        changed(command, input_slots=256, input_bytes=MIB),
        wished(command, pinned=tuple(range(count)), stages=greedy),
    ):
        with pytest.raises(BudgetError):
            placed(loaded, asked, 10 * MIB)


def test_memory_that_a_batch_does_not_fit_is_refused(loaded: LoadedModel) -> None:
    """ONNX Runtime would read and write beyond it: it is told addresses, and believes them."""
    _, command = planned(loaded, ROOMY, rows=4, form=Form.SLICED)
    assert command.input_slots
    with pytest.raises(InvalidInputError, match="rows in one batch"):
        placed(loaded, changed(command, activation_bytes=4096), ROOMY)
    with pytest.raises(InvalidInputError, match="rows in one batch"):
        placed(loaded, changed(command, input_bytes=command.input_bytes // 2), ROOMY)


def test_a_ring_that_a_slice_does_not_pass_through_is_refused(loaded: LoadedModel) -> None:
    _, command = planned(loaded, ROOMY, form=Form.SLICED)
    streamed = wished(command, pinned=())
    for slots, size in ((0, 0), (0, 10 * MIB), (2, 4096)):
        with pytest.raises(BudgetError, match="are to pass through"):
            placed(loaded, changed(streamed, ring_slots=slots, slot_bytes=size), ROOMY)


def test_unknown_models_and_the_same_one_twice_are_refused(loaded: LoadedModel) -> None:
    _, command = planned(loaded, ROOMY)
    (wish,) = command.models
    with pytest.raises(ModelNotFoundError):
        placed(loaded, wished(command, model=bytes(32)), ROOMY)
    with pytest.raises(InvalidInputError, match="twice"):
        placed(loaded, changed(command, models=(wish, wish)), ROOMY)


def test_a_model_that_takes_no_batches_runs_one_row_at_a_time(squeezenet: Sealed) -> None:
    """Its rows may depend on each other; those of two requests must not."""
    loaded = loaded_model(squeezenet)
    manifest = loaded.package.manifest
    loaded.package.manifest = replace(manifest, batchable=False)
    _, command = planned(loaded, ROOMY, rows=2, form=Form.SLICED)
    with pytest.raises(InvalidInputError, match="takes no batches"):
        placed(loaded, command, ROOMY)


def test_weights_of_another_package_are_found_when_they_are_pinned(squeezenet: Sealed) -> None:
    loaded = loaded_model(squeezenet)
    _, command = planned(loaded, ROOMY, form=Form.SLICED)
    loaded.package.manifest = replace(loaded.package.manifest, package_id=bytes(32))
    with pytest.raises(RefusedModelError, match="does not open") as refused:
        placed(loaded, command, ROOMY)
    assert type(refused.value.reason) is PackageError
