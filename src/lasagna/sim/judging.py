"""Plans judged by simulation: the last word belongs to the policies that will run them.

The planner's model reckons with full batches, and with queues of each server for itself. How
batches fill at a given load, and what routes make of that, only a simulation of the very schedulers
and balancers shows. So a few plans of different kinds are each given the same requests, and the
best of them is taken. Whole models on every server are among them: no plan is taken that loses to
that. Those that come close to the best have a run-off with other and more requests: what is best of
a dozen in a short simulation has had luck, too. At last the winner is tried with other rules for
routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lasagna.errors import BudgetError
from lasagna.policy.balancer import RULES
from lasagna.policy.cluster import Cluster
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions
from lasagna.policy.plan import Objective
from lasagna.policy.settle import Divisions, bounded, reckoned
from lasagna.sim.arrivals import poisson, requests
from lasagna.sim.candidates import APART, EARLIEST, WHOLE, Candidate, candidates
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.metrics import Figures
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import roomy

REQUESTS: Final = 600
"""Of one simulation: a mean within some percent."""
SHORTEST_S: Final = 2.0
"""Of virtual time: some batches of each server."""
SETTLING_S: Final = 3.0
"""More for each further model: servers divide memory among them as they come to know the mix."""
FULL_S: Final = 15.0
"""The same in overload, where batches are the largest, and rare models wait for theirs."""
LONGEST_S: Final = 60.0
"""Of virtual time, unless there would be too few requests."""
FEW: Final = 20
"""Requests of a simulation at least, where they are rare."""
MANY: Final = 10_000
"""Requests of a simulation at most, where they are frequent."""
REPORTS: Final = 2000
"""Of each server in a simulation at most: where requests are rare, little changes between them."""
OVERLOAD: Final = 1.2
"""Times what the best plan promises: more than any of them can answer."""
WARM: Final = 0.2
"""Share of the requests that come first and don't count at a load that can be carried."""
MARGINS: Final[Mapping[Objective, float]] = {"throughput": 0.02, "latency": 0.04}
"""By which a plan must be better than a simpler one: less may be chance."""
TIMELY: Final = 0.01
"""Share of a model's requests that may be late, or not answered, for a lower mean."""
CLOSE: Final = 0.3
"""By which the best must be better than another in a short simulation, for that to be out."""
LONG: Final = 5
"""Times as many requests in the run-off."""
JUDGING: Final = 2.5
"""Times the search's time, after which no other short simulation begins. The rest is for longer
ones: many short ones without them would choose the luckiest."""
RUN_OFF: Final = 4.0
"""Times the search's time, after which no other long one begins."""
ROUTING: Final = 4.5
"""Times the search's time, after which no other rule is tried."""
ROUTES: Final = tuple(rule for rule in RULES if rule not in (EARLIEST, "random"))
"""Rules that are tried beside the one that knows most."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a simulation says of a candidate.

    Attributes:
        candidate: it.
        requests: that it was given. Verdicts on as many are comparable.
        offered: load in multiples of the demand.
        answered: share of the requests that were, of the model of which it is least.
        in_time: the same of those that were answered within their limits.
        throughput: answers a second.
        mean_s: of an answer.
    """

    candidate: Candidate
    requests: int
    offered: float
    answered: float
    in_time: float
    throughput: float
    mean_s: float

    @property
    def carried(self) -> float:
        """Answers in time, in multiples of the demand, of the model that has least of it."""
        return self.offered * self.in_time

    def value(self, objective: Objective) -> float:
        """The more the better, if as many come in time."""
        return self.carried if objective == "throughput" else 1.0 / max(self.mean_s, 1e-12)


@dataclass(frozen=True, slots=True)
class Judged:
    """The best of some plans.

    Attributes:
        best: of them.
        verdicts: on those that were simulated, simple ones first; the last one where there was a
            run-off.
        planned: the plan for the objective, whatever was simulated of it.
    """

    best: Candidate
    verdicts: tuple[Verdict, ...]
    planned: Placement

    def aim_of_whole_models(self, objective: Objective) -> str:
        """What servers' own planners should work for where every server has whole models."""
        whole = [one for one in self.verdicts if one.candidate.name == WHOLE]
        most = max((one.requests for one in whole), default=0)
        last = [one for one in whole if one.requests == most]
        return best_of(last, objective).candidate.aim if last else self.best.aim


def plan_judged(
    cluster: Cluster,
    options: PlanOptions | None = None,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    seed: int = 0,
    planner: Planner | None = None,
    run: Options | None = None,
) -> Judged:
    """Make plans, simulate them, and take the best.

    For objective ``throughput`` all are given more than any promises, and the most answers win, of
    the model that has least of its demand; late ones don't count, and are refused. For ``latency``
    they are given the demand, and most answers in time win, then the least mean time.

    Args:
        cluster: servers, models and the expected load.
        options: of the search. Simulations come on top, for up to 3.5 times as long; whole
            models and the plan for the objective are simulated once however long that takes.
        clock: seconds of a steady clock.
        seed: of the requests.
        planner: to share divisions of memory with other simulations.
        run: how the cluster is run, but for the division of memory and routes.

    Raises:
        BudgetError: as of ``policy.placement.plan_cluster``, but that no plan keeps the limits is
            no error: then the one is taken that keeps them most often.
    """
    options = options or PlanOptions()
    begin_s = clock()

    def over(share: float) -> bool:
        return clock() > begin_s + share * options.time_limit_s

    objective = options.objective
    found, planned = candidates(cluster, options, clock)
    judge = _Judge(cluster, objective, found, seed, planner or Planner(), run or Options())

    def verdicts(
        numbers: Iterable[int], until: float, *, times: int = 1, at_least: int = 0
    ) -> dict[int, Verdict]:
        """Of as many as there is time for."""
        seen: dict[int, Verdict] = {}
        for turn, number in enumerate(numbers):
            if turn >= at_least and over(until):
                break
            if (verdict := judge.verdict(number, times)) is not None:
                seen[number] = verdict
        return seen

    known = verdicts(_promising(found, objective), JUDGING, at_least=2)
    known |= verdicts(_other_aims(found, known, objective), JUDGING)
    if not known:
        return Judged(found[-1], (), planned)
    last = verdicts(_finalists(known, objective), RUN_OFF, times=LONG)
    if last:
        winner = best_of(_in_order(last), objective).candidate
        if _has_ways(winner.placement):
            first = len(found)
            found += [replace(winner, rule=rule) for rule in ROUTES]
            last |= verdicts(range(first, len(found)), ROUTING, times=LONG)
    best = best_of(_in_order(last or known), objective)
    return Judged(best.candidate, tuple(_in_order(known | last)), planned)


def promised(cluster: Cluster, judged: Judged, objective: Objective) -> Placement:
    """The best plan with what its servers' divisions of memory promise, and with the bounds.

    As many requests flow through its parts as were simulated.
    """
    own, planned = judged.best.placement, judged.planned
    divisions = Divisions(cluster, lambda: 0.0, math.inf, judged.best.style)
    better = reckoned(cluster, own, objective, divisions)
    if better is not None:
        works = {part: one.work_s for part, one in better[1].parts.items()}
        parts = {part: replace(one, work_s=works[part]) for part, one in own.parts.items()}
        own = replace(better[1], parts=parts)
    return bounded(own, planned)


def _promising(found: Sequence[Candidate], objective: Objective) -> list[int]:
    """Numbers of those that aim at the objective, in the order in which they are simulated.

    The simplest, the plan for the objective, models apart, and the other plan.
    """
    first = (WHOLE, f"plan for {objective}", APART)
    own = [number for number, one in enumerate(found) if one.aim == objective]
    order = {name: place for place, name in enumerate(first)}
    return sorted(own, key=lambda number: order.get(found[number].name, len(first)))


def _other_aims(
    found: Sequence[Candidate], known: Mapping[int, Verdict], objective: Objective
) -> list[int]:
    """Numbers of the other ones, those with the placement that was best so far first."""
    value = {one.candidate.name: one.value(objective) for one in known.values()}
    others = [number for number, one in enumerate(found) if one.aim != objective]
    return sorted(others, key=lambda number: -value.get(found[number].name, 0.0))


def best_of(verdicts: Sequence[Verdict], objective: Objective) -> Verdict:
    """The first that no later one beats by more than chance, of those that serve as many.

    For latency those that answer as many requests in time, then of these those that answer as many
    at all: who leaves requests unanswered is not quick for it.
    """
    if objective == "latency":
        most = max(verdict.in_time for verdict in verdicts)
        verdicts = [one for one in verdicts if one.in_time >= most - TIMELY]
        most = max(verdict.answered for verdict in verdicts)
        verdicts = [one for one in verdicts if one.answered >= most - TIMELY]
    best = verdicts[0]
    for verdict in verdicts[1:]:
        one, other = verdict.candidate, best.candidate
        alike = one.placement is other.placement and one.rule == other.rule
        margin = 0.0 if alike else MARGINS[objective]
        if (1 - margin) * verdict.value(objective) > best.value(objective):
            best = verdict
    return best


def _has_ways(placement: Placement) -> bool:
    """Whether there is anything to choose for a request on its way."""
    begins = [(part.model, part.first) for part in placement.parts]
    return len(set(begins)) < len(begins)


def _in_order(verdicts: Mapping[int, Verdict]) -> list[Verdict]:
    return [verdicts[number] for number in sorted(verdicts)]


def _finalists(known: Mapping[int, Verdict], objective: Objective) -> list[int]:
    """Numbers of the best and of those that it doesn't leave far behind.

    The best first, then the simplest, since nothing is to lose to that, and then the better ones.
    """
    best = best_of(_in_order(known), objective)
    value, in_time = best.value(objective), best.in_time
    close = [
        number
        for number, one in known.items()
        if one.value(objective) >= (1 - CLOSE) * value
        and (objective == "throughput" or one.in_time >= in_time - max(TIMELY, CLOSE * in_time))
    ]
    plain = min(close)
    return sorted(
        close, key=lambda n: (known[n] is not best, n != plain, -known[n].value(objective), n)
    )


@dataclass(frozen=True, slots=True)
class _Judge:
    """Simulates candidates, each with the same requests."""

    cluster: Cluster
    objective: Objective
    found: Sequence[Candidate]
    seed: int
    planner: Planner
    run: Options

    def verdict(self, number: int, times: int = 1) -> Verdict | None:
        """Of a simulation with so many times as many requests as a short one, and others.

        In overload ``FULL_S`` is enough for either.

        None where a server's own planner finds no room for what it is given.
        """
        one, overloaded = self.found[number], self.objective == "throughput"
        offered = 1.0
        if overloaded:
            offered = OVERLOAD * max(other.placement.scale for other in self.found)
        rate = offered * sum(self.cluster.demand[name] for name in self.cluster.wanted)
        settled_s = SHORTEST_S + SETTLING_S * (len(self.cluster.wanted) - 1)
        least_s = FULL_S if overloaded else times * settled_s
        span_s = max(least_s, times * max(FEW / rate, min(LONGEST_S, REQUESTS / rate)))
        span_s = min(span_s, times * MANY / rate)
        load = requests(
            np.random.default_rng((self.seed, times, 7, 1)),
            poisson(np.random.default_rng((self.seed, times, 7, 0)), rate),
            {name: self.cluster.demand[name] for name in self.cluster.wanted},
            until_s=span_s,
            limits_s=dict(self.cluster.limits_s),
        )
        own = replace(
            self.run,
            rule=one.rule,
            settings=roomy(one.style),
            # In overload all would be late if nothing were refused.
            admission=self.run.admission or (overloaded and bool(self.cluster.limits_s)),
            report_s=max(self.run.report_s, span_s / REPORTS),
        )
        try:
            virtual = VirtualCluster(
                self.cluster, one.placement, own, seed=self.seed, planner=self.planner
            )
            outcome = virtual.run(load, until_s=span_s if overloaded else 4 * span_s)
        except BudgetError:
            return None
        since_s = 0.0 if overloaded else WARM * span_s
        every = outcome.requests.figures(since_s=since_s)
        models = (
            outcome.requests.figures(name, since_s=since_s) for name in outcome.requests.models
        )
        mean_s = every.mean_s if math.isfinite(every.mean_s) else math.inf
        shares = least_shares(models)
        return Verdict(one, len(outcome.requests), offered, *shares, every.throughput, mean_s)


def least_shares(models: Iterable[Figures]) -> tuple[float, float]:
    """Shares of a model's requests that were answered, and in time: each of whom it is least.

    Models with few requests are taken together: whether one of six was late is chance.
    """
    answered, in_time = [], []
    groups: list[list[Figures]] = [[]]
    for one in sorted(models, key=lambda figures: figures.count):
        if sum(other.count for other in groups[-1]) >= FEW:
            groups.append([])
        groups[-1].append(one)
    if len(groups) > 1 and sum(one.count for one in groups[-1]) < FEW:
        last = groups.pop()
        groups[-1] += last
    for group in groups:
        if count := sum(one.count for one in group):
            answered.append(sum(one.answered for one in group) / count)
            in_time.append(sum(one.answered - one.late for one in group) / count)
    return min(answered, default=0.0), min(in_time, default=0.0)
