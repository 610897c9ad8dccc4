"""Promise: of several plans the one that serves best in simulation is taken, or the simplest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import count

import pytest
from tests.sim.cases import MACHINE, MB, cluster, model, servers

from lasagna.policy.cluster import Cluster
from lasagna.policy.placement import PlanOptions
from lasagna.policy.plan import Objective
from lasagna.sim import judging
from lasagna.sim.judging import LONG, Judged, Verdict, best_of, plan_judged
from lasagna.sim.planner import Planner

PLANNER = Planner()
SMALL = model(4, 0.01)
LARGE = model(6, 0.03, weight=12 * MB)


def judged(given: Cluster, options: PlanOptions) -> Judged:
    return plan_judged(given, options, planner=PLANNER)


def verdict(found: Judged) -> Verdict:
    return next(one for one in found.verdicts if one.candidate is found.best)


@cache
def of_two_models(objective: Objective, mbit: float) -> Judged:
    given = cluster(servers(3, bandwidth=mbit * 125_000), {"a": SMALL, "b": LARGE}, rate=3.0)
    return judged(given, PlanOptions(objective, 2.0))


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("mbit", [1, 1000])
def test_no_plan_is_taken_that_loses_to_whole_models(objective: Objective, mbit: float) -> None:
    """In the same simulation, or by far; over slow links, where splitting costs most, too."""
    found = of_two_models(objective, mbit)
    plain = [one for one in found.verdicts if one.candidate.name == "whole models"]
    assert plain
    for one in plain:
        assert not one.leads(verdict(found), objective, 0.0)


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
            assert any(other.leads(one, objective, 0.15) for other in last)


def test_luck_in_a_short_simulation_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these two choices of requests one favours another plan, until there are more of them."""
    given = cluster(servers(2), {"a": SMALL, "b": LARGE}, rate=20.0)

    def best(seed: int) -> tuple[str, str]:
        one = plan_judged(given, PlanOptions("latency", 1.0), planner=PLANNER, seed=seed).best
        return one.name, one.aim

    assert best(0) == best(1)
    monkeypatch.setattr(judging, "RUN_OFF", -1.0)
    assert best(0) != best(1)


def test_over_slow_links_nothing_is_split() -> None:
    given = cluster(servers(3, bandwidth=125_000), {"b": LARGE}, rate=0.5)
    found = judged(given, PlanOptions("latency", 2.0))
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
    close = Verdict(other, 600, plain.in_time, plain.throughput * 1.01, plain.mean_s * 0.99)
    far = Verdict(other, 600, plain.in_time, plain.throughput * 1.06, plain.mean_s * 0.94)
    for objective in ("throughput", "latency"):
        assert best_of([plain, close], objective) is plain
        assert best_of([plain, far], objective) is far


def test_in_overload_what_is_answered_counts_as_a_share_of_what_others_answer() -> None:
    """0.52 of the requests is 8 % more than 0.48, whatever the others' mean time is."""
    plain = verdict(
        judged(cluster(servers(2), {"a": SMALL}, rate=1.0), PlanOptions("latency", 0.5))
    )
    other = replace(plain.candidate, placement=replace(plain.candidate.placement))
    more = Verdict(plain.candidate, 600, 0.52, plain.throughput, plain.mean_s)
    less = Verdict(other, 600, 0.48, plain.throughput, 0.8 * plain.mean_s)
    assert not less.beats(more, "latency")
    assert more.beats(less, "latency")
