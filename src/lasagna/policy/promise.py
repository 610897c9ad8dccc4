"""What a placement promises: parts with their costs, bounds, and predicted times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, Server, sliced
from lasagna.policy.columns import Column
from lasagna.policy.flow import Flows, latency_of
from lasagna.policy.placed import Bound, PartCosts, Placement, connected
from lasagna.policy.plan import Objective

HOW: Final = "linear program in which each server has its memory for every part in turn"


def placement_of(
    cluster: Cluster,
    flows: Flows,
    bound: Bound,
    *,
    most: Flows | None = None,
    latency_bound: Bound | None = None,
) -> Placement:
    """A choice of columns as a placement; columns that nothing flows through are left out.

    Args:
        cluster: that it is for.
        flows: for which it is made: rates and latencies are theirs.
        bound: on the scale.
        most: what the same parts carry at most, if that is not what ``flows`` are.
        latency_bound: on the mean latency.
    """
    most = most or flows
    scale = max(flows.scale, most.scale)
    parts: dict[Part, PartCosts] = {}
    waits: dict[int, float] = {}
    load = min(1.0, 1.0 / flows.scale) if flows.scale > 0 else 1.0
    for number, server in enumerate(cluster.servers):
        here = _here(flows, number)
        waits[number] = _waits_s(here, server, load)
        for column, rate in here:
            part = Part(column.model, column.first, column.last, server.name)
            parts[part] = PartCosts(
                column.work_s, column.through_s, column.in_bytes, column.out_bytes, rate
            )
    total = sum(cluster.demand[name] for name in cluster.wanted)
    latency_s = _latencies(cluster, flows, waits)
    return Placement(
        parts=dict(sorted(parts.items())),
        scale=scale,
        throughput=scale * total,
        latency_s=latency_s,
        bottleneck=_bottleneck(cluster, most),
        bound=bound,
        ceiling=ceiling_of(cluster),
        mean_s=sum(cluster.demand[name] * seconds for name, seconds in latency_s.items()) / total,
        latency_bound=latency_bound,
    )


def _here(flows: Flows, server: int) -> list[tuple[Column, float]]:
    return [(column, rate) for (number, column), rate in flows.rates.items() if number == server]


def _bottleneck(cluster: Cluster, flows: Flows) -> str:
    """What is the busiest."""
    busy: dict[str, float] = {}
    for number, server in enumerate(cluster.servers):
        here = _here(flows, number)
        busy[f"{server.name}'s processors"] = sum(rate * column.work_s for column, rate in here)
        for way in ("in", "out"):
            sizes = sum(r * (c.in_bytes if way == "in" else c.out_bytes) for c, r in here)
            busy[f"{server.name}'s link, {way}"] = sizes / server.bandwidth
    return max(busy, key=lambda name: busy[name])


def bound_of(ideal: Flows, objective: Objective) -> Bound:
    """What the relaxed linear program for an objective says: of the scale, or of the mean latency.

    Its waits are by tangents from below (``flow``): predicted latencies are no less.
    """
    if objective == "latency":
        return Bound(-ideal.objective, f"{HOW}, waits by tangents from below")
    return Bound(ideal.scale, HOW)


def ceiling_of(cluster: Cluster) -> Bound:
    """Load at which all processors do nothing but compute, in batches of the best size."""
    capacity = sum(
        min(s.machine.lanes * s.machine.width, s.machine.cores) * s.speed for s in cluster.servers
    )
    work_s = sum(
        cluster.demand[name]
        * min(
            sum(min(one.compute_at(rows) / rows for rows in range(1, 33)) for one in form.slices)
            for form in cluster.models[name]
        )
        for name in cluster.wanted
    )
    return Bound(capacity / work_s, "all processors compute, and nothing else")


def _waits_s(here: Sequence[tuple[Column, float]], server: Server, load: float) -> float:
    """Mean seconds before a request's turn at the server, and at its link in both directions."""
    width = server.bandwidth
    return (
        _wait_s([(rate, c.work_s, c.through_s) for c, rate in here], load)
        + _wait_s([(rate, c.in_bytes / width, c.in_bytes / width) for c, rate in here], load)
        + _wait_s([(rate, c.out_bytes / width, c.out_bytes / width) for c, rate in here], load)
    )


def _wait_s(here: Sequence[tuple[float, float, float]], load: float) -> float:
    """Mean seconds before a request's turn: a single queue of runs of equal length (M/D/1).

    Args:
        here: rates, seconds that a request keeps it busy, and seconds that it takes there. The
            larger of the two is a run's length, so that no wait is less than in ``flow``.
        load: share of the rates that comes.
    """
    busy = min(0.99, load * sum(rate * work_s for rate, work_s, _ in here))
    total = sum(rate for rate, *_ in here)
    mean_s = sum(rate * max(own) for rate, *own in here) / total if total else 0.0
    return busy / (2 * (1 - busy)) * mean_s


def _latencies(cluster: Cluster, flows: Flows, waits: Mapping[int, float]) -> dict[str, float]:
    if flows.scale < 1.0 - 1e-6:
        return dict.fromkeys(cluster.wanted, float("inf"))
    lengths = lengths_of(cluster)
    found = dict.fromkeys(cluster.wanted, 0.0)
    for (number, column), rate in flows.rates.items():
        share = rate / (flows.scale * cluster.demand[column.model])
        own_s = latency_of(column, cluster.servers[number], lengths[column.model])
        found[column.model] += share * (own_s + waits[number])
    return found


def lengths_of(cluster: Cluster) -> dict[str, int]:
    """How many slices each model with demand has."""
    return {name: len(sliced(cluster.models[name]).slices) for name in cluster.wanted}


def require_chains(cluster: Cluster, columns: Sequence[Column]) -> None:
    """Check that every model could be placed, if it had all servers to itself.

    Raises:
        BudgetError: some part of a model fits nowhere.
    """
    parts = {Part(c.model, c.first, c.last, "") for c in columns}
    for model, chain in connected(parts, lengths_of(cluster)).items():
        if not chain:
            raise BudgetError(
                f"{model!r} can't be placed: a part of it fits on none of the servers, not even "
                "alone and streamed. Seal it with smaller --slice-bytes, or give a server more EPC"
            )


def why_not(cluster: Cluster) -> str:
    """Why there is no placement, although every model could be placed alone."""
    limits = ", ".join(f"{name} {s * 1000:.3g} ms" for name, s in cluster.limits_s.items())
    return (
        f"no placement keeps the latency limits ({limits})" if limits else "nothing can be served"
    )
