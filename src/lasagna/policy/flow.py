"""How much load columns can carry: flows of requests from first slices through last ones.

The program: at each cut of a model as much flows out as came in; a server works for a second each
second at most; a link carries what it can. With columns chosen, that is a linear program. Choosing
them too makes it a mixed-integer one: each server has memory for so many. And a linear one again,
if servers of a kind are taken together and may share their time among columns as if each had the
memory to itself: what that reaches, no choice of columns exceeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lasagna.policy.cluster import Cluster, Server, sliced
from lasagna.policy.columns import Column, kinds_of, room_on
from lasagna.policy.plan import Objective
from lasagna.policy.program import NEVER, Ends, Program, Solved

FULL: Final = 1.0
BUSY: Final = 0.85
"""Share of its time that a server may work where latency counts: beyond, requests wait long."""
_TANGENTS: Final = (0.1, 0.3, 0.5, 0.65, 0.75, 0.85)
"""Shares of busy time at which the length of a queue is reckoned with."""
_TIE: Final = 1e-4
"""Of the scale that may be lost for a latency that is better by all of it."""


def free_of_charge(server: int, column: Column) -> float:
    """Columns that cost nothing but what they take."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What lives where: columns of each server, by its number in the cluster."""

    columns: tuple[tuple[Column, ...], ...]


@dataclass(frozen=True, slots=True)
class Flows:
    """What a choice carries.

    Attributes:
        scale: multiples of the demand.
        rates: requests a second through each column, by server's number and column.
        objective: that was maximised: the scale, or minus the mean seconds of a request with its
            waits.
    """

    scale: float
    rates: Mapping[tuple[int, Column], float]
    objective: float


def used(cluster: Cluster, flows: Flows) -> Choice:
    """The columns that something flows through."""
    found: list[list[Column]] = [[] for _ in cluster.servers]
    for number, column in flows.rates:
        found[number].append(column)
    return Choice(tuple(map(tuple, found)))


def latency_of(column: Column, server: Server, slices: int) -> float:
    """Seconds of a request for a column, with its share of carrying.

    Between two servers, each end answers for half of the transfer, and for its delay.
    """
    come = column.in_bytes / server.bandwidth / (1 if column.first == 0 else 2)
    leave = column.out_bytes / server.bandwidth / (1 if column.last == slices else 2)
    return column.through_s + come + leave + 2 * server.delay_s


@dataclass(slots=True)
class _Built:
    """A program under construction."""

    cluster: Cluster
    objective: Objective
    program: Program = field(default_factory=Program)
    scale: int = -1
    _slices: dict[str, int] = field(init=False)
    _served: dict[tuple[str, int], list[tuple[int, float]]] = field(init=False)
    _late: dict[str, list[tuple[int, float]]] = field(init=False)

    def __post_init__(self) -> None:
        cluster = self.cluster
        self._slices = {name: len(sliced(cluster.models[name]).slices) for name in cluster.wanted}
        self._served = defaultdict(list)
        self._late = defaultdict(list)
        if self.objective == "throughput":
            self.scale = self.program.variable(1.0)
        else:
            self.scale = self.program.variable(0.0, 1.0, 1.0)
        self._total = sum(cluster.demand[name] for name in cluster.wanted)

    _total: float = field(init=False, default=0.0)

    @property
    def share(self) -> float:
        """Of its time that a server may work."""
        plain = self.objective == "throughput" and not self.cluster.limits_s
        return FULL if plain else BUSY

    def flow(self, column: Column, server: Server, most: float) -> int:
        """A variable for the requests a second through a column on a server."""
        slices = self._slices[column.model]
        late_s = latency_of(column, server, slices)
        weight = _TIE if self.objective == "throughput" else 1.0
        rate = self.program.variable(-weight * late_s / self._total, 0.0, most)
        if column.first:
            self._served[column.model, column.first].append((rate, -1.0))
        else:
            self._served[column.model, 0].append((rate, 1.0))
        if column.last < slices:
            self._served[column.model, column.last].append((rate, 1.0))
        self._late[column.model].append((rate, late_s))
        return rate

    def connect(self) -> None:
        """What comes to a cut leaves it, and each model's demand comes in."""
        for model in self.cluster.wanted:
            self._served[model, 0].append((self.scale, -self.cluster.demand[model]))
            limit = self.cluster.limits_s.get(model)
            if limit is not None:
                asked = (self.scale, -limit * self.cluster.demand[model])
                self.program.row([*self._late[model], asked], -float("inf"), 0.0)
        for terms in self._served.values():
            self.program.row(terms, 0.0, 0.0)

    def limit(self, used: Sequence[tuple[int, Column]], server: Server, servers: int) -> None:
        """What so many servers and their links have time for."""
        none = -float("inf")
        if self.objective == "latency":
            width = server.bandwidth
            self._wait([(v, c.work_s) for v, c in used], servers)
            self._wait([(v, c.in_bytes / width) for v, c in used], servers)
            self._wait([(v, c.out_bytes / width) for v, c in used], servers)
        self.program.row([(v, c.work_s) for v, c in used], none, self.share * servers)
        whole = self.share * servers * server.bandwidth
        self.program.row([(v, float(c.in_bytes)) for v, c in used], none, whole)
        self.program.row([(v, float(c.out_bytes)) for v, c in used], none, whole)

    def _wait(self, used: Sequence[tuple[int, float]], servers: int) -> None:
        """What waiting adds: the M/D/1 queue's length, from below by some of its tangents.

        Args:
            used: rates, and seconds that a request keeps the server or its link busy.
            servers: that share the requests.
        """
        waiting = self.program.variable(-1.0 / self._total)
        for at in _TANGENTS:
            slope = at * (2 - at) / (2 * (1 - at) ** 2)
            height = at * at / (2 * (1 - at)) - slope * at
            line = [(v, slope * seconds) for v, seconds in used]
            self.program.row([*line, (waiting, -1.0)], -float("inf"), -height * servers)


def relaxed(
    cluster: Cluster, columns: Sequence[Column], objective: Objective
) -> tuple[Flows, dict[Column, float]] | None:
    """What the servers could carry if each had its memory for every column in turn.

    Returns:
        The flows, by number of the kind instead of the server; and of each column, by how much
        the objective would be less for a request a second through it. None if nothing is carried
        within the limits.
    """
    kinds = kinds_of(cluster.servers)
    built = _Built(cluster, objective)
    by_kind: dict[int, list[tuple[int, Column]]] = defaultdict(list)
    for column in columns:
        rate = built.flow(column, kinds[column.kind], float("inf"))
        by_kind[column.kind].append((rate, column))
    built.connect()
    for number, used in by_kind.items():
        count = sum(server.kind == kinds[number].kind for server in cluster.servers)
        built.limit(used, kinds[number], count)
    solved = built.program.solve()
    if solved is None:
        return None
    every = [(n, pair) for n, used in by_kind.items() for pair in used]
    flows = _flows(built, solved, every)
    return flows, {column: abs(solved.reduced[rate]) for _, (rate, column) in every}


def chosen(cluster: Cluster, choice: Choice, objective: Objective) -> Flows | None:
    """What a choice of columns carries; None if it misses a latency limit, or a chain."""
    return place(cluster, choice, {}, objective)[1]


def place(
    cluster: Cluster,
    choice: Choice,
    free: Mapping[int, Collection[Column]],
    objective: Objective,
    *,
    ends: Ends = NEVER,
    gap: float = 0.0,
    moving: Callable[[int, Column], float] = free_of_charge,
    known: Flows | None = None,
) -> tuple[Choice, Flows | None]:
    """Choose the columns of some servers anew, for the best objective.

    Args:
        cluster: servers, models and load.
        choice: of columns so far, one of the possible solutions.
        free: servers by number, with the columns that each may have.
        objective: what is best.
        ends: when the solver is to end at the latest.
        gap: share of the objective that need not be found.
        moving: what having a column on a server, by its number, costs of the objective.
        known: what the choice so far carries, for the solver to begin with.

    Returns:
        The choice, and what it carries; the choice so far and None where nothing was found.
    """
    built = _Built(cluster, objective)
    rates: list[tuple[int, tuple[int, Column]]] = []
    picks: dict[tuple[int, Column], int] = {}
    held: dict[int, tuple[int, int]] = {}
    for number, server in enumerate(cluster.servers):
        here = tuple(free[number]) if number in free else choice.columns[number]
        used = []
        for column in here:
            most = built.share / column.work_s
            rate = built.flow(column, server, most)
            used.append((rate, column))
            rates.append((number, (rate, column)))
            if number in free:
                cost = moving(number, column)
                pick = built.program.variable(-cost, 0.0, 1.0, integer=True)
                built.program.row([(rate, 1.0), (pick, -most)], -float("inf"), 0.0)
                picks[number, column] = pick
        if number in free:
            own = {column: picks[number, column] for column in here}
            held[number] = _remember(built.program, server, own)
        built.limit(used, server, 1)
    built.connect()
    start: dict[int, float] = {}
    if known is not None and objective == "throughput":
        start = {built.scale: known.scale}
        start |= {rate: known.rates.get((n, c), 0.0) for n, (rate, c) in rates}
        start |= {pick: float(c in choice.columns[n]) for (n, c), pick in picks.items()}
        for number, (running, ring) in held.items():
            here = choice.columns[number]
            start[running] = max((c.running_bytes for c in here), default=0) / 1e6
            start[ring] = max((c.ring_bytes for c in here), default=0) / 1e6
    solved = built.program.solve(ends=ends, gap=gap, start=start)
    if solved is None:
        return choice, None
    columns = tuple(
        tuple(c for c in free[number] if solved.values[picks[number, c]] > 0.5)
        if number in free
        else choice.columns[number]
        for number in range(len(cluster.servers))
    )
    return Choice(columns), _flows(built, solved, rates)


def fits(server: Server, columns: Iterable[Column]) -> bool:
    """Whether a server has memory for all of these at once, and each part only once."""
    here = list(columns)
    if len({(one.model, one.first, one.last) for one in here}) < len(here):
        return False
    return memory_of(here) <= room_on(server)


def memory_of(columns: Collection[Column]) -> int:
    """Bytes that a server needs for all of these at once, each of another part."""
    own = sum(one.own_bytes for one in columns)
    running = max((one.running_bytes for one in columns), default=0)
    ring = max((one.ring_bytes for one in columns), default=0)
    return own + running + ring


def _remember(program: Program, server: Server, picks: Mapping[Column, int]) -> tuple[int, int]:
    """The rows of ``fits``, for columns that may be picked. Sizes in MB, which solvers like.

    Returns:
        The variables for what runs, and for the ring.
    """
    running, ring = program.variable(), program.variable()
    parts: dict[tuple[str, int, int], list[tuple[int, float]]] = defaultdict(list)
    for column, pick in picks.items():
        none = -float("inf")
        program.row([(pick, column.running_bytes / 1e6), (running, -1.0)], none, 0.0)
        program.row([(pick, column.ring_bytes / 1e6), (ring, -1.0)], none, 0.0)
        parts[column.model, column.first, column.last].append((pick, 1.0))
    own = [(pick, column.own_bytes / 1e6) for column, pick in picks.items()]
    program.row([*own, (running, 1.0), (ring, 1.0)], 0.0, room_on(server) / 1e6)
    for terms in parts.values():
        if len(terms) > 1:
            program.row(terms, 0.0, 1.0)
    return running, ring


def _flows(built: _Built, solved: Solved, rates: Iterable[tuple[int, tuple[int, Column]]]) -> Flows:
    values = solved.values
    every = [(number, column, values[rate]) for number, (rate, column) in rates]
    kept = {(number, column): rate for number, column, rate in every if rate > 1e-9}
    return Flows(values[built.scale], kept, solved.objective)
