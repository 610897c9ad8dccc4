"""Dividing a model into stages, so that a row takes the least time within so much memory.

And what a request then takes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate

from lasagna.policy.costs import ModelCosts
from lasagna.policy.stages import (
    ROWS,
    SLICE_S,
    Machine,
    Stage,
    copy_s,
    exposed_s,
    sealing_s,
    visit_s,
)


class Staging:
    """One model on one machine: what does not depend on the memory is worked out once."""

    def __init__(self, costs: ModelCosts, machine: Machine, max_rows: int) -> None:
        """Sums over the slices are taken when they are asked for.

        Args:
            costs: of the model.
            machine: that it runs on.
            max_rows: of a batch; the model's own limit holds as well.
        """
        self._costs, self._machine = costs, machine
        self._rows = [rows for rows in ROWS if rows <= min(costs.max_rows, max_rows)] or [1]
        self._visits: dict[tuple[int, int, int], float] = {}
        self._computing: dict[Stage, float] = {}
        self._bytes: dict[Stage, tuple[int, int]] = {}
        self._limits_at: dict[int, tuple[int, ...]] = {}
        self._within: dict[tuple[int, float | None, tuple[int, ...]], tuple[Stage, ...]] = {}

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Bytes of a batch of each size in each slice; no batch takes less than a smaller one."""
        costs = self._costs
        return [
            list(accumulate((costs.bytes_at(n, n + 1, rows) for rows in self._rows), max))
            for n in range(len(costs.slices))
        ]

    @cached_property
    def _compute(self) -> dict[int, list[float]]:
        return {
            rows: _sums(one.compute_at(rows) for one in self._costs.slices) for rows in self._rows
        }

    @cached_property
    def _load(self) -> list[float]:
        return _sums(one.weight_bytes / self._machine.load_rate for one in self._costs.slices)

    @cached_property
    def _exposed(self) -> dict[int, list[float]]:
        costs, none = self._costs, frozenset[int]()
        return {
            rows: _sums(
                exposed_s(costs, n, n + 1, rows, none, self._machine)
                for n in range(len(costs.slices))
            )
            for rows in self._rows
        }

    def one(self, each: int) -> tuple[Stage, ...]:
        """The whole model as one stage, with the largest batch that ``each`` bytes hold."""
        rows = self._rows[min(self._limits(each))]
        return (Stage(0, len(self._costs.slices), rows),)

    def within(self, each: int, price: float | None = None) -> tuple[Stage, ...]:
        """Stages of the least time a row, when all weights are streamed.

        A dynamic program over the cuts: a stage costs its visit divided by the rows that all of
        its slices can take.

        Args:
            each: bytes for a running batch.
            price: seconds a row that a byte at a cut is worth, because it could hold weights
                instead. Without one, what waits at a cut may take as much as runs, and no more.
        """
        limits = self._limits(each)
        room = self._machine.lanes * each if price is None else self._machine.budget
        key = room, price, limits
        found = self._within.get(key)
        if found is None:
            found = self._within[key] = self._least(limits, room, price)
        return found

    def _least(self, limits: Sequence[int], room: int, price: float | None) -> tuple[Stage, ...]:
        lanes, sizes = self._machine.lanes, self._rows
        count = len(self._costs.slices)
        cut_bytes = [0, *self._costs.cut_bytes[1:]]
        best = [0.0] + [float("inf")] * count
        chosen = [(0, 0)] * (count + 1)
        for last in range(1, count + 1):
            limit = limits[last - 1]
            for first in range(last - 1, -1, -1):
                if limits[first] < limit:
                    limit = limits[first]
                so_far, at = best[first], limit
                before = sizes[limits[first - 1] if price is None else chosen[first][1]]
                crossing = cut_bytes[first] * lanes
                while at > 0 and crossing * (2 * sizes[at] + before) > room:
                    at -= 1
                if crossing * (2 * sizes[at] + before) > room:
                    continue
                held = (price or 0.0) * crossing
                total = so_far + self._row_s(first, last, at) + held * (2 * sizes[at] + before)
                while at > 0 and held:  # smaller batches, as long as what they save is worth it
                    rows = sizes[at - 1]
                    less = so_far + self._row_s(first, last, at - 1) + held * (2 * rows + before)
                    if less >= total:
                        break
                    total, at = less, at - 1
                if total < best[last] - 1e-12:
                    best[last], chosen[last] = total, (first, at)
        stages: list[Stage] = []
        last = count
        while last:
            first, at = chosen[last]
            stages.append(Stage(first, last, sizes[at]))
            last = first
        return tuple(reversed(stages))

    def request_s(
        self, stages: Sequence[Stage], pinned: frozenset[int] | None, *, overlapped: bool = True
    ) -> float:
        """Seconds of the server for a request, when it is busy and batches are full.

        Args:
            stages: of the model.
            pinned: slices that are not loaded; None if all are pinned.
            overlapped: False where the ring has a single slot: then loading does not overlap
                computing.
        """
        costs, machine, total = self._costs, self._machine, 0.0
        for stage in stages:
            streamed, bare_s = 0, 0.0
            if pinned is not None:
                first, last, rows = stage.first, stage.last, stage.rows
                left = (n for n in range(first, last) if n not in pinned)
                streamed = sum(costs.slices[n].weight_bytes for n in left)
                bare_s = exposed_s(costs, first, last, rows, pinned, machine)
            load_s = streamed / machine.load_rate
            compute_s = self._computing_s(stage)
            visit = visit_s(compute_s, load_s, bare_s if overlapped else load_s, machine)
            total += visit / stage.rows
        return total

    def bytes_of(self, stage: Stage) -> tuple[int, int]:
        """Bytes of a batch's activations, and of its kernels' workspace."""
        found = self._bytes.get(stage)
        if found is None:
            first, last, rows = stage.first, stage.last, stage.rows
            found = (
                self._costs.activations_at(first, last, rows),
                self._costs.workspace_at(first, last, rows),
            )
            self._bytes[stage] = found
        return found

    def _computing_s(self, stage: Stage) -> float:
        """Seconds of a batch on one lane, with all that is done beside loading."""
        found = self._computing.get(stage)
        if found is None:
            costs, machine = self._costs, self._machine
            first, last, rows = stage.first, stage.last, stage.rows
            found = machine.batch_s(
                costs.compute_at(first, last, rows), costs.compute_at(first, last, 1)
            )
            found += copy_s(costs, first, rows)
            found += SLICE_S * (last - first)
            found += sealing_s(costs, first, last, rows)
            self._computing[stage] = found
        return found

    def _limits(self, each: int) -> tuple[int, ...]:
        """Which of the batch sizes is the largest that fits, for each slice; the least if none."""
        found = self._limits_at.get(each)
        if found is None:
            found = tuple(max(0, bisect_right(sizes, each) - 1) for sizes in self._sizes)
            self._limits_at[each] = found
        return found

    def _row_s(self, first: int, last: int, at: int) -> float:
        """Seconds a row of a stage with that batch size."""
        key = (first, last, at)
        found = self._visits.get(key)
        if found is None:
            rows, machine = self._rows[at], self._machine
            compute, single, exposed = self._compute[rows], self._compute[1], self._exposed[rows]
            compute_s = machine.batch_s(
                compute[last] - compute[first], single[last] - single[first]
            )
            compute_s += copy_s(self._costs, first, rows) + SLICE_S * (last - first)
            load_s = self._load[last] - self._load[first]
            bare_s = exposed[last] - exposed[first]
            found = self._visits[key] = visit_s(compute_s, load_s, bare_s, machine) / rows
        return found


class Stagings:
    """Stagings of models on machines, each made once.

    Divisions for other demand share much of their work.
    """

    def __init__(self) -> None:
        """None is made."""
        self._known: dict[tuple[int, Machine, int], tuple[ModelCosts, Staging]] = {}

    def of(self, costs: ModelCosts, machine: Machine, max_rows: int) -> Staging:
        """Of this very object of costs, which is kept, so that no other has its id."""
        key = id(costs), machine, max_rows
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = costs, Staging(costs, machine, max_rows)
        return found[1]


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
