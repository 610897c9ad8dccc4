"""How an enclave's memory is divided among models: what to pin, and how large batches may be.

Early layers have large activations and small weights, late layers the reverse. So a model is
divided into **stages**, runs of slices with one batch size each: small batches early, where a row
takes much memory, large ones late, where a load of weights should serve many rows. Requests wait at
the cut between two stages until enough of them are there for a large batch.

Memory goes to four ends: weights that stay (pinned), a ring for the others, the activations and
workspace of what runs, and the activations of what waits between stages. More for what runs means
larger batches and fewer pins. Several divisions are tried, and the one with the least predicted
time is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from lasagna.errors import BudgetError
from lasagna.policy.costs import ModelCosts
from lasagna.units import format_bytes

ROWS: Final = (1, 2, 4, 8, 16, 32)
"""Batch sizes to choose from."""
RING_SLOTS: Final = 3
"""One in use, one ready, one being filled (enclave.plan.RING_SLOTS)."""
DIVISIONS: Final = 12
"""How many amounts of memory for running batches are tried."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the enclave has.

    Attributes:
        budget: bytes for everything named here.
        lanes: compute threads.
        cores: processors for those and for loading.
        load_rate: bytes a second that one thread decrypts.
        entry_s: what a call into the enclave takes.
    """

    budget: int
    lanes: int
    cores: int
    load_rate: float
    entry_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """Slices ``first`` to ``last``, exclusive, on up to ``rows`` rows at once."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A division of the memory. Sizes in bytes; they add up to no more than the budget.

    Attributes:
        stages: of each model, in order.
        pinned: slices of each model whose weights stay.
        slot_bytes: of a slot of the ring; 0 when everything is pinned.
        ring_bytes: of all slots.
        running_bytes: activations and workspace of the batches that run.
        waiting_bytes: activations of requests between two stages.
        pinned_bytes: weights that stay.
        request_s: predicted seconds of the server for a request of each model, when it is busy.
    """

    stages: Mapping[str, tuple[Stage, ...]]
    pinned: Mapping[str, frozenset[int]]
    slot_bytes: int
    ring_bytes: int
    running_bytes: int
    waiting_bytes: int
    pinned_bytes: int
    request_s: Mapping[str, float]

    @property
    def total_bytes(self) -> int:
        """Of the whole plan."""
        return self.ring_bytes + self.running_bytes + self.waiting_bytes + self.pinned_bytes


def divide(
    models: Mapping[str, ModelCosts], demand: Mapping[str, float], machine: Machine
) -> MemoryPlan:
    """Divide the memory for the least time a mean request.

    Args:
        models: to serve, by name; at least one.
        demand: share of each in the load. Only ratios count; a model without one gets next to none.
        machine: what there is.

    Raises:
        BudgetError: not even batches of one row with nothing pinned fit.
    """
    least = min(demand.values(), default=0.0) or 1.0
    weights = {name: demand.get(name, 0.0) or least / 1000 for name in models}
    smallest = max(costs.bytes_at(n, n + 1, 1) for costs in models.values() for n in _all(costs))
    best: MemoryPlan | None = None
    best_s = float("inf")
    for step in range(DIVISIONS):
        # From the smallest that works to all of the memory, evenly in proportion.
        each = int(smallest * max(1.0, machine.budget / machine.lanes / smallest) ** (step / 11))
        plan = _divide(models, weights, machine, each, staged=True)
        if plan is None:  # what waits between stages takes too much
            plan = _divide(models, weights, machine, each, staged=False)
        if plan is None:
            continue
        seconds = sum(weights[name] * plan.request_s[name] for name in models)
        if seconds < best_s:
            best, best_s = plan, seconds
    if best is None:
        slot = max(one.weight_bytes for costs in models.values() for one in costs.slices)
        raise BudgetError(
            f"{', '.join(map(repr, models))} need {format_bytes(smallest * machine.lanes)} for "
            f"running batches of one row and {format_bytes(slot)} for the largest slice; the "
            f"budget is {format_bytes(machine.budget)}"
        )
    return best


def _divide(
    models: Mapping[str, ModelCosts],
    weights: Mapping[str, float],
    machine: Machine,
    each: int,
    *,
    staged: bool,
) -> MemoryPlan | None:
    """The plan with so many bytes for each running batch, if the rest fits beside it."""
    stages = {
        name: _stages(costs, machine, each) if staged else _one_stage(costs, each)
        for name, costs in models.items()
    }
    running = machine.lanes * max(
        models[name].bytes_at(one.first, one.last, one.rows)
        for name in models
        for one in stages[name]
    )
    waiting = sum(_waiting(models[name], stages[name]) for name in models)
    room = machine.budget - running - waiting
    if room < 0:
        return None
    sizes = {
        (name, n): one.weight_bytes
        for name, costs in models.items()
        for n, one in enumerate(costs.slices)
    }
    # A pinned byte saves its decryption at every visit of its stage: most where visits are many.
    value = {
        (name, n): weights[name] / stage.rows
        for name in models
        for stage in stages[name]
        for n in range(stage.first, stage.last)
    }
    pinned, slot = _pin(sizes, value, room)
    if pinned is None:
        return None
    slots = 0 if not slot else min(RING_SLOTS, len(sizes) - len(pinned), room // slot)
    kept = {name: frozenset(n for m, n in pinned if m == name) for name in models}
    return MemoryPlan(
        stages=stages,
        pinned=kept,
        slot_bytes=slot,
        ring_bytes=slots * slot,
        running_bytes=running,
        waiting_bytes=waiting,
        pinned_bytes=sum(sizes[key] for key in pinned),
        request_s={
            name: _request_s(models[name], stages[name], kept[name], machine) for name in models
        },
    )


def _pin(
    sizes: Mapping[tuple[str, int], int], value: Mapping[tuple[str, int], float], room: int
) -> tuple[frozenset[tuple[str, int]] | None, int]:
    """What to pin beside a ring for the others, and the size of its slots; None if nothing fits."""
    if sum(sizes.values()) <= room:
        return frozenset(sizes), 0
    order = sorted(sizes, key=lambda key: (-value[key], sizes[key], key))
    slot = max(sizes.values())
    slots = next((n for n in range(min(RING_SLOTS, len(sizes)), 0, -1) if n * slot <= room), 0)
    if not slots:
        return None, 0
    left = room - slots * slot
    pinned = set()
    for key in order:
        if sizes[key] <= left:
            pinned.add(key)
            left -= sizes[key]
    slot = max(size for key, size in sizes.items() if key not in pinned)
    return frozenset(pinned), slot


def _stages(costs: ModelCosts, machine: Machine, each: int) -> tuple[Stage, ...]:
    """Divide a model into stages of the least time a row, when all weights are streamed.

    A dynamic program over the cuts: a stage costs its visit divided by the rows that all of its
    slices can take within ``each`` bytes.
    """
    count = len(costs.slices)
    limits = [_rows_within(costs, n, each) for n in range(count)]
    compute = {rows: _sums(one.compute_at(rows) for one in costs.slices) for rows in ROWS}
    load = _sums(one.weight_bytes / machine.load_rate for one in costs.slices)
    best = [0.0] + [float("inf")] * count
    chosen = [(0, 1)] * (count + 1)
    for last in range(1, count + 1):
        limit = limits[last - 1]
        for first in range(last - 1, -1, -1):
            limit = min(limit, limits[first])
            rows = (
                limit if not first else _rows_gathered(costs, first, limits[first - 1], limit, each)
            )
            if not rows:
                continue
            visit = _visit_s(
                compute[rows][last] - compute[rows][first], load[last] - load[first], machine
            )
            total = best[first] + visit / rows
            if total < best[last] - 1e-12:
                best[last], chosen[last] = total, (first, rows)
    stages: list[Stage] = []
    last = count
    while last:
        first, rows = chosen[last]
        stages.append(Stage(first, last, rows))
        last = first
    return tuple(reversed(stages))


def _one_stage(costs: ModelCosts, each: int) -> tuple[Stage, ...]:
    count = len(costs.slices)
    return (Stage(0, count, min(_rows_within(costs, n, each) for n in range(count))),)


def _rows_gathered(costs: ModelCosts, cut: int, before: int, limit: int, size: int) -> int:
    """The largest batch up to a limit whose rows may wait at a cut in so many bytes; 0 if none."""
    fitting = [
        rows
        for rows in ROWS
        if rows <= limit and costs.cut_bytes[cut] * (2 * rows + before - 1) <= size
    ]
    return max(fitting, default=0)


def _visit_s(compute_s: float, load_s: float, machine: Machine) -> float:
    """Seconds of the server for one visit: of its lanes, or of its cores if these are short."""
    entry = machine.entry_s
    return max(
        (max(compute_s, load_s) + entry) / machine.lanes, (compute_s + load_s) / machine.cores
    )


def _request_s(
    costs: ModelCosts, stages: Sequence[Stage], pinned: frozenset[int], machine: Machine
) -> float:
    total = 0.0
    for stage in stages:
        streamed = sum(
            costs.slices[n].weight_bytes for n in range(stage.first, stage.last) if n not in pinned
        )
        compute_s = costs.compute_at(stage.first, stage.last, stage.rows)
        total += _visit_s(compute_s, streamed / machine.load_rate, machine) / stage.rows
    return total


def waiting_rows(before: Stage, after: Stage) -> int:
    """Rows that may be at the cut between two stages at once.

    One batch of the next stage runs, or is about to, another gathers, and a batch of the stage
    before arrives.
    """
    return 2 * after.rows + before.rows - 1


def _waiting(costs: ModelCosts, stages: Sequence[Stage]) -> int:
    return sum(
        costs.cut_bytes[after.first] * waiting_rows(before, after)
        for before, after in pairwise(stages)
    )


def _rows_within(costs: ModelCosts, number: int, size: int) -> int:
    fitting = [
        rows
        for rows in ROWS
        if rows <= costs.max_rows and costs.bytes_at(number, number + 1, rows) <= size
    ]
    return max(fitting, default=1)


def _all(costs: ModelCosts) -> range:
    return range(len(costs.slices))


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
