"""Which slice lives on which server: placement for the most load, or for the shortest wait.

Candidates are columns (``policy.columns``): parts with batch sizes, pinned or streamed. First a
linear program without memory limits (``policy.flow.relaxed``) says what no choice of columns can
exceed, and which columns are worth having. Then columns are exchanged one server at a time
(``policy.exchange``); in a small cluster that is planned for latency its answer is rounded to whole
servers instead. A mixed-integer program goes on from there: with a small cluster as a whole, with a
few servers at a time of a large one, until that no longer helps or the time is over. With all
columns and no limit of time the program is exact, which the tests of the fast way use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, sliced
from lasagna.policy.columns import ALONE, CUTS, Column, columns_of, cuts_of, kinds_of
from lasagna.policy.exchange import best_exchanged
from lasagna.policy.flow import Choice, Flows, chosen, fits, free_of_charge, place, relaxed, used
from lasagna.policy.placed import Bound, Placement, connected
from lasagna.policy.plan import Objective
from lasagna.policy.program import Ends
from lasagna.policy.promise import bound_of, lengths_of, placement_of, require_chains, why_not
from lasagna.policy.settle import settled

NEAR: Final = 24
"""Columns of each kind of server that the integer programs choose from, beside the needed ones."""
SMALL: Final = 1200
"""Columns of all servers together up to which all are considered, and chosen among at once."""
TOGETHER: Final = 400
"""Columns of all servers that are chosen anew together, beyond two servers."""
LARGE: Final = 6
"""Servers beyond which columns are exchanged one server at a time first."""
EACH: Final = 120
"""Columns of a server that is chosen anew, beside those that it has."""
EXCHANGING: Final = 0.2
"""Of the time, in small clusters, for exchanges before an integer program goes on from there."""
SEARCHING: Final = 0.8
"""Share of the time that the search has where servers' planners are asked afterwards."""
FRUITLESS: Final = 12
"""Rounds without gain after which the search ends."""
GAIN: Final = 1e-4
"""Share of the objective that counts as gain."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a plan is to be made.

    Attributes:
        objective: ``throughput``, the most load at the demand's mix; or ``latency``, the least mean
            time of a request at the demand itself, if it can be served at all.
        time_limit_s: by the clock that is handed in, at about which the search ends.
        exact: choose among all columns at once, until nothing better can exist.
        settled: reckon with what servers' own planners make of it, and with whole models on all
            servers (``policy.settle``); else with what columns promise.
        nodes: after which integer programs end, instead of seconds: a plan is the same each time.
    """

    objective: Objective = "throughput"
    time_limit_s: float = 10.0
    exact: bool = False
    settled: bool = True
    nodes: int | None = None


def plan_cluster(
    cluster: Cluster,
    options: PlanOptions | None = None,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    begin: Choice | None = None,
    moving: Callable[[int, Column], float] = free_of_charge,
) -> Placement:
    """Plan where the models' slices live.

    Args:
        cluster: servers, models and the expected load.
        options: what is wanted.
        clock: seconds of a steady clock; one that stands still for a search without limit of time.
        begin: columns to begin with, instead of rounding.
        moving: what having a column on a server (by its number) costs of the objective.

    Raises:
        BudgetError: some model fits on no servers, or no plan keeps the latency limits.
    """
    options = options or PlanOptions()
    until_s = clock() + options.time_limit_s
    count = ALONE if len(cluster.wanted) == 1 else CUTS
    cuts = {name: cuts_of(sliced(cluster.models[name]), count) for name in cluster.wanted}
    columns = columns_of(cluster, cuts, lone=options.objective == "latency")
    require_chains(cluster, columns)
    settling = options.settled and not options.exact and moving is free_of_charge
    left_s = (until_s - clock()) * (SEARCHING if settling else 1.0)
    left = replace(options, time_limit_s=left_s)
    flows, bound, latency_bound = _Search(cluster, left, clock, moving).run(columns, begin)
    most = None
    if options.objective == "latency":  # made for the demand, and carries more
        most = chosen(cluster, used(cluster, flows), "throughput")
    found = placement_of(cluster, flows, bound, most=most, latency_bound=latency_bound)
    if not settling:
        return found
    return settled(cluster, found, options.objective, clock=clock, until_s=until_s)


@dataclass(slots=True)
class _Search:
    cluster: Cluster
    options: PlanOptions
    clock: Callable[[], float]
    moving: Callable[[int, Column], float]

    def run(
        self, columns: Sequence[Column], begin: Choice | None
    ) -> tuple[Flows, Bound, Bound | None]:
        """What the plan carries, and bounds on the scale and on the mean latency."""
        cluster, until_s = self.cluster, self.clock() + self.options.time_limit_s
        most = relaxed(cluster, columns, "throughput")
        if most is None:
            raise BudgetError(why_not(cluster))
        least = None
        if self.options.objective == "latency":
            least = relaxed(cluster, columns, "latency")
        objective: Objective = "throughput" if least is None else "latency"  # as much as possible
        ideal, costs = least or most
        near = self._near(columns, ideal, costs)
        free = {number: near[kind] for number, kind in enumerate(self._kinds)}
        if sum(map(len, self._every(columns).values())) <= SMALL:
            free = self._every(columns)
        if self.options.exact:
            every = self._every(columns)
            nothing = Choice(((),) * len(cluster.servers))
            choice, flows = place(cluster, nothing, every, objective, moving=self.moving)
        else:
            choice = begin or self._begun(columns, ideal, near, until_s)
            free = {n: [*dict.fromkeys((*choice.columns[n], *free[n]))] for n in free}
            if objective == "latency" and chosen(cluster, choice, objective) is None:
                half_s = (self.clock() + until_s) / 2  # first serve all of it, then fast
                choice, _ = self._improved(choice, free, "throughput", half_s)
            choice, flows = self._improved(choice, free, objective, until_s)
            if flows is None:
                flows = chosen(cluster, choice, "throughput")
        if flows is None or flows.scale <= 0.0:
            raise BudgetError(why_not(cluster))
        fastest = None if least is None else bound_of(ideal, "latency")
        return flows, bound_of(most[0], "throughput"), fastest

    def _begun(
        self,
        columns: Sequence[Column],
        most: Flows,
        near: Mapping[int, Sequence[Column]],
        until_s: float,
    ) -> Choice:
        """The best of some choices to begin the search with, after exchanges."""
        small = len(self.cluster.servers) <= LARGE
        if small and self.options.objective == "latency":  # exchanges don't know it
            return self._rounded(columns, most, near, until_s)
        ends_s = until_s
        if small:
            ends_s = self.clock() + EXCHANGING * max(0.0, until_s - self.clock())
        lean = self._lean(columns) or [[] for _ in self.cluster.servers]
        begins = [
            self._shared_out(most, near, [[] for _ in self.cluster.servers]),
            Choice(tuple(map(tuple, lean))),
        ]
        value, best = best_exchanged(
            self.cluster,
            begins,
            self._every(columns),
            most.scale,
            lambda one: self._value(one, chosen(self.cluster, one, "throughput")),
            clock=self.clock,
            until_s=ends_s,
        )
        return best if value > 0.0 else self._rounded(columns, most, near, until_s)

    @property
    def _kinds(self) -> list[int]:
        """Of each server, the number of its kind."""
        kinds = kinds_of(self.cluster.servers)
        numbers = {server.kind: number for number, server in enumerate(kinds)}
        return [numbers[server.kind] for server in self.cluster.servers]

    def _every(self, columns: Sequence[Column]) -> dict[int, list[Column]]:
        """Of each server, all columns that it may have."""
        kinds = self._kinds
        by_kind = {kind: [c for c in columns if c.kind == kind] for kind in set(kinds)}
        return {number: by_kind[kind] for number, kind in enumerate(kinds)}

    def _near(
        self, columns: Sequence[Column], most: Flows, costs: Mapping[Column, float]
    ) -> dict[int, list[Column]]:
        """Of each kind of server, the columns that are worth choosing from.

        Those that the linear program uses; of the parts between any two of its cuts the quickest
        and the leanest; and those that would cost it least.
        """
        used = {column for _, column in most.rates}
        ends = {name: {0, length} for name, length in lengths_of(self.cluster).items()}
        for column in used:
            ends[column.model] |= {column.first, column.last}
        found: dict[int, list[Column]] = {kind: [] for kind in self._kinds}
        for kind in sorted({column.kind for column in columns}):
            parts: dict[tuple[str, int, int], list[Column]] = {}
            for column in columns:
                if column.kind == kind:
                    key = (column.model, column.first, column.last)
                    parts.setdefault(key, []).append(column)
            wanted: list[Column] = []
            for (model, first, last), ways in parts.items():
                if {first, last} <= ends[model]:
                    wanted += [column for column in ways if column in used]
                    wanted += [ways[0], min(ways, key=lambda c: c.alone_bytes)]
            every = (column for ways in parts.values() for column in ways)
            cheap = sorted(every, key=lambda column: costs[column] / column.work_s)
            wanted.sort(key=lambda column: costs[column] / column.work_s)
            found[kind] = list(dict.fromkeys((*wanted, *cheap[:NEAR])))
        return found

    def _rounded(
        self,
        columns: Sequence[Column],
        most: Flows,
        near: Mapping[int, Sequence[Column]],
        until_s: float,
    ) -> Choice:
        """Whole servers for the shares of time of the linear program, the largest first.

        If some model has no chain then, each gets a lean one first, and the shares come on top;
        where even that fails, an integer program looks for any solution.
        """
        servers = self.cluster.servers
        plain = self._shared_out(most, near, [[] for _ in servers])
        if not self._unserved(plain):
            return plain
        lean = self._lean(columns)
        if lean is not None:
            return self._shared_out(most, near, lean)
        every = self._every(columns)
        ends = Ends.after(max(1.0, until_s - self.clock()), self.options.nodes)
        plain, flows = place(self.cluster, plain, every, "throughput", ends=ends, gap=0.1)
        if flows is None or flows.scale <= 0.0:
            names = ", ".join(map(repr, self._unserved(plain)))
            raise BudgetError(f"the servers have no memory for {names} beside the other models")
        return plain

    def _shared_out(
        self, most: Flows, near: Mapping[int, Sequence[Column]], placed: list[list[Column]]
    ) -> Choice:
        cluster = self.cluster
        busy = [0.0 for _ in cluster.servers]
        for kind, server in enumerate(kinds_of(cluster.servers)):
            members = [n for n, one in enumerate(cluster.servers) if one.kind == server.kind]
            shares = [(r * c.work_s, c) for (k, c), r in most.rates.items() if k == kind]
            for share, column in sorted(shares, key=lambda one: (-one[0], one[1].model)):
                ways = [column, *(c for c in near[kind] if _same_part(c, column))]
                for piece in (*[1.0] * int(share), share % 1.0):
                    if piece > 1e-6:
                        self._put(piece, ways, members, placed, busy)
        return Choice(tuple(map(tuple, placed)))

    def _put(
        self,
        piece: float,
        ways: Sequence[Column],
        members: Sequence[int],
        placed: list[list[Column]],
        busy: list[float],
    ) -> None:
        """Where there is most time left for it, in the first way that there is memory for."""
        for number in sorted(members, key=lambda n: (busy[n] + piece > 1.001, busy[n])):
            for column in ways:
                if fits(self.cluster.servers[number], [*placed[number], column]):
                    placed[number].append(column)
                    busy[number] += piece
                    return

    def _unserved(self, choice: Choice) -> list[str]:
        parts = (
            Part(column.model, column.first, column.last, server.name)
            for server, here in zip(self.cluster.servers, choice.columns, strict=True)
            for column in here
        )
        found = connected(parts, lengths_of(self.cluster))
        return [model for model, chain in found.items() if not chain]

    def _lean(self, columns: Sequence[Column]) -> list[list[Column]] | None:
        """A chain of each model in as little memory as it takes, the largest models first.

        None where it can't see one: it takes the longest part that fits, and never goes back.
        """
        cluster = self.cluster
        kinds = self._kinds
        lengths = lengths_of(cluster)
        leanest: dict[tuple[str, int, int, int], Column] = {}
        for column in columns:
            key = (column.model, column.first, column.last, column.kind)
            known = leanest.get(key)
            if known is None or column.alone_bytes < known.alone_bytes:
                leanest[key] = column
        placed: list[list[Column]] = [[] for _ in cluster.servers]
        for model in sorted(lengths, key=lambda name: (-lengths[name], name)):
            at = 0
            while at < lengths[model]:
                best: tuple[int, int, int] | None = None
                for number, kind in enumerate(kinds):
                    for last in range(lengths[model], at, -1):
                        lean = leanest.get((model, at, last, kind))
                        here = placed[number]
                        if lean is not None and fits(cluster.servers[number], [*here, lean]):
                            rank = (last, -len(here), -number)
                            best = rank if best is None else max(best, rank)
                            break
                if best is None:
                    return None
                last, _, number = best[0], best[1], -best[2]
                placed[number].append(leanest[model, at, last, kinds[number]])
                at = last
        return placed

    def _improved(
        self,
        choice: Choice,
        free: Mapping[int, Sequence[Column]],
        objective: Objective,
        until_s: float,
    ) -> tuple[Choice, Flows | None]:
        """The choice after a search around it."""
        cluster = self.cluster
        flows = chosen(cluster, choice, objective)
        if sum(map(len, free.values())) <= SMALL:
            better, reached = place(
                *(cluster, choice, free, objective),
                ends=Ends.after(max(0.1, until_s - self.clock()), self.options.nodes),
                gap=GAIN,
                moving=self.moving,
                known=flows,
            )
            if reached is not None and (flows is None or reached.objective > flows.objective):
                return better, reached
            return choice, flows
        value = self._value(choice, flows)
        fruitless = turn = 0
        while fruitless < FRUITLESS and self.clock() < until_s:
            group = self._group(flows, free, turn)
            turn += 1
            here = {n: tuple(dict.fromkeys((*choice.columns[n], *free[n][:EACH]))) for n in group}
            better, reached = place(
                cluster,
                choice,
                here,
                objective,
                ends=Ends.after(max(0.1, min(2.0, until_s - self.clock())), self.options.nodes),
                gap=0.005,
                moving=self.moving,
                known=flows,
            )
            fruitless += 1
            if reached is None:
                continue
            if flows is None or self._value(better, reached) > value + GAIN * abs(value):
                choice, flows, fruitless = better, reached, 0
                value = self._value(choice, flows)
        return choice, flows

    def _value(self, choice: Choice, flows: Flows | None) -> float:
        """The objective, with what has to be moved."""
        if flows is None:
            return -float("inf")
        moved = sum(
            self.moving(number, column)
            for number, here in enumerate(choice.columns)
            for column in here
        )
        return flows.objective - moved

    def _group(
        self, flows: Flows | None, free: Mapping[int, Sequence[Column]], turn: int
    ) -> list[int]:
        """Servers to choose anew together: each in turn, the least busy first, with busy ones."""
        count = len(self.cluster.servers)
        busy = [0.0] * count
        for (number, column), rate in (flows.rates if flows is not None else {}).items():
            busy[number] += rate * column.work_s
        order = sorted(range(count), key=lambda n: (busy[n], n))
        round_, at = divmod(turn, count)
        group = [order[at]]
        for number in (order[-1 - (round_ + n) % count] for n in range(count)):
            columns = sum(len(free[one]) for one in (*group, number))
            if number not in group and (len(group) == 1 or columns <= TOGETHER):
                group.append(number)
        return group


def _same_part(one: Column, other: Column) -> bool:
    return (one.model, one.first, one.last) == (other.model, other.first, other.last)
