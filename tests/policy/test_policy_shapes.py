"""Promise: threads share the work as suits the models, an enclave keeps the shape that it began
with, and what is predicted of several threads is what they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.policy.machine import MACHINE, MB, enclave, linear

from lasagna.policy.events import EnclaveReady, ModelAdded, ModelRemoved
from lasagna.policy.memory import divide_best
from lasagna.policy.plan import Style
from lasagna.policy.state import Settings

TWO = replace(MACHINE, lanes=2)
# Fits, and a row is short: two batches of one row beat one batch of two.
LIGHT = linear([MB], [10_000], [0.001])
# 200 MB of weights, and rows of 2 MB: what counts is how many rows each load serves.
HEAVY = linear([10 * MB] * 20, [2 * MB] * 20, [0.004] * 20)


@pytest.mark.parametrize(("costs", "lanes", "width"), [(LIGHT, 2, 1), (HEAVY, 1, 2)])
def test_threads_share_the_work_as_suits_the_model(costs, lanes, width) -> None:  # type: ignore[no-untyped-def]
    plan = divide_best({"a": (costs,)}, {}, TWO.shapes(), Style())
    assert (plan.lanes, plan.width) == (lanes, width)
    assert plan.total_bytes <= TWO.budget


def test_an_enclave_keeps_the_shape_that_it_began_with_and_its_successor_is_free() -> None:
    rig = enclave({"light": LIGHT}, TWO)
    plan = rig.scheduler.plan
    assert plan is not None
    assert plan.lanes == 2
    rig.models["heavy"] = HEAVY
    rig.tell(ModelAdded(rig.now_s, "heavy", (HEAVY,)))
    rig.tell(ModelRemoved(rig.now_s, "light"))
    for number in range(1, 41):
        rig.arrive(number, "heavy")
    rig.drain()
    assert len(rig.answered) == 40
    plan = rig.scheduler.plan
    assert plan is not None
    assert (set(plan.costs), plan.lanes) == ({"heavy"}, 2)
    rig.die()
    rig.tell(ModelAdded(rig.now_s, "light", (LIGHT,)))
    rig.tell(ModelRemoved(rig.now_s, "light"))
    rig.arrive(41, "heavy")
    rig.drain()
    assert 41 in rig.answered


def test_a_model_that_comes_between_two_enclaves_is_served_by_the_next() -> None:
    """Also where the last one's shape has no room for it: the next does not take that shape."""
    wide = linear([MB], [7 * MB], [0.001])
    rig = enclave({"light": LIGHT}, replace(TWO, budget=20 * MB))
    rig.lose()
    rig.models["wide"] = wide
    rig.tell(ModelAdded(rig.now_s, "wide", (wide,)))
    rig.tell(EnclaveReady(rig.now_s))
    for number, name in enumerate(("light", "wide"), 1):
        rig.arrive(number, name)
    rig.drain()
    assert set(rig.answered) == {1, 2}


@pytest.mark.parametrize("together", [False, True])
def test_the_expected_wait_is_what_the_work_takes(together: bool) -> None:
    """What is told to clients, and decides which deadlines can be met: with several threads too."""
    costs = linear([10_000], [2 * MB], [0.01])
    machine = TWO.shapes()[together]
    settings = Settings(queue_rows=1000, style=Style(together=False))
    rig = enclave({"a": costs}, machine, settings)
    for number in range(1, 201):
        rig.arrive(number, "a")
    expected_s, begin_s = rig.scheduler.backlog_s(rig.now_s), rig.now_s
    rig.drain()
    assert rig.now_s - begin_s == pytest.approx(expected_s, rel=0.15)


@pytest.mark.parametrize("together", [False, True])
def test_what_is_reported_as_left_falls_while_runs_are_under_way(together: bool) -> None:
    """Or whoever is almost done would look as busy as one that has just begun."""
    costs = linear([10_000], [2 * MB], [0.01])
    settings = Settings(queue_rows=1000, style=Style(together=False))
    rig = enclave({"a": costs}, TWO.shapes()[together], settings)
    for number in range(1, 101):
        rig.arrive(number, "a")
    all_s = rig.scheduler.backlog_s(rig.now_s)
    assert rig.scheduler.backlog_s(rig.now_s + all_s / 100) == pytest.approx(0.99 * all_s)
    # What waits is not done by time that passes, however long the runs take.
    assert rig.scheduler.backlog_s(rig.now_s + 10 * all_s) >= 0.5 * all_s
    rig.drain()
    assert rig.scheduler.backlog_s(rig.now_s) == 0.0


def test_a_run_counts_whole_that_has_just_begun_beside_one_that_is_almost_over() -> None:
    """Each run's time is its own; a lane that is free again has the next run's."""
    costs = linear([10_000], [2 * MB], [0.01])
    rig = enclave({"a": costs}, TWO, Settings(queue_rows=1000, style=Style(together=False)))
    rig.arrive(1, "a")
    row_s = rig.scheduler.backlog_s(rig.now_s)
    rig.until(rig.now_s + row_s / 2)
    rig.arrive(2, "a")
    # One of two lanes has done half a row's share of both.
    assert rig.scheduler.backlog_s(rig.now_s) == pytest.approx(1.75 * row_s)
    rig.die()
    assert rig.scheduler.backlog_s(rig.now_s) == pytest.approx(2 * row_s)
