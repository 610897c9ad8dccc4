"""Promise: a division of the memory adds up to no more than there is, and covers every slice."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.machine import MB, linear

from lasagna.errors import BudgetError
from lasagna.policy import memory
from lasagna.policy.costs import Forms, ModelCosts
from lasagna.policy.memory import divide
from lasagna.policy.plan import mean_s
from lasagna.policy.stages import Machine, waiting_rows
from lasagna.units import whole_pages


def machine(budget: int, lanes: int = 1) -> Machine:
    return Machine(budget, lanes, 2, 3.4e9, 0.0002)


def forms(models: dict[str, ModelCosts]) -> dict[str, Forms]:
    return {name: (costs,) for name, costs in models.items()}


@st.composite
def chains(draw: st.DrawFn) -> ModelCosts:
    count = draw(st.integers(1, 8))
    return linear(
        draw(st.lists(st.integers(0, 20 * MB), min_size=count, max_size=count)),
        draw(st.lists(st.integers(1, 5 * MB), min_size=count, max_size=count)),
        draw(st.lists(st.floats(0.0, 0.1), min_size=count, max_size=count)),
        draw(st.sampled_from((1, 3, 32, 4096))),
    )


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), chains(), min_size=1),
    st.integers(1, 4),
    st.integers(1, 200 * MB),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.0, 100.0)),
)
def test_a_division_fits_or_is_refused(
    models: dict[str, ModelCosts], lanes: int, budget: int, demand: dict[str, float]
) -> None:
    try:
        plan = divide(forms(models), demand, machine(budget, lanes))
    except BudgetError:
        return
    assert plan.total_bytes <= budget
    pinned = streamed = 0
    for name, costs in models.items():
        stages = plan.stages[name]
        assert (stages[0].first, stages[-1].last) == (0, len(costs.slices))
        assert all(before.last == after.first for before, after in pairwise(stages))
        assert all(1 <= stage.rows <= costs.max_rows for stage in stages)
        held = [costs.bytes_at(stage.first, stage.last, stage.rows) for stage in stages]
        assert lanes * max(held) <= plan.running_bytes
        assert plan.frame_slots
        assert costs.cut_bytes[0] * stages[0].rows < plan.frame_bytes
        for number, one in enumerate(costs.slices):
            if number in plan.pinned[name]:
                pinned += whole_pages(one.weight_bytes)
            else:
                streamed = max(streamed, one.weight_bytes)
        for before, after in pairwise(stages):
            waits = costs.cut_bytes[after.first] * waiting_rows(before, after, lanes)
            assert waits <= plan.waiting_bytes
    assert pinned == plan.pinned_bytes
    assert streamed <= plan.slot_bytes
    assert bool(plan.ring_bytes) == bool(streamed)


def test_memory_at_cuts_has_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold models must not take, for rows that wait, what lets a hot one run in batches."""
    costs = linear(
        [MB, MB, *[8 * MB] * 6],
        [600_000, 10 * MB, *[800_000] * 6],
        [0.002, 0.004, *[0.001] * 6],
    )
    models = dict.fromkeys("abcdefg", costs)
    demand = dict.fromkeys(models, 1.0) | {"a": 14.0}
    one_core = Machine(50 * MB, 1, 1, 3.4e9, 0.0002)
    priced = divide(forms(models), demand, one_core)
    monkeypatch.setattr(memory, "PRICED_ROWS", ())
    plain = divide(forms(models), demand, one_core)
    assert mean_s(priced, demand) < 0.9 * mean_s(plain, demand)


def test_a_demand_of_next_to_nothing_is_one() -> None:
    """It decays while nobody asks, until a thousandth of it is nothing."""
    costs = linear([9 * MB] * 4, [200_000] * 4, [0.004] * 4)
    models = forms({"a": costs, "b": costs})
    assert divide(models, {"a": 5e-324}, machine(40 * MB)).total_bytes <= 40 * MB


def test_what_fits_is_pinned_and_runs_in_one_stage() -> None:
    small = linear([MB, 2 * MB], [1000, 1000], [0.001, 0.001])
    plan = divide({"a": (small,)}, {}, machine(60 * MB))
    assert plan.pinned["a"] == {0, 1}
    assert plan.ring_bytes == 0
    assert [(stage.first, stage.last) for stage in plan.stages["a"]] == [(0, 2)]


def test_the_hot_model_is_pinned_before_the_cold_ones() -> None:
    one = linear([5 * MB] * 4, [1000] * 4, [0.001] * 4)
    models = {"cold": one, "hot": one, "colder": one}
    plan = divide(forms(models), {"hot": 10.0, "cold": 1.0, "colder": 0.1}, machine(40 * MB))
    assert plan.pinned["hot"] == {0, 1, 2, 3}
    assert len(plan.pinned["colder"]) == 0


def test_a_shortage_is_named() -> None:
    with pytest.raises(
        BudgetError, match=r"'a' needs a budget of 8.1\d MB .* 5.00 MB.* slice 0 of 'a' take 6.00"
    ):
        divide({"a": (linear([6 * MB], [1000], [0.1]),)}, {}, machine(5 * MB))


@settings(deadline=None)
@given(chains(), st.integers(1, 3))
def test_the_budget_that_a_refusal_names_is_enough(costs: ModelCosts, lanes: int) -> None:
    with pytest.raises(BudgetError) as refused:
        divide({"a": (costs,)}, {}, machine(1, lanes))
    named = re.search(r"a budget of ([\d.]+) MB or more", str(refused.value))
    assert named
    budget = round(float(named[1]) * 1e6)
    assert divide({"a": (costs,)}, {}, machine(budget, lanes)).total_bytes <= budget
    with pytest.raises(BudgetError):
        divide({"a": (costs,)}, {}, machine(budget - 20_000, lanes))
