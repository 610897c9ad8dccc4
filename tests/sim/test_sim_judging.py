"""Promise: of several plans the one that serves best in simulation is taken, or the simplest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import count

import pytest
from tests.sim.cases import MACHINE, MB, cluster, everywhere, model, servers

from lasagna.policy.cluster import Cluster
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions
from lasagna.policy.plan import Objective
from lasagna.sim import judging
from lasagna.sim.candidates import EARLIEST, Candidate, candidates
from lasagna.sim.judging import (
    LONG,
    MARGINS,
    ROUTES,
    Judged,
    Verdict,
    best_of,
    least_shares,
    plan_judged,
    promised,
)
from lasagna.sim.metrics import Figures
from lasagna.sim.planner import Planner

pytestmark = pytest.mark.slow

PLANNER = Planner()
SMALL = model(4, 0.01)
LARGE = model(6, 0.03, weight=12 * MB)


def judged(given: Cluster, options: PlanOptions) -> Judged:
    return plan_judged(given, options, planner=PLANNER)


def verdict(found: Judged) -> Verdict:
    return next(one for one in found.verdicts if one.candidate is found.best)


def two_models(mbit: float) -> Cluster:
    return cluster(servers(3, bandwidth=mbit * 125_000), {"a": SMALL, "b": LARGE}, rate=3.0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations of fewer requests, for tests of what is made of them."""
    monkeypatch.setattr(judging, "REQUESTS", 80)
    monkeypatch.setattr(judging, "SHORTEST_S", 0.5)
    monkeypatch.setattr(judging, "SETTLING_S", 0.0)
    monkeypatch.setattr(judging, "FULL_S", 0.5)


@cache
def of_two_models(objective: Objective, mbit: float) -> Judged:
    return judged(two_models(mbit), PlanOptions(objective, 2.0))


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("mbit", [1, 1000])
def test_no_plan_is_taken_that_loses_to_whole_models(objective: Objective, mbit: float) -> None:
    """In the same simulation, or by far; over slow links, where splitting costs most, too."""
    found = of_two_models(objective, mbit)
    plain = [one for one in found.verdicts if one.candidate.name == "whole models"]
    assert plain
    for one in plain:
        worth = 1.0 if one.candidate.rule == EARLIEST else 1 - MARGINS[objective]
        assert worth * one.value(objective) <= verdict(found).value(objective)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("mbit", [1, 1000])
def test_who_is_close_to_the_best_has_a_run_off(objective: Objective, mbit: float) -> None:
    """With several times as many requests. What wins it is taken, whoever led before."""
    found = of_two_models(objective, mbit)
    most = max(one.requests for one in found.verdicts)
    last = [one for one in found.verdicts if one.requests == most]
    assert len(last) > 1 or len(found.verdicts) == 1
    assert best_of(last, objective).candidate is found.best
    for one in found.verdicts:
        if one not in last:
            assert one.requests < most / (LONG - 1)
            assert one.value(objective) < 0.85 * max(other.value(objective) for other in last)


def test_luck_in_a_short_simulation_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these two choices of requests one favours another plan, until there are more of them."""
    given = cluster(servers(2), {"a": SMALL, "b": LARGE}, rate=20.0)

    def best(seed: int) -> tuple[str, str]:
        one = plan_judged(given, PlanOptions("latency", 1.0), planner=PLANNER, seed=seed).best
        return one.name, one.aim

    assert best(1) == best(6)
    monkeypatch.setattr(judging, "RUN_OFF", -1.0)
    assert best(1) != best(6)


def test_over_slow_links_nothing_is_split() -> None:
    given = cluster(servers(3, bandwidth=125_000), {"b": LARGE}, rate=0.5)
    found = judged(given, PlanOptions("latency", 1.0))
    assert {(part.first, part.last) for part in found.best.placement.parts} == {(0, 6)}


def test_without_time_only_the_simplest_and_the_plan_are_simulated() -> None:
    """A clock that runs ahead: of the others none is tried, and there still is a best one."""
    ticks = count()
    given = cluster(servers(3), {"a": SMALL, "b": LARGE}, rate=3.0)
    found = plan_judged(
        given, PlanOptions("latency", 3.0), clock=lambda: 10.0 * next(ticks), planner=PLANNER
    )
    assert 1 <= len(found.verdicts) <= 2
    assert len({one.requests for one in found.verdicts}) == 1, "there is no run-off"
    assert all(one.candidate.aim == "latency" for one in found.verdicts)
    assert found.best.placement.parts


def test_the_same_seed_gives_the_same_verdicts() -> None:
    given = cluster(servers(2), {"a": SMALL, "b": LARGE}, rate=3.0)
    once, again = (judged(given, PlanOptions("latency", 2.0)) for _ in range(2))
    assert [(v.mean_s, v.in_time) for v in once.verdicts] == [
        (v.mean_s, v.in_time) for v in again.verdicts
    ]
    assert once.best.name == again.best.name


def test_a_model_that_fits_no_server_whole_is_planned_all_the_same() -> None:
    """Then whole models are not among the candidates."""
    tiny = replace(MACHINE, budget=14 * MB)
    wide = replace(model(6, 0.03, weight=5 * MB), running_bytes=(6 * MB,) * 6)
    given = cluster(servers(2, tiny), {"a": wide}, rate=1.0)
    found = judged(given, PlanOptions("throughput", 2.0))
    assert {one.candidate.name for one in found.verdicts} <= {
        "plan for latency",
        "plan for throughput",
    }
    assert verdict(found).throughput > 0
    assert len(found.best.placement.parts) > 1


def test_a_plan_that_is_hardly_better_does_not_displace_a_simple_one() -> None:
    """Some percent may be chance."""
    given = cluster(servers(2), {"a": SMALL}, rate=1.0)
    plain = verdict(judged(given, PlanOptions("latency", 1.0)))
    other = replace(plain.candidate, placement=replace(plain.candidate.placement), name="other")
    some = replace(plain, in_time=0.8)
    cases: list[tuple[Objective, Verdict, dict[str, float], dict[str, float]]] = [
        ("throughput", some, {"in_time": 0.81}, {"in_time": 0.85}),
        ("latency", plain, {"mean_s": plain.mean_s * 0.99}, {"mean_s": plain.mean_s * 0.94}),
    ]
    for objective, one, close, far in cases:
        near = replace(one, candidate=other, **close)  # type: ignore[arg-type]
        better = replace(one, candidate=other, **far)  # type: ignore[arg-type]
        assert best_of([one, near], objective) is one
        assert best_of([one, better], objective) is better


def figures(count: int, answered: int, late: int = 0) -> Figures:
    return Figures(count, answered, late, 0, 0, count - answered, *[0.0] * 6)


@pytest.mark.parametrize(
    ("models", "shares"),
    [
        ([figures(100, 90), figures(50, 50, 20)], (0.9, 0.6)),
        ([figures(100, 90), figures(4, 0), figures(16, 16, 1)], (0.8, 0.75)),  # rare ones together
        ([figures(100, 90), figures(4, 0), figures(0, 0)], (90 / 104, 90 / 104)),
        ([figures(15, 15), figures(15, 15), figures(15, 0)], (30 / 45, 30 / 45)),
        ([figures(6, 3, 1)], (0.5, 1 / 3)),
        ([figures(0, 0)], (0.0, 0.0)),
    ],
)
def test_the_model_that_is_served_worst_counts_if_it_is_no_rare_one(
    models: list[Figures], shares: tuple[float, float]
) -> None:
    """Whether one of six requests is late is chance, and no reason to choose another plan."""
    assert least_shares(models) == pytest.approx(shares)


def made(
    name: str, placement: Placement, in_time: float, mean_s: float, answered: float = 1.0
) -> Verdict:
    candidate = Candidate(name, placement, "latency")
    return Verdict(candidate, 600, 1.0, answered, in_time, 1.0, mean_s)


def test_who_answers_more_in_time_is_better_whatever_the_mean() -> None:
    here = everywhere(cluster(servers(2), {"a": SMALL}))
    more, less = made("more", here, 0.52, 1.0), made("less", replace(here), 0.48, 0.8)
    for both in ([more, less], [less, more]):
        assert best_of(both, "latency") is more


def test_small_losses_do_not_add_up() -> None:
    """A little later than one that is a little later than whole models is too much later."""
    here = everywhere(cluster(servers(2), {"a": SMALL}))
    whole = made("whole models", here, 1.0, 1.0)
    later = made("later", replace(here), 0.992, 0.9)
    latest = made("latest", replace(here), 0.985, 0.8)
    assert best_of([whole, later, latest], "latency") is later


def test_where_next_to_nothing_is_in_time_the_mean_decides() -> None:
    """Four requests of a thousand more are chance, though they are twice as many."""
    here = everywhere(cluster(servers(2), {"a": SMALL}))
    lucky, quick = made("lucky", here, 0.008, 2.0), made("quick", replace(here), 0.004, 1.0)
    for both in ([lucky, quick], [quick, lucky]):
        assert best_of(both, "latency") is quick


def test_who_leaves_requests_unanswered_is_not_quick_for_it() -> None:
    """The mean is of answers: without those of a model that nobody serves it is lower."""
    here = everywhere(cluster(servers(2), {"a": SMALL}))
    starving = made("starving", here, 0.005, 0.1, answered=0.0)
    slow = made("slow", replace(here), 0.0, 2.0)
    for both in ([starving, slow], [slow, starving]):
        assert best_of(both, "latency") is slow


def test_who_refuses_what_would_be_late_is_no_worse_for_it() -> None:
    """More answers that come too late are none."""
    here = everywhere(cluster(servers(2), {"a": SMALL}))
    timely = made("timely", here, 0.8, 1.0, answered=0.8)
    late = made("late", replace(here), 0.7, 0.9, answered=0.85)
    for both in ([timely, late], [late, timely]):
        assert best_of(both, "latency") is timely


def test_each_model_on_servers_of_its_own_is_a_candidate() -> None:
    """Models that would page each other's weights out, in overload: the better way is taken."""
    large = model(6, 0.01, weight=14 * MB)
    given = cluster(servers(4), {"a": large, "b": large}, rate=10.0)
    found = judged(given, PlanOptions("throughput", 2.0))
    apart = next(one for one in found.verdicts if one.candidate.name == "models apart")
    parts = apart.candidate.placement.parts
    assert sorted(part.server for part in parts) == sorted(one.name for one in given.servers)
    assert {part.model for part in parts} == {"a", "b"}
    assert verdict(found).carried >= (1 - MARGINS["throughput"]) * apart.carried


def test_a_plan_with_the_parts_of_another_is_the_one_that_was_asked_for() -> None:
    """On one server both searches find the same parts; rates and promises are the objective's."""
    wide = replace(model(6, 0.03, weight=5 * MB), running_bytes=(6 * MB,) * 6)
    given = cluster(servers(1, replace(MACHINE, budget=14 * MB)), {"a": wide}, rate=1.0)
    for objective in ("throughput", "latency"):
        found, planned = candidates(given, PlanOptions(objective, 2.0), lambda: 0.0)
        assert {one.name for one in found} == {f"plan for {objective}"}
        assert all(one.placement is planned for one in found)


def test_the_winner_is_tried_with_other_rules_for_routes() -> None:
    """One that is better by more than chance is taken: here by turns, as all servers are equal."""
    given = cluster(servers(4), {"a": SMALL}, rate=100.0)
    found = judged(given, PlanOptions("latency", 1.0))
    most = max(one.requests for one in found.verdicts)
    by_rule = {
        one.candidate.rule: one
        for one in found.verdicts
        if one.requests == most
        and (one.candidate.name, one.candidate.aim) == (found.best.name, found.best.aim)
    }
    assert set(by_rule) == {EARLIEST, *ROUTES}
    least_s = min(one.mean_s for one in by_rule.values())
    assert by_rule[found.best.rule].mean_s <= least_s / (1 - MARGINS["latency"])


def test_for_throughput_the_model_counts_that_has_least_of_its_demand() -> None:
    """Many answers of a light model don't make up for a heavy one that has none."""
    given = cluster(servers(2), {"a": SMALL, "b": LARGE}, rate=1.0)
    given = replace(given, demand={"a": 50.0, "b": 1.0})
    found = judged(given, PlanOptions("throughput", 1.0))
    for one in found.verdicts:
        assert one.carried <= 1.05 * one.throughput / 51
    most = max(one.requests for one in found.verdicts)
    assert verdict(found).carried >= (1 - MARGINS["throughput"]) * max(
        one.carried for one in found.verdicts if one.requests == most
    )


@pytest.mark.parametrize(("limit_s", "least", "most"), [(1e-4, 0.0, 0.0), (0.2, 0.5, 1.0)])
def test_for_throughput_late_answers_do_not_count(
    limit_s: float, least: float, most: float
) -> None:
    """In overload those are refused that would be late, and the others are not."""
    given = cluster(servers(2), {"a": SMALL}, rate=20.0)
    free = verdict(judged(given, PlanOptions("throughput", 0.5)))
    limited = replace(given, limits_s={"a": limit_s})
    found = judged(limited, PlanOptions("throughput", 0.5))
    assert least * free.carried <= verdict(found).carried <= most * free.carried * 1.05


def test_a_huge_demand_is_not_simulated_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million requests a second for two seconds would take hours."""
    monkeypatch.setattr(judging, "MANY", 300)
    given = cluster(servers(2), {"a": SMALL}, rate=1e6)
    found = judged(given, PlanOptions("latency", 0.5))
    assert max(one.requests for one in found.verdicts) < 1.3 * 300 * LONG


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_what_is_promised_is_within_the_bound_of_the_search(objective: Objective) -> None:
    """Whoever wins: whole models' own scale is no bound on what could be reached."""
    given, found = two_models(1000), of_two_models(objective, 1000)
    for one in found.verdicts:
        promise = promised(given, replace(found, best=one.candidate), objective)
        assert promise.parts.keys() == one.candidate.placement.parts.keys()
        assert promise.bound.value >= max(promise.scale, found.planned.bound.value) - 1e-9
        assert promise.ceiling == found.planned.ceiling
