"""A large cluster in groups: a few servers with a few models each, that are planned by themselves.

The relaxed program says how many servers' time each model needs of each kind. Models that need many
are divided into units of a few servers, those that need little share a unit; servers are dealt out
to the units by what they need of each kind. A unit is small enough for an integer program. Then
the poorest is merged with a rich one, or gets a server of it, as long as that helps the poorest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from lasagna.policy.cluster import Cluster
from lasagna.policy.columns import Column, kinds_of
from lasagna.policy.flow import Choice, Flows

UNIT: Final = 3.0
"""Servers of a unit, about."""
MERGED: Final = 7
"""Servers of a unit that two have been merged into, at most."""
TRIES: Final = 3
"""Of the richest units, so many are asked for help."""

Solve = Callable[[Cluster, Sequence[Column], Choice | None], tuple[Choice, float]]
"""Plans a small cluster with these columns, beginning with a choice if there is one: what it chose,
and the scale; 0 where there is none."""


@dataclass(slots=True, eq=False)
class _Unit:
    """Some servers, by number, for some models, with their share of the demand."""

    demand: dict[str, float]
    needs: dict[int, float]
    servers: list[int] = field(default_factory=list)
    choice: Choice = field(default_factory=lambda: Choice(()))
    scale: float = 0.0


def in_groups(
    cluster: Cluster,
    columns: Sequence[Column],
    most: Flows,
    solve: Solve,
    left: Callable[[], bool],
) -> Choice:
    """A choice of columns that was made unit by unit.

    Args:
        cluster: to plan for.
        columns: that there are to choose from.
        most: the relaxed program's flows, by kind of server.
        solve: plans one unit.
        left: whether there is time for another improvement.
    """
    return _Groups(cluster, columns, solve, left).run(most)


@dataclass(slots=True)
class _Groups:
    cluster: Cluster
    columns: Sequence[Column]
    solve: Solve
    left: Callable[[], bool]
    _kinds: list[int] = field(init=False)
    _known: dict[object, tuple[Choice, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = kinds_of(self.cluster.servers)
        numbers = {server.kind: number for number, server in enumerate(kinds)}
        self._kinds = [numbers[server.kind] for server in self.cluster.servers]

    def run(self, most: Flows) -> Choice:
        """Deal out, plan, and level."""
        units = _units(self.cluster, most)
        _deal(units, self._kinds)
        for unit in units:
            self._plan(unit)
        while self.left() and self._level(units):
            pass
        columns: list[tuple[Column, ...]] = [()] * len(self.cluster.servers)
        for unit in units:
            for number, here in zip(unit.servers, unit.choice.columns, strict=True):
                columns[number] = here
        return Choice(tuple(columns))

    def _plan(self, unit: _Unit) -> None:
        """Choose the unit's columns. Units that are alike are planned once."""
        unit.servers.sort(key=lambda number: (self._kinds[number], number))
        kinds = [self._kinds[number] for number in unit.servers]
        key = tuple(kinds), tuple(sorted(unit.demand.items()))
        if key not in self._known:
            self._known[key] = self._solved(unit, kinds, None)
        unit.choice, unit.scale = self._known[key]

    def _merged(self, one: _Unit, other: _Unit) -> _Unit:
        """Both as one unit, planned from what they have."""
        here = dict(zip(one.servers, one.choice.columns, strict=True))
        here |= dict(zip(other.servers, other.choice.columns, strict=True))
        demand = dict(one.demand)
        for model, rate in other.demand.items():
            demand[model] = demand.get(model, 0.0) + rate
        needs = {
            kind: one.needs.get(kind, 0.0) + other.needs.get(kind, 0.0)
            for kind in {**one.needs, **other.needs}
        }
        unit = _Unit(demand, needs, sorted(here, key=lambda n: (self._kinds[n], n)))
        kinds = [self._kinds[number] for number in unit.servers]
        begin = Choice(tuple(here[number] for number in unit.servers))
        unit.choice, unit.scale = self._solved(unit, kinds, begin)
        return unit

    def _solved(
        self, unit: _Unit, kinds: Sequence[int], begin: Choice | None
    ) -> tuple[Choice, float]:
        if not kinds:
            return Choice(()), 0.0
        small = replace(
            self.cluster,
            servers=tuple(self.cluster.servers[number] for number in unit.servers),
            demand=unit.demand,
            limits_s={n: s for n, s in self.cluster.limits_s.items() if n in unit.demand},
        )
        inner = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        own = [
            replace(column, kind=inner[column.kind])
            for column in self.columns
            if column.kind in inner and column.model in unit.demand
        ]
        if begin is not None:
            begin = _renamed(begin, inner)
        choice, scale = self.solve(small, own, begin)
        return _renamed(choice, {number: kind for kind, number in inner.items()}), scale

    def _level(self, units: list[_Unit]) -> bool:
        """Merge the poorest unit with a rich one, or give it a server; whether that helped."""
        by_scale = sorted(units, key=lambda unit: unit.scale)
        poorest, rich_ones = by_scale[0], by_scale[: -TRIES - 1 : -1]
        for rich in rich_ones:
            if rich is poorest or len(rich.servers) + len(poorest.servers) > MERGED:
                continue
            both = self._merged(poorest, rich)
            if both.scale > poorest.scale * (1 + 1e-3):
                units[:] = [unit for unit in units if unit not in (poorest, rich)] + [both]
                return True
            if not self.left():
                return False
        for rich in rich_ones:
            if rich is poorest or len(rich.servers) < 2:
                continue
            for number in {self._kinds[n]: n for n in rich.servers}.values():
                was = [
                    (unit, list(unit.servers), unit.choice, unit.scale) for unit in (rich, poorest)
                ]
                rich.servers.remove(number)
                poorest.servers.append(number)
                self._plan(rich)
                self._plan(poorest)
                if min(rich.scale, poorest.scale) > was[1][3] * (1 + 1e-6):
                    return True
                for unit, servers, choice, scale in was:
                    unit.servers, unit.choice, unit.scale = servers, choice, scale
                if not self.left():
                    return False
        return False


def _renamed(choice: Choice, kinds: Mapping[int, int]) -> Choice:
    """The same columns, with other numbers for the kinds of servers."""
    return Choice(
        tuple(
            tuple(replace(column, kind=kinds[column.kind]) for column in here)
            for here in choice.columns
        )
    )


def _units(cluster: Cluster, most: Flows) -> list[_Unit]:
    """Units of about so many servers' time each."""
    needs: dict[str, dict[int, float]] = {model: {} for model in cluster.wanted}
    for (kind, column), rate in most.rates.items():
        own = needs[column.model]
        own[kind] = own.get(kind, 0.0) + rate * column.work_s
    units: list[_Unit] = []
    spare: _Unit | None = None
    for model in sorted(needs, key=lambda name: (-sum(needs[name].values()), name)):
        total = sum(needs[model].values())
        count = max(1, round(total / UNIT))
        demand = {model: cluster.demand[model] / count}
        own = {kind: share / count for kind, share in needs[model].items()}
        if total > UNIT / 2:
            units += [_Unit(dict(demand), dict(own)) for _ in range(count)]
            continue
        if spare is None or sum(spare.needs.values()) + total > UNIT:
            spare = _Unit({}, {})
            units.append(spare)
        spare.demand |= demand
        for kind, share in own.items():
            spare.needs[kind] = spare.needs.get(kind, 0.0) + share
    return units


def _deal(units: Sequence[_Unit], kinds: Sequence[int]) -> None:
    """Servers to units: of each kind by what they need of it; the rest to who lacks most."""

    def lack(unit: _Unit) -> float:
        need = sum(unit.needs.values())
        return (need - len(unit.servers)) / max(need, 1e-9)

    for kind in sorted(set(kinds)):
        members = [number for number, one in enumerate(kinds) if one == kind]
        left = {index: unit.needs.get(kind, 0.0) for index, unit in enumerate(units)}
        for number in members:
            index = max(left, key=lambda i: (left[i], lack(units[i])))
            if left[index] < 0.25:
                index = max(left, key=lambda i: lack(units[i]))
            units[index].servers.append(number)
            left[index] -= 1.0
