"""Ways to run a cluster that are worth a simulation: ``sim.judging`` chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import OBJECTIVES, Style, style_for
from lasagna.policy.spread import models_apart, whole_models

STYLES: Final[Mapping[str, Style]] = {
    "throughput": style_for("throughput"),
    "latency": style_for("latency"),
    "lone requests": replace(style_for("latency"), max_rows=1),
    "single rows": replace(style_for("throughput"), max_rows=1),
}
"""By what servers' own planners work for. Without batches there is more room for weights."""
SHARES: Final = (0.4, 1.0)
"""Of the time, at which the search for one plan, and for the other, is over."""
WHOLE: Final = "whole models"
APART: Final = "models apart"
EARLIEST: Final = "earliest"
"""The rule for routes that knows most."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a cluster.

    Attributes:
        name: how it came about.
        placement: of parts.
        aim: what servers' own planners work for, one of ``STYLES``.
        rule: by which balancers choose routes.
    """

    name: str
    placement: Placement
    aim: str
    rule: str = EARLIEST

    @property
    def style(self) -> Style:
        """In which servers' own planners divide memory."""
        return STYLES[self.aim]


def candidates(
    cluster: Cluster, options: PlanOptions, clock: Callable[[], float]
) -> tuple[list[Candidate], Placement]:
    """Plans to choose from, the simplest first; and the one that was asked for.

    Raises:
        BudgetError: there is no plan.
    """
    wanted = options.objective
    # In overload batches are full: divisions for smaller ones answer less, and time is short.
    aims = [wanted] if wanted == "throughput" else sorted(STYLES, key=lambda aim: aim != wanted)
    objectives = sorted(OBJECTIVES, key=lambda one: one == wanted)
    by_parts: dict[frozenset[Part], tuple[str, Placement]] = {}
    planned = None
    for name, place in ((WHOLE, whole_models), (APART, models_apart)):
        try:
            placement = place(cluster)
        except BudgetError:
            continue  # some model fits on no server whole, or gets none of its own
        by_parts.setdefault(frozenset(placement.parts), (name, placement))
    simple = set(by_parts)
    begin_s = clock()
    for objective, share in zip(objectives, SHARES, strict=True):
        left_s = begin_s + share * options.time_limit_s - clock()
        own = replace(options, objective=objective, time_limit_s=max(0.0, left_s))
        try:
            plan = plan_or_best_effort if objective == wanted else plan_cluster
            planned = placement = plan(cluster, own, clock=clock)
        except BudgetError:
            if objective == wanted:
                raise
            continue
        if frozenset(placement.parts) not in simple:  # the plan that was asked for has its rates
            by_parts[frozenset(placement.parts)] = f"plan for {objective}", placement
    assert planned is not None, "the last objective is the one that was asked for"
    ways = by_parts.values()
    found = [Candidate(name, placement, aim) for name, placement in ways for aim in aims]
    return found, planned


def plan_or_best_effort(
    cluster: Cluster, options: PlanOptions, *, clock: Callable[[], float]
) -> Placement:
    """A plan that keeps the limits on latency, or else one as if there were none.

    Simulations then say which plan keeps them most often.

    Raises:
        BudgetError: some model finds no room.
    """
    try:
        return plan_cluster(cluster, options, clock=clock)
    except BudgetError:
        if not cluster.limits_s:
            raise
    return plan_cluster(replace(cluster, limits_s={}), options, clock=clock)
