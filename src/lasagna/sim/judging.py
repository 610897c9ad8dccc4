"""Plans judged by simulation: the last word belongs to the policies that will run them.

The planner's model reckons with full batches, and with queues of each server for itself. How
batches fill at a given load, and what routes make of that, only a simulation of the very schedulers
and balancers shows. So a few plans of different kinds are each given the same requests, and the
best of them is taken. Whole models on every server are among them: no plan is taken that loses to
that. Those that come close to the best have a run-off with other and more requests: what is best of
a dozen in a short simulation has had luck, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import OBJECTIVES, Objective, Style, style_for
from lasagna.policy.spread import whole_models
from lasagna.sim.arrivals import poisson, requests
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import roomy

REQUESTS: Final = 600
"""Of one simulation: a mean within some percent."""
SHORTEST_S: Final = 2.0
"""Of virtual time: some batches of each server."""
LONGEST_S: Final = 60.0
"""Of virtual time, unless there would be too few requests."""
FEW: Final = 20
"""Requests of a simulation at least, where they are rare."""
REPORTS: Final = 2000
"""Of each server in a simulation at most: where requests are rare, little changes between them."""
OVERLOAD: Final = 1.2
"""Times what the best plan promises: more than any of them can answer."""
REPORT_S: Final = Options().report_s
STYLES: Final[Mapping[str, Style]] = {
    "throughput": style_for("throughput"),
    "latency": style_for("latency"),
    "lone requests": replace(style_for("latency"), max_rows=1),
    "single rows": replace(style_for("throughput"), max_rows=1),
}
"""By what servers' own planners work for. Without batches there is more room for weights."""
WARM: Final = 0.2
"""Share of the requests that come first and don't count at a load that can be carried."""
MARGIN: Final = 0.04
"""By which a plan must be better than a simpler one: less may be chance."""
CLOSE: Final = 0.3
"""By which the best must be better than another in a short simulation, for that to be out."""
LONG: Final = 5
"""Times as many requests in the run-off."""
SHARES: Final = (0.4, 1.0)
"""Of the time, at which the search for one plan, and for the other, is over."""
JUDGING: Final = 2.0
"""Times the search's time, after which no other short simulation begins."""
RUN_OFF: Final = 3.0
"""Times the search's time, after which no other long one begins."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a cluster.

    Attributes:
        name: how it came about.
        placement: of parts.
        aim: what servers' own planners work for, one of ``STYLES``.
    """

    name: str
    placement: Placement
    aim: str

    @property
    def style(self) -> Style:
        """In which servers' own planners divide memory."""
        return STYLES[self.aim]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a simulation says of a candidate.

    Attributes:
        candidate: it.
        requests: that it was given. Verdicts on as many are comparable.
        in_time: share of the requests that were answered within their limits.
        throughput: answers a second.
        mean_s: of an answer.
    """

    candidate: Candidate
    requests: int
    in_time: float
    throughput: float
    mean_s: float

    def beats(self, other: Verdict, objective: Objective) -> bool:
        """Whether it is better; than another placement, by more than chance."""
        same = self.candidate.placement is other.candidate.placement
        return self.leads(other, objective, 0.0 if same else MARGIN)

    def leads(self, other: Verdict, objective: Objective, margin: float) -> bool:
        """Whether it is better by more than a share of the larger of both figures."""
        if objective == "throughput":
            return (1 - margin) * self.throughput > other.throughput
        if abs(self.in_time - other.in_time) > margin * max(self.in_time, other.in_time):
            return self.in_time > other.in_time
        return self.mean_s < (1 - margin) * other.mean_s


@dataclass(frozen=True, slots=True)
class Judged:
    """The best of some plans.

    Attributes:
        best: of them.
        verdicts: on those that were simulated, simple ones first; the last one where there was a
            run-off.
    """

    best: Candidate
    verdicts: tuple[Verdict, ...]


def plan_judged(
    cluster: Cluster,
    options: PlanOptions | None = None,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    seed: int = 0,
    planner: Planner | None = None,
    admission: bool = False,
) -> Judged:
    """Make plans, simulate them, and take the best.

    For objective ``throughput`` all are given more than any promises, and the most answers win; for
    ``latency`` they are given the demand, and most answers in time win, then the least mean time.

    Args:
        cluster: servers, models and the expected load.
        options: of the search. Simulations come on top, for as long again, and half as long for
            the run-off; whole models and the plan for the objective are simulated once however
            long that takes.
        clock: seconds of a steady clock.
        seed: of the requests.
        planner: to share divisions of memory with other simulations.
        admission: whether what would be too late is refused.

    Raises:
        BudgetError: as of ``policy.placement.plan_cluster``.
    """
    options = options or PlanOptions()
    begin_s = clock()
    found = candidates(cluster, options, clock)
    judge = _Judge(cluster, options.objective, found, seed, planner or Planner(), admission)
    known: dict[int, Verdict] = {}
    for turn, number in enumerate(_promising(found, options.objective)):
        if turn > 1 and clock() > begin_s + JUDGING * options.time_limit_s:
            break
        verdict = judge.verdict(number)
        if verdict is not None:
            known[number] = verdict
    if not known:
        return Judged(found[-1], ())
    again: dict[int, Verdict] = {}
    for number in _finalists(known, options.objective):
        if clock() > begin_s + RUN_OFF * options.time_limit_s:
            break
        verdict = judge.verdict(number, LONG)
        if verdict is not None:
            again[number] = verdict
    last = again or known
    best = best_of([last[number] for number in sorted(last)], options.objective)
    known |= again
    return Judged(best.candidate, tuple(known[number] for number in sorted(known)))


def candidates(
    cluster: Cluster, options: PlanOptions, clock: Callable[[], float]
) -> list[Candidate]:
    """Plans to choose from, the simplest first and the one that was asked for last.

    Raises:
        BudgetError: there is no plan.
    """
    wanted = options.objective
    aims = list(STYLES) if wanted == "latency" else [wanted]
    objectives = sorted(OBJECTIVES, key=lambda one: one == wanted)
    placements: list[tuple[str, Placement]] = []
    whole = _whole(cluster)
    if whole is not None:
        placements.append(("whole models", whole))
    begin_s = clock()
    for objective, share in zip(objectives, SHARES, strict=True):
        left_s = begin_s + share * options.time_limit_s - clock()
        own = replace(options, objective=objective, time_limit_s=max(0.0, left_s))
        placement = _plan(cluster, own, clock)
        if placement is None and objective != wanted:
            continue
        if placement is None:  # no plan keeps the limits: then as well as can be
            placement = plan_cluster(replace(cluster, limits_s={}), own, clock=clock)
        if all(set(placement.parts) != set(other.parts) for _, other in placements):
            placements.append((f"plan for {objective}", placement))
    return [Candidate(name, placement, aim) for name, placement in placements for aim in aims]


def _whole(cluster: Cluster) -> Placement | None:
    try:
        return whole_models(cluster)
    except BudgetError:
        return None  # some model fits on no server whole


def _plan(cluster: Cluster, options: PlanOptions, clock: Callable[[], float]) -> Placement | None:
    try:
        return plan_cluster(cluster, options, clock=clock)
    except BudgetError:
        return None


def _promising(found: Sequence[Candidate], objective: Objective) -> list[int]:
    """Numbers of candidates in the order in which they are simulated, as time may not do for all.

    Those that aim at the objective first, and of these the simplest and the plan for it.
    """
    first = {"whole models": 0, f"plan for {objective}": 1}
    return sorted(
        range(len(found)),
        key=lambda n: (found[n].aim != objective, first.get(found[n].name, 2), n),
    )


def best_of(verdicts: Sequence[Verdict], objective: Objective) -> Verdict:
    """The first that no later one beats by more than chance."""
    best = verdicts[0]
    for verdict in verdicts[1:]:
        if verdict.beats(best, objective):
            best = verdict
    return best


def _finalists(known: Mapping[int, Verdict], objective: Objective) -> list[int]:
    """Numbers of those that the best doesn't leave far behind, it first; none if it is alone."""
    best = best_of([known[number] for number in sorted(known)], objective)
    close = [n for n in sorted(known) if not best.leads(known[n], objective, CLOSE)]
    return sorted(close, key=lambda n: known[n] is not best) if len(close) > 1 else []


@dataclass(frozen=True, slots=True)
class _Judge:
    """Simulates candidates, each with the same requests."""

    cluster: Cluster
    objective: Objective
    found: Sequence[Candidate]
    seed: int
    planner: Planner
    admission: bool

    def verdict(self, number: int, times: int = 1) -> Verdict | None:
        """Of a simulation of so many times as long as a short one, with requests of its own.

        None where a server's own planner finds no room for what it is given.
        """
        one, overloaded = self.found[number], self.objective == "throughput"
        demand = {name: self.cluster.demand[name] for name in self.cluster.wanted}
        rate = sum(demand.values())
        if overloaded:
            rate *= OVERLOAD * max(other.placement.scale for other in self.found)
        span_s = max(SHORTEST_S, times * FEW / rate, times * min(LONGEST_S, REQUESTS / rate))
        load = requests(
            np.random.default_rng((self.seed, 2 * times)),
            poisson(np.random.default_rng((self.seed, 2 * times - 1)), rate),
            demand,
            until_s=span_s,
            limits_s=dict(self.cluster.limits_s),
        )
        own = Options(
            settings=roomy(one.style),
            admission=self.admission,
            report_s=max(REPORT_S, span_s / REPORTS),
        )
        try:
            virtual = VirtualCluster(
                self.cluster, one.placement, own, seed=self.seed, planner=self.planner
            )
            outcome = virtual.run(load, until_s=span_s if overloaded else 4 * span_s)
        except BudgetError:
            return None
        figures = outcome.requests.figures(since_s=0.0 if overloaded else WARM * span_s)
        mean_s = figures.mean_s if math.isfinite(figures.mean_s) else float("inf")
        in_time = (figures.answered - figures.late) / max(1, figures.count)
        return Verdict(one, figures.count, in_time, figures.throughput, mean_s)
