"""A placement as its servers' own planners would run it, which is better than columns promise.

Columns know three shares of pinned weights, three sizes of batches, and one way in which threads
share the work. A server's planner (``policy.memory``) knows more: whole forms of models that fit,
a batch for each thread. So what a placement carries is reckoned once more with its divisions, and
beside it what whole models everywhere carry: the placement that plans nothing may be the best one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, Server, forms_on
from lasagna.policy.columns import Column, kinds_of
from lasagna.policy.flow import Choice, chosen
from lasagna.policy.memory import divide_best
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.plan import MemoryPlan, Objective, Style, style_for
from lasagna.policy.promise import placement_of
from lasagna.policy.spread import whole_models
from lasagna.policy.staging import Stagings

ROUNDS: Final = 2
"""Divisions depend on the load's mix on each server, and the mix on the divisions."""
GRAIN: Final = 0.05
"""To multiples of this shares of a server's load are rounded: equal servers are one case."""
BETTER: Final = "servers' own planners do better"


@dataclass(slots=True)
class Divisions:
    """What servers' planners say, each worked out once."""

    cluster: Cluster
    clock: Callable[[], float]
    until_s: float
    style: Style = field(default_factory=Style)
    _known: dict[tuple[object, ...], MemoryPlan] = field(default_factory=dict)
    _stagings: Stagings = field(default_factory=Stagings)

    def of(self, server: Server, rates: Mapping[Part, float]) -> MemoryPlan | None:
        """The division for these parts at these rates; None if the time is over.

        Raises:
            BudgetError: the server has no memory for them together.
        """
        total = sum(rates.values())
        demand = {
            part.key: GRAIN * round(rate / total / GRAIN) if total else 1.0
            for part, rate in rates.items()
        }
        key = (server.machine, server.speed, tuple(sorted(demand.items())))
        found = self._known.get(key)
        if found is None:
            if self.clock() > self.until_s:
                return None
            models = forms_on(self.cluster.models, sorted(rates), server)
            shapes = self.style.shapes(server.machine)
            found = divide_best(models, demand, shapes, self.style, self._stagings)
            self._known[key] = found
        return found


def settled(
    cluster: Cluster,
    placement: Placement,
    objective: Objective,
    *,
    clock: Callable[[], float],
    until_s: float,
) -> Placement:
    """The better of a placement and of whole models everywhere, both as servers would run them.

    Args:
        cluster: that it is for.
        placement: made of columns.
        objective: what is best.
        clock: seconds of a steady clock.
        until_s: when to end; then the placement may be as it was.
    """
    divisions = Divisions(cluster, clock, until_s, style_for(objective))
    found: list[tuple[float, Placement]] = []
    for one in (_whole(cluster), placement):
        better = None if one is None else reckoned(cluster, one, objective, divisions)
        if better is not None:
            found.append(better)
    if not found:
        return placement
    value, best = max(found, key=lambda one: one[0])
    promised = _value(cluster, placement, objective)
    if len(found) < 2 and promised is not None and promised >= value:
        return placement  # only whole models were tried, and it promises more as it is
    return bounded(best, placement)


def bounded(placement: Placement, planned: Placement) -> Placement:
    """A placement with the bounds of another for the same cluster, or what it promises beyond."""
    bound, fastest = planned.bound, planned.latency_bound
    if placement.scale > bound.value:
        bound = Bound(placement.scale, f"{bound.how}; {BETTER}")
    if fastest is not None and placement.mean_s < fastest.value:
        fastest = Bound(placement.mean_s, f"{fastest.how}; {BETTER}")
    return replace(placement, bound=bound, latency_bound=fastest, ceiling=planned.ceiling)


def _whole(cluster: Cluster) -> Placement | None:
    try:
        return whole_models(cluster)
    except BudgetError:
        return None


def _value(cluster: Cluster, placement: Placement, objective: Objective) -> float | None:
    flows = chosen(cluster, _choice(cluster, placement.parts), objective)
    return None if flows is None else flows.objective


def reckoned(
    cluster: Cluster, placement: Placement, objective: Objective, divisions: Divisions
) -> tuple[float, Placement] | None:
    """The placement with the work that servers' divisions promise; None if that is not known."""
    best: tuple[float, Placement] | None = None
    parts = placement.parts
    for _ in range(ROUNDS):
        costs = _divided(cluster, parts, divisions)
        if costs is None:
            return best
        choice = _choice(cluster, costs)
        flows = chosen(cluster, choice, objective)
        if flows is None:
            return best
        most = chosen(cluster, choice, "throughput") if objective == "latency" else flows
        made = _with_spare(placement_of(cluster, flows, placement.bound, most=most), costs)
        if best is None or flows.objective > best[0]:
            best = flows.objective, made
        parts = made.parts
    return best


def _divided(
    cluster: Cluster, parts: Mapping[Part, PartCosts], divisions: Divisions
) -> dict[Part, PartCosts] | None:
    found: dict[Part, PartCosts] = {}
    for server in cluster.servers:
        here = {part: costs for part, costs in parts.items() if part.server == server.name}
        if not here:
            continue
        try:
            plan = divisions.of(server, {part: costs.rate for part, costs in here.items()})
        except BudgetError:
            return None
        if plan is None:
            return None
        for part, costs in here.items():
            found[part] = replace(costs, work_s=plan.request_s[part.key])
    return found


def _choice(cluster: Cluster, parts: Mapping[Part, PartCosts]) -> Choice:
    """Parts as columns that are chosen already; their memory has been seen to."""
    kinds = {server.kind: number for number, server in enumerate(kinds_of(cluster.servers))}
    return Choice(
        tuple(
            tuple(
                Column(
                    part.model,
                    part.first,
                    part.last,
                    kinds[server.kind],
                    own_bytes=0,
                    running_bytes=0,
                    ring_bytes=0,
                    work_s=costs.work_s,
                    through_s=costs.through_s,
                    in_bytes=costs.in_bytes,
                    out_bytes=costs.out_bytes,
                )
                for part, costs in parts.items()
                if part.server == server.name
            )
            for server in cluster.servers
        )
    )


def _with_spare(placement: Placement, costs: Mapping[Part, PartCosts]) -> Placement:
    """With the parts, too, that nothing flows through."""
    spare = {part: replace(one, rate=0.0) for part, one in costs.items()}
    return replace(placement, parts=dict(sorted({**spare, **placement.parts}.items())))
