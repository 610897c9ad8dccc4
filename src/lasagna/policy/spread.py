"""Placements of whole models: on every server, as far as its memory goes, or one on each server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Kind, Part, Server, part_of
from lasagna.policy.columns import Column, columns_of, kinds_of, room_on
from lasagna.policy.flow import Choice, chosen
from lasagna.policy.memory import require_fits
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.promise import bound_of, lengths_of, placement_of


def whole_models(cluster: Cluster) -> Placement:
    """Each server runs whole models: all, or as many as it has memory for, beginning in turn.

    Raises:
        BudgetError: some model fits on no server.
    """
    wanted = cluster.wanted
    kinds, ways_on = _whole_columns(cluster)
    placed: list[tuple[Column, ...]] = []
    chosen_by: dict[tuple[int, int], tuple[Column, ...]] = {}
    for number, server in enumerate(cluster.servers):
        ways = ways_on.get(kinds[server.kind], [])
        known = {column.model for column in ways}
        turn = number * len(wanted) // len(cluster.servers)
        alike = chosen_by.get((kinds[server.kind], turn))
        if alike is not None:
            placed.append(alike)
            continue
        here: list[str] = []
        for model in (*wanted[turn:], *wanted[:turn]):
            if model in known and _fit(cluster, server, [*here, model]):
                here.append(model)
        each = room_on(server) // max(1, len(here))
        alike = tuple(_way(ways, model, each) for model in sorted(here))
        placed.append(alike)
        chosen_by[kinds[server.kind], turn] = alike
    missing = set(wanted) - {column.model for here in placed for column in here}
    if missing:
        raise BudgetError(f"no server has memory for {', '.join(map(repr, sorted(missing)))}")
    return _placement(cluster, placed)


def models_apart(cluster: Cluster) -> Placement:
    """Each server runs one whole model, or none if none fits; servers are shared out by demand.

    In turn, the model of which least of its demand would be served gets the server that is left on
    which it is quickest; at first those that fit fewest servers. A batch never waits for another
    model's, and nothing else takes memory.

    Raises:
        BudgetError: there are fewer servers than models, or none is left for a model that fits it.
    """
    kinds, ways_on = _whole_columns(cluster)
    ways: dict[tuple[str, int], Column] = {}
    for server in kinds_of(cluster.servers):
        kind = kinds[server.kind]
        for model in cluster.wanted:
            here = ways_on.get(kind, [])
            if any(one.model == model for one in here) and _fit(cluster, server, [model]):
                ways[model, kind] = _way(here, model, room_on(server))
    free: dict[int, list[int]] = {}
    for number in reversed(range(len(cluster.servers))):
        free.setdefault(kinds[cluster.servers[number].kind], []).append(number)
    placed: list[tuple[Column, ...]] = [()] * len(cluster.servers)
    served = dict.fromkeys(cluster.wanted, 0.0)
    open_ = set(cluster.wanted)
    while open_ and any(free.values()):
        room = {name: sum(len(free[k]) for k in free if (name, k) in ways) for name in open_}
        model = min(open_, key=lambda name: (served[name] / cluster.demand[name], room[name], name))
        own = [ways[model, kind] for kind in free if free[kind] and (model, kind) in ways]
        if not own:
            open_.remove(model)
            continue
        best = min(own, key=lambda column: column.work_s)
        placed[free[best.kind].pop()] = (best,)
        served[model] += 1.0 / best.work_s
    missing = [repr(name) for name in cluster.wanted if not served[name]]
    if missing:
        raise BudgetError(f"no server is left for {', '.join(missing)} alone")
    return _placement(cluster, placed)


def _whole_columns(cluster: Cluster) -> tuple[dict[Kind, int], dict[int, list[Column]]]:
    """Numbers of the kinds of servers, and each kind's ways to run models whole."""
    kinds = {server.kind: number for number, server in enumerate(kinds_of(cluster.servers))}
    ways_on: dict[int, list[Column]] = {}
    for column in columns_of(cluster, dict.fromkeys(cluster.wanted, ())):
        ways_on.setdefault(column.kind, []).append(column)
    return kinds, ways_on


def _placement(cluster: Cluster, placed: Sequence[tuple[Column, ...]]) -> Placement:
    """Also of parts that the plain linear program sends nothing to."""
    plain = replace(cluster, limits_s={})
    flows = chosen(plain, Choice(tuple(placed)), "throughput")
    assert flows is not None, "whole models are chains"
    lengths = lengths_of(cluster)
    spare = {
        Part(column.model, 0, lengths[column.model], server.name): PartCosts(
            column.work_s, column.through_s, column.in_bytes, column.out_bytes, 0.0
        )
        for server, here in zip(cluster.servers, placed, strict=True)
        for column in here
    }
    found = placement_of(cluster, flows, bound_of(flows, "throughput"))
    return replace(found, parts={**spare, **found.parts})


def _fit(cluster: Cluster, server: Server, models: Sequence[str]) -> bool:
    """Whether the server's own planner finds room for all of them."""
    lengths = lengths_of(cluster)
    forms = {name: part_of(cluster.models[name], 0, lengths[name]) for name in models}
    try:
        require_fits(forms, server.machine.shapes()[-1])
    except BudgetError:
        return False
    return True


def _way(ways: Sequence[Column], model: str, each: int) -> Column:
    """The quickest in its share of the memory, or else the leanest."""
    own = [column for column in ways if column.model == model]
    within = [column for column in own if column.alone_bytes <= each]
    if within:
        return min(within, key=lambda column: column.work_s)
    return min(own, key=lambda column: column.alone_bytes)
