"""MEDIA, to be compared with: partitions merged by EPC or by time, placed by earliest finish.

Written from its description (Li et al., ICDCS 2024; shared notes), not from its code. A server is
as fast as it is up to its EPC, and slower beyond it, by paging. Layers are merged into partitions
as long as the union fits the EPC, or takes no longer together than apart with what is carried
between them. Partitions are taken in order of upward rank, and each is given to the server on which
it ends first (as HEFT does), one partition a server at a time. That makes one chain, which is all
that MEDIA describes. So that the servers beside it need not idle, the same may be repeated with
those that are left until none is: an addition of ours, and the stronger baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, Server, carry_s, sliced
from lasagna.policy.costs import ModelCosts
from lasagna.policy.paging import Paging
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.promise import ceiling_of
from lasagna.units import PAGE


def media(cluster: Cluster, paging: Mapping[str, Paging], *, repeated: bool = False) -> Placement:
    """A chain for every model, on servers of its own.

    Args:
        cluster: servers, models and load.
        paging: of each server, by name.
        repeated: more chains for the models in turn, until no servers are left.

    Raises:
        BudgetError: there are fewer servers than models.
    """
    parts: dict[Part, PartCosts] = {}
    left = list(cluster.servers)
    chains = dict.fromkeys(cluster.wanted, 0)
    latency_s: dict[str, float] = {}
    while left and (repeated or not all(chains.values())):
        model = min(chains, key=lambda name: (chains[name] / cluster.demand[name], name))
        found = _chain(cluster, model, left, paging)
        if not found and not chains[model]:
            raise BudgetError(f"there is no server left for {model!r}")
        for part, costs in found.items():
            left.remove(cluster.server(part.server))
            parts[part] = costs
        chains[model] += 1
        latency_s.setdefault(model, sum(costs.through_s for costs in found.values()))
    missing = [model for model, count in chains.items() if not count]
    if missing:
        raise BudgetError(f"there is no server left for {', '.join(map(repr, missing))}")
    by_model = {
        model: sum(
            costs.rate for part, costs in parts.items() if part.model == model and not part.first
        )
        for model in chains
    }
    scale, worst = min((rate / cluster.demand[name], name) for name, rate in by_model.items())
    return Placement(
        parts=dict(sorted(parts.items())),
        scale=scale,
        throughput=scale * sum(cluster.demand[name] for name in chains),
        latency_s=latency_s,
        bottleneck=f"the chains of {worst}",
        bound=Bound(scale, "MEDIA knows none"),
        ceiling=ceiling_of(cluster),
    )


def _chain(
    cluster: Cluster, model: str, servers: Sequence[Server], paging: Mapping[str, Paging]
) -> dict[Part, PartCosts]:
    """One chain over some of these servers."""
    costs = sliced(cluster.models[model])
    cuts = _merged(costs, servers, paging)
    free = list(servers)
    chosen: list[tuple[Part, float]] = []
    now_s, before = 0.0, None
    # In a chain the upward rank falls from the first partition to the last: that is the order.
    for first, last in pairwise(cuts):
        best: tuple[float, int] | None = None
        for index, server in enumerate(free):
            comes_s = now_s + carry_s(costs.cut_bytes[first], before, server)
            ends_s = comes_s + _takes_s(costs, first, last, server, paging)
            if best is None or ends_s < best[0]:
                best = ends_s, index
        if best is None:
            return _whole(cluster, model, servers, paging)  # more partitions than servers
        now_s, before = best[0], free.pop(best[1])
        own_s = _takes_s(costs, first, last, before, paging)
        chosen.append((Part(model, first, last, before.name), own_s))
    rate = min(1.0 / own_s for _, own_s in chosen)
    return {
        part: PartCosts(own_s, own_s, costs.cut_bytes[part.first], costs.cut_bytes[part.last], rate)
        for part, own_s in chosen
    }


def _whole(
    cluster: Cluster, model: str, servers: Sequence[Server], paging: Mapping[str, Paging]
) -> dict[Part, PartCosts]:
    """The model on one server, the one on which it ends first."""
    costs = sliced(cluster.models[model])
    count = len(costs.slices)
    own_s, server = min(
        ((_takes_s(costs, 0, count, server, paging), server) for server in servers),
        key=lambda one: one[0],
    )
    part = Part(model, 0, count, server.name)
    return {part: PartCosts(own_s, own_s, costs.cut_bytes[0], costs.cut_bytes[-1], 1.0 / own_s)}


def _merged(
    costs: ModelCosts, servers: Sequence[Server], paging: Mapping[str, Paging]
) -> list[int]:
    """Cuts that are left when neighbours are merged as long as that costs nothing.

    Reckoned for a mean server, and a mean link.
    """
    mean = replace(
        servers[0],
        name="mean",
        speed=fmean(one.speed for one in servers),
        bandwidth=fmean(one.bandwidth for one in servers),
        delay_s=fmean(one.delay_s for one in servers),
    )
    own = [paging[one.name] for one in servers]
    paging = {"mean": replace(own[0], epc_bytes=int(fmean(one.epc_bytes for one in own)))}
    other = replace(mean, name="another")
    cuts = list(range(len(costs.slices) + 1))
    merged = True
    while merged:
        merged = False
        for index in range(1, len(cuts) - 1):
            first, cut, last = cuts[index - 1 : index + 2]
            together_s = _takes_s(costs, first, last, mean, paging)
            apart_s = _takes_s(costs, first, cut, mean, paging)
            apart_s += _takes_s(costs, cut, last, mean, paging)
            apart_s += carry_s(costs.cut_bytes[cut], mean, other)
            if not _beyond(costs, first, last, mean, paging) or together_s <= apart_s:
                del cuts[index]
                merged = True
                break
    return cuts


def _beyond(
    costs: ModelCosts, first: int, last: int, server: Server, paging: Mapping[str, Paging]
) -> int:
    """Bytes that a partition works on, if they are more than the server's EPC; 0 if they fit."""
    size = sum(one.weight_bytes for one in costs.slices[first:last])
    size += costs.bytes_at(first, last, 1)
    return size if size > paging[server.name].room_bytes else 0


def _takes_s(
    costs: ModelCosts, first: int, last: int, server: Server, paging: Mapping[str, Paging]
) -> float:
    """Seconds of one request: a scan larger than the EPC loads every page again."""
    threads = min(server.machine.lanes * server.machine.width, server.machine.cores)
    compute_s = costs.compute_at(first, last, 1) / server.speed / threads
    pages = _beyond(costs, first, last, server, paging) / PAGE
    return compute_s + pages * paging[server.name].page_s + server.machine.entry_s
