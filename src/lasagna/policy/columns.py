"""Ways in which a part of a model can live on a server, with what each takes and gives.

A column is a part on servers of one kind, with batch sizes for its stages and a share of its
weights pinned. It promises no more than the server's own planner (``policy.memory``) could do with
the same division: stages come from the same dynamic program, times from the same formulas. A
server's memory is divided among its columns so: what they pin and what waits between their stages
adds up; of the batch that runs, and of the ring that weights stream through, there is one, as large
as the neediest column asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Final

from lasagna.policy.cluster import Cluster, Kind, Server, at_speed, sliced
from lasagna.policy.costs import ModelCosts
from lasagna.policy.stages import (
    RECORD_S,
    SEAL_RATE,
    SLICE_S,
    Machine,
    Stage,
    alone_s,
    copy_s,
    visit_s,
    waiting_rows,
)
from lasagna.policy.staging import Staging
from lasagna.units import whole_pages

SHARES: Final = (0.0, 0.5, 1.0)
"""Of a part's weights that may be pinned; beside as much as there is room for."""
RUNNING: Final = (0.08, 0.25, 0.6)
"""Shares of a server's memory that the running batch may take."""
SLOTS: Final = 2
"""Of the ring: one to compute from, one to be filled. A server with more room makes it longer."""
CUTS: Final = 8
"""So many cuts of a model are considered, beside its ends."""
ALONE: Final = 16
"""The same, where there is only one model."""
MAX_ROWS: Final = 32


@dataclass(frozen=True, slots=True)
class Column:
    """A part on a server of some kind. Sizes in bytes.

    Attributes:
        model: that it is a part of.
        first: its first slice.
        last: the slice behind its last.
        kind: number of the kind of server.
        own_bytes: pinned weights, and rows between its stages.
        running_bytes: of the batch that runs, with the kernels' workspace.
        ring_bytes: that its other weights stream through.
        work_s: seconds of the server for a request, in full batches.
        through_s: seconds of a request that comes to the idle server.
        in_bytes: of a request that comes in, sealed.
        out_bytes: of one that leaves.
    """

    model: str
    first: int
    last: int
    kind: int
    own_bytes: int
    running_bytes: int
    ring_bytes: int
    work_s: float
    through_s: float
    in_bytes: int
    out_bytes: int

    @property
    def alone_bytes(self) -> int:
        """Of memory, when it is the server's only column."""
        return self.own_bytes + self.running_bytes + self.ring_bytes

    def beats(self, other: Column) -> bool:
        """Whether it is no worse than another column of the same part in anything."""
        return (
            self.own_bytes <= other.own_bytes
            and self.running_bytes <= other.running_bytes
            and self.ring_bytes <= other.ring_bytes
            and self.work_s <= other.work_s
            and self.through_s <= other.through_s
        )


def kinds_of(servers: Iterable[Server]) -> tuple[Server, ...]:
    """One server of each kind, in the order in which they first come."""
    found: dict[Kind, Server] = {}
    for server in servers:
        found.setdefault(server.kind, server)
    return tuple(found.values())


def room_on(server: Server) -> int:
    """Bytes for columns, beside the copies of ciphertext that its threads work on."""
    machine = shape_of(server)
    return machine.budget - (machine.lanes + 1) * whole_pages(machine.chunk_bytes + 64)


def shape_of(server: Server) -> Machine:
    """The shape that takes the least memory: all threads on one batch."""
    return server.machine.shapes()[-1]


def columns_of(
    cluster: Cluster, cuts: Mapping[str, Sequence[int]], *, lone: bool = False
) -> list[Column]:
    """All columns that fit on some server alone and that none beats.

    Args:
        cluster: servers and models.
        cuts: of each model, where parts may begin and end, without its ends.
        lone: of requests that meet no others, too: without batches there is more room for weights.
    """
    found: list[Column] = []
    known: dict[tuple[ModelCosts, Machine, tuple[int, ...]], list[Column]] = {}
    for number, server in enumerate(kinds_of(cluster.servers)):
        for model in cluster.wanted:
            costs = at_speed(sliced(cluster.models[model]), server.speed)
            ends = (0, *cuts[model], len(costs.slices))
            key = costs, server.machine, ends  # links and names don't matter
            if key not in known:
                known[key] = _columns(costs, server, ends, lone=lone)
            found += [replace(column, model=model, kind=number) for column in known[key]]
    return found


def _columns(costs: ModelCosts, server: Server, ends: Sequence[int], *, lone: bool) -> list[Column]:
    """Of a model with these costs at the server's speed."""
    room, machine = room_on(server), shape_of(server)
    staging = Staging(costs, machine, MAX_ROWS)
    every = [staging.within(int(room * share)) for share in RUNNING]
    if lone:
        every.append((Stage(0, len(costs.slices), 1),))
    made: dict[tuple[int, int], list[Column]] = {}
    for stages in every:
        sums = _Sums(costs, stages, machine)
        for a, first in enumerate(ends[:-1]):
            for last in ends[a + 1 :]:
                made.setdefault((first, last), []).extend(sums.columns(first, last, room))
    return [column for those in made.values() for column in _unbeaten(those)]


def cuts_of(costs: ModelCosts, most: int = CUTS) -> tuple[int, ...]:
    """The cuts of a model that are worth considering.

    One in each of so many stretches of about the same weights: the one that the fewest bytes cross.
    """
    count = len(costs.slices)
    if count - 1 <= most:
        return tuple(range(1, count))
    total = sum(one.weight_bytes for one in costs.slices) or 1
    best: dict[int, int] = {}
    before = 0
    for cut in range(1, count):
        before += costs.slices[cut - 1].weight_bytes
        where = min(most - 1, (most * before // total + most * cut // count) // 2)
        known = best.get(where)
        if known is None or costs.cut_bytes[cut] < costs.cut_bytes[known]:
            best[where] = cut
    return tuple(sorted(best.values()))


def _unbeaten(columns: Iterable[Column]) -> list[Column]:
    kept: list[Column] = []
    for one in sorted(columns, key=lambda c: (c.work_s, c.alone_bytes, c.through_s)):
        if not any(other.beats(one) for other in kept):
            kept.append(one)
    return kept


@dataclass(slots=True)
class _Sums:
    """Sums over a model's slices, so that a part's costs are differences."""

    costs: ModelCosts
    stages: tuple[Stage, ...]
    machine: Machine
    _weights: list[int] = field(init=False)
    _curves: dict[int, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        sizes = (whole_pages(one.weight_bytes) for one in self.costs.slices)
        self._weights = list(accumulate(sizes, initial=0))
        rows = {stage.rows for stage in self.stages} | {1}
        self._curves = {
            each: list(accumulate((s.compute_at(each) for s in self.costs.slices), initial=0.0))
            for each in rows
        }

    def columns(self, first: int, last: int, room: int) -> list[Column]:
        """The part with each share of its weights pinned that there is room for.

        Weights of stages with small batches are pinned first: they would be loaded most often.
        """
        costs = self.costs
        stages = [
            Stage(max(first, one.first), min(last, one.last), one.rows)
            for one in self.stages
            if one.first < last and one.last > first
        ]
        weights = self._weights[last] - self._weights[first]
        waiting = sum(
            whole_pages(costs.cut_bytes[b.first] * waiting_rows(a, b, self.machine.lanes))
            for a, b in pairwise(stages)
        )
        running = max(costs.activations_at(s.first, s.last, s.rows) for s in stages)
        workspace = max(costs.workspace_at(s.first, s.last, s.rows) for s in stages)
        inputs = costs.cut_bytes[first] * stages[0].rows * self.machine.most_runs
        slots = min(SLOTS, last - first)
        ring = slots * max(whole_pages(s.weight_bytes) for s in costs.slices[first:last])
        made = []
        lanes = self.machine.lanes
        running_bytes = lanes * whole_pages(running) + whole_pages(workspace) + inputs
        rest = room - waiting - running_bytes - ring  # what is left for pins on a server of its own
        shares = {int(share * weights) for share in SHARES} | {max(0, min(weights, rest))}
        for pinned in sorted(shares):
            through = ring if pinned < weights else 0
            if pinned + waiting + running_bytes + through > room:
                continue
            loads = self._loads(stages, pinned)
            made.append(
                Column(
                    "",
                    first,
                    last,
                    0,
                    pinned + waiting,
                    running_bytes,
                    through,
                    self._work_s(stages, loads, first, last),
                    self._through_s(stages, loads, first, last),
                    costs.cut_bytes[first],
                    costs.cut_bytes[last],
                )
            )
        return made

    def _loads(self, stages: Sequence[Stage], pinned: int) -> list[int]:
        """Bytes that each stage loads at every visit."""
        loads: dict[int, int] = {}
        for stage in sorted(stages, key=lambda one: (one.rows, one.first)):
            size = self._weights[stage.last] - self._weights[stage.first]
            loads[stage.first] = max(0, size - pinned)
            pinned = max(0, pinned - size)
        return [loads[stage.first] for stage in stages]

    def _computes_s(self, stage: Stage, rows: int) -> float:
        curve, single = self._curves[rows], self._curves[1]
        return self.machine.batch_s(
            curve[stage.last] - curve[stage.first], single[stage.last] - single[stage.first]
        ) + SLICE_S * (stage.last - stage.first)

    def _seals_s(self, first: int, last: int) -> float:
        return (self.costs.cut_bytes[first] + self.costs.cut_bytes[last]) / SEAL_RATE + 2 * RECORD_S

    def _work_s(
        self, stages: Sequence[Stage], loads: Sequence[int], first: int, last: int
    ) -> float:
        total = self._seals_s(first, last) / self.machine.cores
        for stage, load in zip(stages, loads, strict=True):
            busy_s = self._computes_s(stage, stage.rows)
            if stage.first > first:
                busy_s += copy_s(self.costs, stage.first, stage.rows)
            load_s = load / self.machine.load_rate
            bare_s = max(0.0, load_s - busy_s)
            total += visit_s(busy_s, load_s, bare_s, self.machine) / stage.rows
        return total

    def _through_s(
        self, stages: Sequence[Stage], loads: Sequence[int], first: int, last: int
    ) -> float:
        total = self._seals_s(first, last)
        for stage, load in zip(stages, loads, strict=True):
            busy_s = self._computes_s(stage, 1)
            load_s = load / self.machine.load_rate
            total += alone_s(busy_s, load_s, max(0.0, load_s - busy_s), self.machine)
        return total
