"""Another placement when servers, models or load have changed: worth its moves, and step by step.

What the present parts can still do is reckoned anew on the changed cluster (``kept``), and the
search for a better placement begins there, with a price on every slice that would have to be moved.
The result is taken only if it serves more over a horizon than moving costs. It is brought about one
part at a time (``steps``), so that requests go on meanwhile. What a server once got lies sealed on
its disk, also when its memory went to something else: that needs no link to come back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, forms_on, sliced
from lasagna.policy.columns import Column, columns_of, kinds_of
from lasagna.policy.flow import Choice, place, relaxed
from lasagna.policy.memory import require_fits
from lasagna.policy.placed import Placement, connected
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.program import Ends
from lasagna.policy.promise import bound_of, lengths_of, placement_of

HORIZON_S: Final = 600.0
"""For so long a change is expected to last."""
SPARE: Final = 1.25
"""Load, in multiples of the demand, beyond which more is of no use."""

Stored: TypeAlias = Mapping[str, Collection[tuple[str, int]]]
"""Of servers by name, the slices that they have on disk: a model, and a slice's number."""


@dataclass(frozen=True, slots=True)
class Replanned:
    """What was found.

    Attributes:
        present: what the parts that are there can do now; None if some model has no chain left.
        best: the other placement.
        moved_bytes: of weights that it takes to servers that have not got them on disk.
        gain: requests that it serves more in the horizon, once all is moved.
        cost: requests that its servers do not serve while they load.
    """

    present: Placement | None
    best: Placement
    moved_bytes: int
    gain: float
    cost: float

    @property
    def worth_it(self) -> bool:
        """Whether to apply it."""
        return self.present is None or self.gain > self.cost


@dataclass(frozen=True, slots=True)
class Step:
    """Load a part on its server, or give it up."""

    part: Part
    add: bool


def replan(
    cluster: Cluster,
    parts: Iterable[Part],
    options: PlanOptions | None = None,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    horizon_s: float = HORIZON_S,
    stored: Stored | None = None,
) -> Replanned:
    """Look for a better placement than the present one.

    Args:
        cluster: as it is now.
        parts: that are loaded; those of servers and models that are gone don't count.
        options: of the search; it is for throughput in any case, for what is compared is how much
            of the demand is served.
        clock: seconds of a steady clock.
        horizon_s: for how long the cluster is expected to stay so.
        stored: what servers have on disk; without it, what is loaded.

    Raises:
        BudgetError: as of ``plan_cluster``.
    """
    options = replace(options or PlanOptions(), objective="throughput")
    names = [server.name for server in cluster.servers]
    there = [part for part in parts if part.server in names and part.model in cluster.wanted]
    loaded = slices_of(there)
    stored = loaded if stored is None else stored
    choice, present = kept(cluster, there, options.nodes)
    rates = dict.fromkeys(names, 0.0)
    for part, costs in present.parts.items() if present is not None else ():
        rates[part.server] += costs.rate
    total = sum(cluster.demand[name] for name in cluster.wanted)

    def moving(part: Part) -> tuple[int, float]:
        """Bytes that are carried, and seconds in which they come in and are decrypted."""
        server = cluster.server(part.server)
        carried = missing(cluster, stored, part)
        return carried, carried / server.bandwidth + (
            missing(cluster, loaded, part) / server.machine.load_rate
        )

    def price(number: int, column: Column) -> float:
        name = cluster.servers[number].name
        _, seconds = moving(Part(column.model, column.first, column.last, name))
        return rates[name] * seconds / (horizon_s * total)

    begin = choice if present is not None else None
    best = plan_cluster(cluster, options, clock=clock, begin=begin, moving=price)
    before = min(SPARE, present.scale) if present is not None else 0.0
    moved, busy_s = 0, dict.fromkeys(names, 0.0)
    for part in best.parts:
        size, seconds = moving(part)
        moved += size
        busy_s[part.server] += seconds
    cost = sum(rates[name] * seconds for name, seconds in busy_s.items())
    gain = (min(SPARE, best.scale) - before) * total * max(0.0, horizon_s - max(busy_s.values()))
    return Replanned(present, best, moved, gain, cost)


def slices_of(parts: Iterable[Part]) -> dict[str, set[tuple[str, int]]]:
    """The slices of parts, by server."""
    found: dict[str, set[tuple[str, int]]] = {}
    for part in parts:
        own = found.setdefault(part.server, set())
        own |= {(part.model, number) for number in range(part.first, part.last)}
    return found


def missing(cluster: Cluster, there: Stored, part: Part) -> int:
    """Bytes of a part's weights that its server has not got."""
    has = there.get(part.server, ())
    slices = sliced(cluster.models[part.model]).slices
    return sum(
        slices[number].weight_bytes
        for number in range(part.first, part.last)
        if (part.model, number) not in has
    )


def kept(
    cluster: Cluster, parts: Iterable[Part], nodes: int | None = None
) -> tuple[Choice, Placement | None]:
    """What these parts can do on the cluster as it is: pinned or streamed as fits now.

    Args:
        cluster: as it is.
        parts: that are there.
        nodes: as of ``PlanOptions``.

    Returns:
        Their columns, and the placement; None if some model has no chain of them.
    """
    there = set(parts)
    lengths = lengths_of(cluster)
    ends: dict[str, set[int]] = {model: set() for model in cluster.wanted}
    for part in there:
        ends[part.model] |= {part.first, part.last}
    cuts = {name: sorted(found - {0, lengths[name]}) for name, found in ends.items()}
    columns = columns_of(cluster, cuts)
    kinds = {server.kind: number for number, server in enumerate(kinds_of(cluster.servers))}
    free = {
        number: [
            column
            for column in columns
            if column.kind == kinds[server.kind]
            and Part(column.model, column.first, column.last, server.name) in there
        ]
        for number, server in enumerate(cluster.servers)
    }
    nothing = Choice(((),) * len(cluster.servers))
    choice, flows = place(
        cluster, nothing, free, "throughput", gap=0.01, ends=Ends.after(5.0, nodes)
    )
    most = relaxed(cluster, columns, "throughput")
    if flows is None or flows.scale <= 0.0 or most is None:
        return nothing, None
    return choice, placement_of(cluster, flows, bound_of(most[0], "throughput"))


def steps(
    cluster: Cluster,
    present: Iterable[Part],
    wanted: Iterable[Part],
    stored: Stored | None = None,
) -> list[Step]:
    """One part at a time from some parts to others.

    What restores a model that nobody serves comes first, and of such models the one that needs the
    fewest bytes. A part is loaded before what it replaces is given up, if its server has memory for
    both. If not, what is given up first is, if there is one, a part without which all models still
    have chains.

    Args:
        cluster: with both sets' servers and models.
        present: parts that are loaded.
        wanted: parts to come to.
        stored: what servers have on disk; without it, what is loaded.
    """
    now, goal = set(present), set(wanted)
    stored = slices_of(now) if stored is None else stored
    done: list[Step] = []

    def change(part: Part, *, add: bool) -> None:
        (now.add if add else now.discard)(part)
        done.append(Step(part, add))

    unserved = _unserved(cluster, now)
    sizes = {part: missing(cluster, stored, part) for part in goal - now}
    whole = {
        model: sum(size for part, size in sizes.items() if part.model == model)
        for model in unserved
    }
    for part in sorted(
        sizes, key=lambda one: (one.model not in whole, whole.get(one.model, 0), one)
    ):
        while not _fits(cluster, part.server, {*now, part}):
            leaving = sorted(one for one in now - goal if one.server == part.server)
            if not leaving:
                break  # the server's planner has the last word
            needed = {one: len(_unserved(cluster, now - {one})) for one in leaving}
            change(min(leaving, key=lambda one: (needed[one], one)), add=False)
        change(part, add=True)
    for part in sorted(now - goal):
        change(part, add=False)
    return done


def _fits(cluster: Cluster, server: str, parts: Iterable[Part]) -> bool:
    there = cluster.server(server)
    forms = forms_on(cluster.models, (one for one in parts if one.server == server), there)
    try:
        require_fits(forms, there.machine.shapes()[-1])
    except BudgetError:
        return False
    return True


def _unserved(cluster: Cluster, parts: Iterable[Part]) -> list[str]:
    """Models without a chain of these."""
    lengths: Mapping[str, int] = lengths_of(cluster)
    mine = (part for part in parts if part.model in lengths)
    return [model for model, chain in connected(mine, lengths).items() if not chain]
