"""Promise: a plan is never worse than whole models everywhere, as servers would run both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from tests.policy.machine import MB, linear
from tests.policy.test_policy_placement import clusters

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Server, part_of
from lasagna.policy.costs import ModelCosts
from lasagna.policy.memory import divide_best
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import Style
from lasagna.policy.settle import Divisions, reckoned, settled
from lasagna.policy.spread import whole_models
from lasagna.policy.stages import Machine

QUICK = PlanOptions(time_limit_s=1.0)
NEVER = float("inf")
MACHINE = Machine(60 * MB, 2, 2, 3e9, 0.0003)


def two_formed() -> tuple[ModelCosts, ...]:
    """A model that takes half as long in one piece, which columns don't know."""
    costs = linear([2 * MB] * 4, [100_000] * 4, [0.01] * 4)
    whole = replace(
        linear([8 * MB], [100_000], [0.02]), form="whole", cut_bytes=(100_000, costs.cut_bytes[-1])
    )
    return costs, whole


def two_servers() -> Cluster:
    servers = (Server("a", MACHINE), Server("b", MACHINE))
    return Cluster(servers, {"m": two_formed()}, {"m": 1.0})


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(clusters())
def test_no_plan_is_worse_than_whole_models_everywhere(given_: Cluster) -> None:
    try:
        whole = whole_models(given_)
    except BudgetError:
        return
    found = reckoned(given_, whole, "throughput", Divisions(given_, lambda: 0.0, NEVER))
    assert found is not None
    assert plan_cluster(given_, QUICK).scale >= found[0] * (1 - 1e-3)


def test_what_servers_do_better_than_columns_counts() -> None:
    """One piece instead of four slices: the plan promises what the servers' planner does."""
    given_ = two_servers()
    columns = plan_cluster(given_, replace(QUICK, settled=False))
    plan = plan_cluster(given_, QUICK)
    assert plan.scale > 1.5 * columns.scale
    for server in given_.servers:
        forms = {p.key: part_of(given_.models["m"], p.first, p.last) for p in plan.on(server.name)}
        division = divide_best(forms, {}, server.machine.shapes(), Style())
        for part in plan.on(server.name):
            assert plan.parts[part].work_s == pytest.approx(division.request_s[part.key])


def test_a_bound_is_never_below_what_is_promised() -> None:
    plan = plan_cluster(two_servers(), QUICK)
    assert plan.scale <= plan.bound.value
    assert "servers' own planners do better" in plan.bound.how
    assert plan.scale <= plan.ceiling.value


def test_a_bound_on_latency_is_never_above_what_is_promised() -> None:
    """The same model, in one piece: quicker than any columns are."""
    options = replace(QUICK, objective="latency")
    columns = plan_cluster(two_servers(), replace(options, settled=False)).latency_bound
    plan = plan_cluster(two_servers(), options)
    assert plan.latency_bound is not None
    assert columns is not None
    assert plan.latency_bound.value <= min(plan.mean_s, columns.value)
    assert plan.latency_gap >= 0


def test_without_time_the_plan_is_what_columns_promise() -> None:
    given_ = two_servers()
    columns = plan_cluster(given_, replace(QUICK, settled=False))
    assert settled(given_, columns, "throughput", clock=lambda: 1.0, until_s=0.0) is columns
