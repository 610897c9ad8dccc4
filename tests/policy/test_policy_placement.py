"""Promise: a placement fits, serves every model, is about the best, and says what it reaches."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.policy.machine import MB, linear

from lasagna.errors import BudgetError, UsageError
from lasagna.policy import placement
from lasagna.policy.cluster import Cluster, Part, Server, is_chain, part_of, sliced
from lasagna.policy.columns import Column, columns_of, cuts_of, kinds_of
from lasagna.policy.costs import ModelCosts
from lasagna.policy.flow import BUSY, Choice, chosen, fits, free_of_charge, relaxed
from lasagna.policy.memory import divide_best
from lasagna.policy.placed import Placement, connected
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import OBJECTIVES, Style
from lasagna.policy.promise import ceiling_of, lengths_of
from lasagna.policy.stages import Machine

MACHINE = Machine(40 * MB, 1, 1, 3e9, 0.0003)
QUICK = PlanOptions(time_limit_s=1.0)


def server(name: str, budget: int = 40 * MB, **facts: float) -> Server:
    return Server(name, replace(MACHINE, budget=budget), **facts)


def cluster(
    servers: list[Server], models: dict[str, ModelCosts], rate: float = 1.0, **facts: object
) -> Cluster:
    forms = {name: (costs,) for name, costs in models.items()}
    return Cluster(
        tuple(servers),
        forms,
        dict.fromkeys(models, rate),
        **facts,  # type: ignore[arg-type]
    )


def two_faced() -> ModelCosts:
    """Early slices need memory for rows, late ones for weights."""
    return linear(
        [MB, MB, 10 * MB, 10 * MB, 10 * MB, 10 * MB],
        [6 * MB, 4 * MB, MB, 100_000, 100_000, 50_000],
        [0.02, 0.02, 0.004, 0.002, 0.002, 0.002],
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    models = {}
    for name in "ab"[: draw(st.integers(1, 2))]:
        count = draw(st.integers(1, 5))
        models[name] = linear(
            draw(st.lists(st.integers(1, 12 * MB), min_size=count, max_size=count)),
            draw(st.lists(st.integers(1000, 3 * MB), min_size=count, max_size=count)),
            draw(st.lists(st.floats(0.001, 0.05), min_size=count, max_size=count)),
        )
    servers = [
        server(
            f"s{number}",
            draw(st.integers(8, 80)) * MB,
            speed=draw(st.sampled_from((0.5, 1.0, 2.0))),
            bandwidth=draw(st.sampled_from((1.25e6, 12.5e6, 125e6))),
        )
        for number in range(draw(st.integers(1, 4)))
    ]
    return cluster(servers, models)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(clusters())
def test_each_slice_is_somewhere_and_each_server_can_hold_what_it_gets(given_: Cluster) -> None:
    """Every model has chains, every server's own planner accepts its parts, bounds hold."""
    try:
        placement = plan_cluster(given_, QUICK)
    except BudgetError:
        return
    lengths = lengths_of(given_)
    for model, parts in connected(placement.parts, lengths).items():
        assert parts, model
    for one in given_.servers:
        parts = placement.on(one.name)
        if parts:
            forms = {
                part.key: part_of(given_.models[part.model], part.first, part.last, one.speed)
                for part in parts
            }
            plan = divide_best(forms, {}, one.machine.shapes(), Style())
            assert plan.total_bytes <= one.machine.budget
    assert 0 < placement.scale <= placement.bound.value * (1 + 1e-6)
    assert placement.scale <= placement.ceiling.value * (1 + 1e-6)
    assert_flows(given_, placement)


def assert_flows(given_: Cluster, placement: Placement) -> None:
    """What comes to a cut leaves it, and no server or link is asked for more than it has."""
    for model, length in lengths_of(given_).items():
        for cut in range(length + 1):
            ends = [(p, c) for p, c in placement.parts.items() if p.model == model]
            come = sum(c.rate for p, c in ends if p.last == cut)
            leave = sum(c.rate for p, c in ends if p.first == cut)
            if 0 < cut < length:
                assert come == pytest.approx(leave, abs=1e-6)
            elif not cut:
                assert leave == pytest.approx(placement.scale * given_.demand[model], rel=1e-6)
    for one in given_.servers:
        parts = [placement.parts[part] for part in placement.on(one.name)]
        assert sum(costs.rate * costs.work_s for costs in parts) <= 1 + 1e-6
        assert sum(costs.rate * costs.in_bytes for costs in parts) <= one.bandwidth * (1 + 1e-6)
        assert sum(costs.rate * costs.out_bytes for costs in parts) <= one.bandwidth * (1 + 1e-6)


def every_choice(given_: Cluster, columns: list[Column]) -> float:
    """The best scale by trying all: for each server, every set of columns that none can join."""
    kinds = [kinds_of(given_.servers).index(one) for one in given_.servers]
    options = []
    for one, kind in zip(given_.servers, kinds, strict=True):
        mine = [column for column in columns if column.kind == kind]
        sets = [
            those
            for size in range(1, 4)
            for those in combinations(mine, size)
            if fits(one, those)
            and (size == 3 or not any(fits(one, [*those, c]) for c in mine if c not in those))
        ]
        options.append(sets or [()])
    best = 0.0
    for those in product(*options):
        flows = chosen(given_, Choice(those), "throughput")
        best = max(best, flows.scale if flows is not None else 0.0)
    return best


@pytest.mark.parametrize("budgets", [(20, 30), (16, 24), (34, 18)])
def test_the_exact_way_finds_what_trying_all_finds(budgets: tuple[int, int]) -> None:
    """The oracle: no choice of columns on two servers carries more than the integer program's."""
    costs = linear([6 * MB, 9 * MB, 9 * MB], [3 * MB, MB, 200_000], [0.02, 0.01, 0.004])
    given_ = cluster([server("a", budgets[0] * MB), server("b", budgets[1] * MB)], {"m": costs})
    columns = columns_of(given_, {"m": cuts_of(costs)})
    exact = plan_cluster(given_, PlanOptions(exact=True))
    assert exact.scale == pytest.approx(every_choice(given_, columns), rel=1e-3)
    assert plan_cluster(given_, QUICK).scale >= 0.92 * exact.scale


def test_a_model_larger_than_each_server_is_spread_over_them() -> None:
    """Where weights fit together but not alone, each server pins a part and nothing is streamed."""
    costs = linear([20 * MB] * 4, [100_000] * 4, [0.001] * 4)
    given_ = cluster([server(f"s{n}", 48 * MB) for n in range(4)], {"m": costs})
    placement = plan_cluster(given_, QUICK)
    assert {part.last - part.first for part in placement.parts} <= {1, 2, 3}
    alone = plan_cluster(cluster([server("s", 48 * MB)], {"m": costs}), QUICK)
    assert placement.scale > 4.2 * alone.scale


def test_over_slow_links_one_server_a_request_is_right() -> None:
    """A cut of 1 MB takes 8 s at 1 Mbit/s: no route may cross one, whatever it saves."""
    slow = [server(f"s{n}", bandwidth=125e3) for n in range(3)]
    costs = linear([10 * MB] * 3, [1000, MB, MB], [0.01] * 3)
    for objective in ("throughput", "latency"):
        placement = plan_cluster(
            cluster(slow, {"m": costs}), PlanOptions(objective, time_limit_s=1.0)
        )
        assert {(part.first, part.last) for part in placement.parts} == {(0, 3)}


def test_latency_is_what_the_latency_objective_makes_small() -> None:
    """For the same demand it promises no more seconds than the plan for throughput does."""
    servers = [server("slow", 60 * MB, speed=0.5), server("fast", 60 * MB, speed=2.0)]
    given_ = cluster(servers, {"m": two_faced()}, rate=2.0)
    fast = plan_cluster(given_, PlanOptions("latency", time_limit_s=1.0))
    much = plan_cluster(given_, QUICK)
    assert fast.latency_s["m"] <= much.latency_s["m"] + 1e-9
    assert much.scale >= fast.scale * (1 - 1e-6)


def test_a_plan_for_latency_says_what_its_parts_can_carry() -> None:
    """Rates are the demand's; the scale is at what the one server works all the time."""
    given_ = cluster([server("a")], {"m": linear([MB], [1000], [0.01])}, rate=2.0)
    plan = plan_cluster(given_, PlanOptions("latency", time_limit_s=1.0))
    (costs,) = plan.parts.values()
    assert costs.rate == pytest.approx(2.0)
    assert plan.scale == pytest.approx(1 / (2.0 * costs.work_s))
    assert plan.throughput == pytest.approx(1 / costs.work_s)
    assert plan.bottleneck == "a's processors"


def test_the_mean_latency_is_of_requests_not_of_models() -> None:
    """A model that is asked for nine times as often counts nine times as much."""
    quick, slow = linear([MB], [1000], [0.001]), linear([MB], [1000], [0.02])
    models = {"quick": quick, "slow": slow}
    given_ = replace(cluster([server("a")], models), demand={"quick": 9.0, "slow": 1.0})
    for objective in OBJECTIVES:
        plan = plan_cluster(given_, PlanOptions(objective, time_limit_s=1.0))
        mean_s = 0.9 * plan.latency_s["quick"] + 0.1 * plan.latency_s["slow"]
        assert plan.mean_s == pytest.approx(mean_s)


def test_a_demand_that_nobody_can_serve_has_no_latency_and_no_bound_on_it() -> None:
    """Then the plan is one for throughput, with its bound."""
    given_ = cluster([server("a")], {"m": two_faced()}, rate=1000.0)
    fast = plan_cluster(given_, PlanOptions("latency", time_limit_s=1.0, settled=False))
    assert fast.mean_s == float("inf")
    assert (fast.latency_bound, fast.latency_gap) == (None, 0.0)
    assert fast.scale <= fast.bound.value * (1 + 1e-6) < 1


@pytest.mark.slow
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(clusters(), st.floats(0.01, 30.0))
def test_no_plan_is_faster_than_the_bound(given_: Cluster, rate: float) -> None:
    """Neither the exact one, nor the quick one, nor what servers' own planners make of it."""
    given_ = replace(given_, demand=dict.fromkeys(given_.models, rate))
    ways = [PlanOptions("latency", 1.0, settled=settled) for settled in (False, True)]
    if len(given_.servers) < 3:
        ways.append(PlanOptions("latency", exact=True))
    for options in ways:
        try:
            plan = plan_cluster(given_, options)
        except BudgetError:
            continue
        if plan.latency_bound is None:
            assert plan.scale < 1 / BUSY or options.settled
            continue
        assert plan.latency_bound.value > 0
        assert plan.latency_gap >= -1e-6
        if plan.mean_s < float("inf"):
            assert plan.scale >= 1
            assert plan.scale <= plan.bound.value * (1 + 1e-6)


def test_a_large_cluster_finds_a_plan_where_its_first_one_is_too_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What just carries the demand has no time for waits; another server has, and is found."""
    monkeypatch.setattr(placement, "SMALL", 0)
    costs = two_faced()
    given_ = cluster([server("a", 60 * MB), server("b", 60 * MB)], {"m": costs})
    columns = columns_of(given_, {"m": cuts_of(costs)}, lone=True)
    whole = next(one for one in columns if (one.first, one.last) == (0, len(costs.slices)))
    begin = Choice(((whole,), ()))
    most = chosen(given_, begin, "throughput")
    assert most is not None
    asked = replace(given_, demand={"m": most.scale / 1.1})
    assert chosen(asked, begin, "latency") is None
    search = placement._Search(asked, PlanOptions("latency"), lambda: 0.0, free_of_charge)
    _, flows = search._improved(begin, dict.fromkeys(range(2), columns), "latency", 1.0)
    assert flows is not None
    assert flows.scale >= 1.0


def test_plans_for_throughput_have_no_bound_on_latency() -> None:
    plan = plan_cluster(cluster([server("a")], {"m": two_faced()}), QUICK)
    assert (plan.latency_bound, plan.latency_gap) == (None, 0.0)


def test_limits_on_latency_are_kept_or_refused() -> None:
    """A limit below what any server needs is an error that names it; a loose one costs nothing."""
    given_ = cluster([server("a"), server("b")], {"m": two_faced()})
    free = plan_cluster(given_, QUICK)
    loose = plan_cluster(replace(given_, limits_s={"m": 10.0}), QUICK)
    assert loose.scale >= 0.8 * free.scale  # servers may not be busy all the time
    with pytest.raises(BudgetError, match=r"latency limits .*m 1 ms"):
        plan_cluster(replace(given_, limits_s={"m": 0.001}), QUICK)


def test_what_fits_nowhere_is_said() -> None:
    """A slice that no server can even stream is named, with what to do."""
    costs = linear([100 * MB], [1000], [0.01])
    with pytest.raises(BudgetError, match=r"'m' can't be placed.*--slice-bytes"):
        plan_cluster(cluster([server("a")], {"m": costs}), QUICK)


@pytest.mark.parametrize("others", [1, 20])
def test_a_server_too_small_for_anything_gets_nothing(others: int) -> None:
    """The others have all the work, and nobody fails."""
    model = linear([4 * MB] * 2, [100_000] * 2, [0.01] * 2)
    large = [server(f"s{n}", 30 * MB) for n in range(others)]
    plan = plan_cluster(cluster([server("small", 200_000), *large], {"m": model}))
    assert {part.server for part in plan.parts} == {one.name for one in large}


@pytest.mark.slow
def test_many_models_find_room_on_few_servers() -> None:
    """Where shares of time can't be rounded, every model still gets a chain."""
    costs = linear([4 * MB] * 3, [200_000] * 3, [0.003] * 3)
    models = {f"m{n}": costs for n in range(12)}
    placement = plan_cluster(cluster([server("a", 30 * MB), server("b", 30 * MB)], models), QUICK)
    assert placement.scale > 0
    assert all(connected(placement.parts, dict.fromkeys(models, 3)).values())


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(clusters())
def test_no_flow_exceeds_the_bounds(given_: Cluster) -> None:
    """The linear program's value is above a plan's, and the hardware's above both."""
    columns = columns_of(given_, {n: cuts_of(sliced(f)) for n, f in given_.models.items()})
    try:
        plan = plan_cluster(given_, replace(QUICK, settled=False))
    except BudgetError:
        return
    most = relaxed(given_, columns, "throughput")
    assert most is not None
    assert plan.scale <= most[0].scale * (1 + 1e-6)
    assert most[0].scale <= ceiling_of(given_).value * (1 + 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"servers": ()}, "needs a server"),
        ({"servers": (server("a"), server("a"))}, "two servers are called 'a'"),
        ({"demand": {"m": 1.0, "x": 1.0}}, "demand for 'x'"),
        ({"demand": {"m": -1.0}}, "must be 0 or more"),
        ({"demand": {"m": 0.0}}, "a demand above 0"),
        ({"limits_s": {"x": 1.0}}, "latency limit for 'x'"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(change: dict[str, object], words: str) -> None:
    """Each mistake is named."""
    good = cluster([server("a")], {"m": two_faced()})
    with pytest.raises(UsageError, match=words):
        replace(good, **change)  # type: ignore[arg-type]


def test_chains_are_told_from_loose_parts() -> None:
    """Parts that lead nowhere, or that nothing leads to, are no use to a request."""
    parts = [Part("m", 0, 2, "a"), Part("m", 2, 4, "b"), Part("m", 1, 4, "c"), Part("m", 0, 3, "d")]
    assert connected(parts, {"m": 4}) == {"m": parts[:2]}
    assert is_chain(parts[:2], 4)
    assert not is_chain(parts[:1], 4)
    assert not is_chain([], 4)
