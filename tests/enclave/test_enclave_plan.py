"""Promise: a plan never exceeds its budget, and what does not fit is refused with the reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.enclave.plan import choose_pinned, freeze_plan, live_at_cut, make_plan, workspace_at
from lasagna.errors import BudgetError
from lasagna.models.arrange import arrange, lifetimes
from lasagna.package.format import PROFILE_BATCHES, SliceFacts, Variant
from lasagna.units import parse_bytes

sizes = st.integers(1, 5_000_000)


def facts(
    weight: int, inputs: tuple[int, ...], outputs: tuple[int, ...], **more: object
) -> SliceFacts:
    return SliceFacts(
        graph=0,
        weights=(0,),
        weight_bytes=weight,
        inputs=inputs,
        outputs=outputs,
        layers=1,
        workspace=more.get("workspace", (1000, 2000, 4000, 8000)),  # type: ignore[arg-type]
        compute_s=more.get("compute_s", ()),  # type: ignore[arg-type]
    )


def chain(weights: list[int], tensors: list[int]) -> Variant:
    """A model in which slice k reads tensor k and writes tensor k + 1."""
    slices = tuple(facts(weight, (k,), (k + 1,)) for k, weight in enumerate(weights))
    places = arrange(tensors, lifetimes([0], [len(weights)], slices))
    whole = facts(sum(weights), (0,), (len(weights),))
    return Variant(
        name="test",
        block=0,
        details=0,
        tensor_bytes=tuple(tensors),
        inputs=(0,),
        outputs=(len(weights),),
        slices=slices,
        places=places,
        whole=whole,
        whole_places=places,
        frozen=0,
    )


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    count = draw(st.integers(1, 12))
    tensors = draw(st.lists(sizes, min_size=count + 1, max_size=count + 1))
    return chain(draw(st.lists(sizes, min_size=count, max_size=count)), tensors)


def _stated(error: BudgetError) -> int:
    """The budget that would do, as the refusal says it."""
    return parse_bytes(str(error).split("a budget of ")[1].split(" or more")[0])


@given(variants(), st.integers(1, 60_000_000), st.integers(1, 3), st.integers(1, 16), st.booleans())
def test_a_plan_keeps_to_its_budget_or_is_refused(
    variant: Variant, budget: int, threads: int, batch: int, pin: bool
) -> None:
    try:
        plan = make_plan(variant, budget, threads, batch, name="m", pin=pin)
    except BudgetError as error:
        assert _stated(error) > budget  # noqa: PT017 - a property: both ends are right
        return
    assert plan.total_bytes <= budget
    assert 1 <= plan.max_batch <= batch
    streamed = set(range(len(variant.slices))) - plan.pinned
    assert bool(streamed) == bool(plan.ring_slots)
    assert all(variant.slices[n].weight_bytes <= plan.slot_bytes for n in streamed)
    assert plan.pinned_bytes >= sum(variant.slices[n].weight_bytes for n in plan.pinned)
    if not pin:
        assert not plan.pinned
    frozen = freeze_plan(plan, threads, budget)
    if frozen is not None:
        assert not plan.ring_slots
        assert frozen.total_bytes == plan.total_bytes + frozen.session_bytes <= budget
        assert frozen.session_bytes >= 2 * threads * plan.weight_bytes


def test_the_refusal_names_bytes_and_slices() -> None:
    variant = chain([1000, 5_000_000, 1000], [100, 200, 300, 400])
    with pytest.raises(
        BudgetError,
        match=r"'m' .* it has 1\.00 MB\. .* 50000\d\d for the weights of one slice \(slice 1\)",
    ):
        make_plan(variant, 1_000_000, 1, 1, name="m")


def test_the_refusal_states_a_budget_that_then_works() -> None:
    variant = chain([70_000, 50_000], [1000, 200_000, 300])
    with pytest.raises(BudgetError, match="needs a budget of") as caught:
        make_plan(variant, 1, 1, 1)
    stated = _stated(caught.value)
    assert make_plan(variant, stated, 1, 1).total_bytes <= stated
    with pytest.raises(BudgetError):
        make_plan(variant, stated - 10_000, 1, 1)


@given(
    st.lists(st.tuples(sizes, st.floats(0, 0.1)), min_size=1, max_size=30),
    st.integers(0, 50_000_000),
    st.integers(1, 20_000_000),
)
def test_pins_fit_their_room_and_waste_none_that_a_slice_would_fit(
    slices: list[tuple[int, float]], room: int, ring: int
) -> None:
    variant = [facts(size, (0,), (1,), compute_s=(seconds,) * 4) for size, seconds in slices]
    pinned = choose_pinned(variant, room, ring)
    aligned = [-(-size // 64) * 64 for size, _ in slices]
    used = sum(aligned[n] for n in pinned)
    assert used <= room
    assert all(aligned[n] > room - used for n in range(len(slices)) if n not in pinned)


def test_streamed_slices_are_spread_over_the_cycle() -> None:
    """Ten equal slices, room for five: a run of five streamed ones would wait for the loader."""
    variant = [facts(1_000_000, (0,), (1,), compute_s=(0.01,) * 4) for _ in range(10)]
    pinned = choose_pinned(variant, 5_000_064, 2_000_000)
    streamed = sorted(set(range(10)) - pinned)
    gaps = [b - a for a, b in zip(streamed, [*streamed[1:], streamed[0] + 10], strict=True)]
    assert max(gaps) <= 3


def test_slices_that_compute_long_are_streamed_rather_than_those_that_compute_short() -> None:
    slow = [facts(1_000_000, (0,), (1,), compute_s=(0.1,) * 4) for _ in range(4)]
    fast = [facts(1_000_000, (0,), (1,), compute_s=(0.001,) * 4) for _ in range(4)]
    pinned = choose_pinned([*slow, *fast], 4_000_256, 1_000_000)
    assert len(pinned & {4, 5, 6, 7}) >= 3


def test_workspace_between_and_beyond_what_was_measured() -> None:
    slice_ = facts(1, (0,), (1,), workspace=(10, 20, 40, 80))
    assert [workspace_at(slice_, b) for b in (*PROFILE_BATCHES, 3, 16)] == [10, 20, 40, 80, 40, 160]


def test_tensors_that_cross_a_cut() -> None:
    slices = (facts(1, (0,), (1, 2)), facts(1, (1,), (3,)), facts(1, (2, 3), (4,)))
    places = arrange([1] * 5, lifetimes([0], [4], slices))
    variant = Variant("t", 0, 0, (1,) * 5, (0,), (4,), slices, places, slices[0], places, 0)
    assert [live_at_cut(variant, cut) for cut in range(4)] == [(0,), (1, 2), (2, 3), (4,)]
