"""How an enclave's memory is divided among models: what to pin, and how large batches may be.

Early layers have large activations and small weights, late layers the reverse. So a model is
divided into **stages** (``policy.stages``), runs of slices with one batch size each: small batches
early, where a row takes much memory, large ones late, where a load of weights should serve many
rows. Requests wait at the cut between two stages until enough of them are there for a large batch.

Memory goes to: weights that stay (pinned), a ring for the others, the activations and workspace of
what runs, and the activations of what waits. More for what runs means larger batches and fewer
pins. Several divisions are tried, and the one with the least predicted time is taken. A model that
fits whole beside the others is run whole, which saves the calls, or frozen, if its sessions may
even hold copies of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.costs import SLICED, Forms, ModelCosts
from lasagna.policy.pins import choose_pinned
from lasagna.policy.plan import MemoryPlan, Style, mean_s, shares
from lasagna.policy.stages import (
    Machine,
    Stage,
    waiting_rows,
)
from lasagna.policy.staging import Staging, Stagings
from lasagna.units import format_bytes, whole_pages

RING_SLOTS: Final = 3
"""One slot in use, one ready, one being filled. Beside pinned slices more do not pay: look-ahead
costs pins."""
STREAMING_SLOTS: Final = 8
"""When everything is streamed, look-ahead carries the loader over layers with many weights and
little to compute (docs/experiments/0002-streaming.md)."""
SHARED_ARENA_MARGIN: Final = 1.5
"""Room for fragmentation when several compute threads allocate from one workspace arena."""
FRAME_BYTES: Final = 1024
"""More than a row takes in a message to the enclave beside its tensors: records, capsule, names."""
GRID: Final = 1.5
"""Step between the amounts of memory for a running batch that are tried."""
GRID_FROM: Final = 32 * 1024
PRICED_ROWS: Final = (4, 16, 64)
"""What memory at a cut is worth: as much as a pin that so many rows share each visit of."""
LEAST_SHARE: Final = 1e-6
"""Of the load, for a price: the demand of an idle hour is next to nothing, and may be nothing."""
Stages: TypeAlias = Mapping[str, tuple[Stage, ...]]
"""Of each model, in order."""


@dataclass(slots=True)
class _Search:
    """One call of ``divide``."""

    machine: Machine
    weights: Mapping[str, float]
    style: Style
    known: Stagings = field(default_factory=Stagings)

    def best(self, models: Mapping[str, ModelCosts]) -> MemoryPlan | None:
        """The best division with each model in this form."""
        best: MemoryPlan | None = None
        best_s = float("inf")
        most = max(1, self.machine.budget // self.machine.lanes)
        each = 0  # batches of one row, then more
        while each < most * GRID:
            for stages in self._ways(models, int(each)):
                if self._least_s(models, stages) >= best_s:
                    continue
                for apart in (True, False) if self.machine.spare_cores else (False,):
                    plan = self._divide(models, stages, apart=apart)
                    if plan is not None:
                        seconds = self.seconds(plan)
                        if seconds < best_s - 1e-12:
                            best, best_s = plan, seconds
                        break
            each = max(GRID_FROM, int(each * GRID))
        return best

    def _least_s(self, models: Mapping[str, ModelCosts], stages: Stages) -> float:
        """Of a mean request, if all weights were there."""
        return sum(
            self.weights[name] * self._staging(costs).request_s(stages[name], None)
            for name, costs in models.items()
        )

    def _ways(self, models: Mapping[str, ModelCosts], each: int) -> Iterator[Stages]:
        """Divisions into stages for running batches of so many bytes, each once."""
        seen = []
        total = sum(self.weights[name] for name in models) or 1.0
        rate = self.machine.load_rate
        for rows in (0, *PRICED_ROWS) if self.style.staged else ():
            made = {}
            for name, costs in models.items():
                share = max(self.weights[name] / total, LEAST_SHARE)
                price = 1.0 / (share * rate * rows) if rows else None
                made[name] = self._staging(costs).within(each, price)
            if made not in seen:
                seen.append(made)
                yield made
        yield {name: self._staging(costs).one(each) for name, costs in models.items()}

    def seconds(self, plan: MemoryPlan) -> float:
        """Of a mean request."""
        return sum(self.weights[name] * seconds for name, seconds in plan.request_s.items())

    def _divide(
        self, models: Mapping[str, ModelCosts], stages: Stages, *, apart: bool
    ) -> MemoryPlan | None:
        """The plan with these stages, if the rest fits beside them."""
        machine = self.machine
        running = [
            self._staging(costs).bytes_of(one)
            for name, costs in models.items()
            for one in stages[name]
        ]
        activations = max(size for size, _ in running)
        workspace = max(size for _, size in running) * machine.lanes
        if machine.lanes > 1:
            workspace = int(workspace * SHARED_ARENA_MARGIN)
        workspace += sum(costs.copies_bytes for costs in models.values())
        inputs = max(models[name].cut_bytes[0] * stages[name][0].rows for name in models)
        frames = max(
            (models[name].cut_bytes[0] + FRAME_BYTES) * stages[name][0].rows for name in models
        )
        waiting = sum(_waiting(models[name], stages[name], machine.lanes) for name in models)
        largest = max(one.weight_bytes for costs in models.values() for one in costs.slices)
        plan = MemoryPlan(
            costs=models,
            stages=stages,
            pinned={},
            slots=0,
            slot_bytes=0,
            input_slots=machine.most_runs if apart else 0,
            input_bytes=whole_pages(inputs) if apart else 0,
            lanes=machine.lanes,
            width=machine.width,
            cores=machine.cores,
            activation_bytes=whole_pages(activations),
            workspace_bytes=whole_pages(workspace),
            staging_bytes=(machine.lanes + 1) * whole_pages(min(largest, machine.chunk_bytes) + 64),
            frame_slots=1 if apart else machine.lanes,  # what runs has opened its rows
            frame_bytes=whole_pages(frames),
            waiting_bytes=waiting,
            pinned_bytes=0,
            request_s={},
        )
        room = machine.budget - plan.total_bytes
        return self._with_weights(plan, room) if room >= 0 else None

    def _staging(self, costs: ModelCosts) -> Staging:
        return self.known.of(costs, self.machine, self.style.max_rows)

    def _with_weights(self, plan: MemoryPlan, room: int) -> MemoryPlan | None:
        """Spend what is left on pins and a ring, or say that it is too little."""
        pinned = self._pin(plan, room)
        if pinned is None:
            return None
        kept, slots, slot = pinned
        return self.pinning(replace(plan, slots=slots, slot_bytes=slot), kept)

    def pinning(self, plan: MemoryPlan, kept: Mapping[str, frozenset[int]]) -> MemoryPlan:
        """The plan with these pins, and what it then promises."""
        return replace(
            plan,
            pinned=kept,
            pinned_bytes=sum(
                whole_pages(plan.costs[name].slices[n].weight_bytes)
                for name in kept
                for n in kept[name]
            ),
            request_s={
                name: self._staging(costs).request_s(
                    plan.stages[name], kept[name], overlapped=plan.slots != 1
                )
                for name, costs in plan.costs.items()
            },
        )

    def _pin(
        self, plan: MemoryPlan, room: int
    ) -> tuple[dict[str, frozenset[int]], int, int] | None:
        """What to pin beside a ring for the others; the ring's slots, and their size."""
        sizes = {
            name: [whole_pages(one.weight_bytes) for one in costs.slices]
            for name, costs in plan.costs.items()
        }
        everything = {name: frozenset(range(len(found))) for name, found in sizes.items()}
        if self.style.pin and sum(map(sum, sizes.values())) <= room:
            return everything, 0, 0
        kept: dict[str, frozenset[int]] = {name: frozenset() for name in sizes}
        for name, costs in plan.costs.items():
            if costs.form != SLICED:
                kept[name] = everything[name]
                room -= sum(sizes[name])
        streamed = [size for name in sizes if not kept[name] for size in sizes[name]]
        if not streamed:
            return (kept, 0, 0) if room >= 0 else None
        slot = max(streamed)
        if room < slot:
            return None
        slots = _slots(room, slot, len(streamed), pin=self.style.pin)
        if self.style.pin:
            self.spend(plan, sizes, kept, room - slots * slot, slots * slot)
        slot = max(
            size for name in sizes for n, size in enumerate(sizes[name]) if n not in kept[name]
        )
        return kept, slots, slot

    def spend(
        self,
        plan: MemoryPlan,
        sizes: Mapping[str, Sequence[int]],
        kept: dict[str, frozenset[int]],
        room: int,
        ring: int,
    ) -> None:
        """Pin where a byte saves its decryption most often: at every visit of its stage."""
        groups = sorted(
            (
                (-self.weights[name] / stage.rows, name, stage.first, stage)
                for name, costs in plan.costs.items()
                if costs.form == SLICED
                for stage in plan.stages[name]
            ),
            key=lambda group: group[:3],
        )
        for _, name, first, stage in groups:
            numbers = [n for n in range(first, stage.last) if n not in kept[name]]
            own = [sizes[name][n] for n in numbers]
            times = [plan.costs[name].slices[n].compute_at(stage.rows) for n in numbers]
            chosen = choose_pinned(own, times, room, ring) if room > 0 else frozenset()
            kept[name] |= {numbers[index] for index in chosen}
            room -= sum(own[index] for index in chosen)


def divide_best(
    models: Mapping[str, Forms],
    demand: Mapping[str, float],
    machines: Iterable[Machine],
    style: Style,
    known: Stagings | None = None,
) -> MemoryPlan:
    """``divide`` for the machine of these on which a mean request takes the least time.

    Raises:
        BudgetError: there is no division for any of them.
    """
    best: MemoryPlan | None = None
    shortage: BudgetError | None = None
    for machine in machines:
        try:
            plan = divide(models, demand, machine, style, known)
        except BudgetError as error:
            shortage = error
            continue
        if best is None or mean_s(plan, demand) < mean_s(best, demand):
            best = plan
    if best is None:
        assert shortage is not None, "no machine"
        raise shortage
    return best


def divide(
    models: Mapping[str, Forms],
    demand: Mapping[str, float],
    machine: Machine,
    style: Style | None = None,
    known: Stagings | None = None,
) -> MemoryPlan:
    """Divide the memory for the least time a mean request.

    Args:
        models: to serve, by name; at least one.
        demand: share of each in the load. Only ratios count; a model without one gets next to none.
        machine: what there is.
        style: what it may make use of.
        known: stagings to share with other divisions of the same models.

    Raises:
        BudgetError: not even batches of one row with nothing pinned fit.
    """
    style = style or Style()
    search = _Search(machine, shares(models, demand), style, known or Stagings())
    weights = search.weights
    chosen = {name: forms[0] for name, forms in models.items()}
    best = search.best(chosen)
    if best is None:
        raise BudgetError(_shortage(search, chosen))
    if style.whole:
        for name in sorted(models, key=lambda name: (-weights[name], name)):
            for form in reversed(models[name][1:]):
                plan = search.best(chosen | {name: form})
                if plan is not None and search.seconds(plan) < search.seconds(best):
                    best, chosen[name] = plan, form
                    break
    return best


def require_fits(models: Mapping[str, Forms], machine: Machine, style: Style | None = None) -> None:
    """Check that there is a division at all, which is quick.

    Raises:
        BudgetError: not even batches of one row with nothing pinned fit.
    """
    chosen = {name: forms[0] for name, forms in models.items()}
    style = replace(style or Style(), pin=False)  # what fits pinned fits streamed, too
    search = _Search(machine, dict.fromkeys(models, 1.0), style)
    if search._divide(chosen, _leanest(chosen), apart=False) is None:
        raise BudgetError(_shortage(search, chosen))


def repin(plan: MemoryPlan, demand: Mapping[str, float], machine: Machine) -> MemoryPlan:
    """The same division with other slices pinned, as suits the demand."""
    if not plan.slots:
        return plan
    weights = shares(plan.costs, demand)
    sizes = {
        name: [whole_pages(one.weight_bytes) for one in costs.slices]
        for name, costs in plan.costs.items()
    }
    kept = {
        name: frozenset(
            n
            for n, size in enumerate(sizes[name])
            if costs.form != SLICED or size > plan.slot_bytes  # can't pass through the ring
        )
        for name, costs in plan.costs.items()
    }
    fixed = sum(sizes[name][n] for name in kept for n in kept[name])
    room = machine.budget - (plan.total_bytes - plan.pinned_bytes) - fixed
    search = _Search(machine, weights, Style())
    search.spend(plan, sizes, kept, room, plan.ring_bytes)
    return search.pinning(plan, kept)


def _slots(room: int, slot: int, streamed: int, *, pin: bool) -> int:
    """The ring gets a third of the room at most: with little of it, pins do more than a slot."""
    slot = max(slot, 1)
    most = max(1, room // 3 // slot) if pin else room // slot
    slots = min(RING_SLOTS if pin else STREAMING_SLOTS, most, streamed)
    return 2 if slots == 1 and room >= 2 * slot and streamed > 1 else slots


def _leanest(models: Mapping[str, ModelCosts]) -> Stages:
    """One stage each, of batches of one row: what takes the least memory."""
    return {name: (Stage(0, len(costs.slices), 1),) for name, costs in models.items()}


def _waiting(costs: ModelCosts, stages: Sequence[Stage], lanes: int) -> int:
    return sum(
        whole_pages(costs.cut_bytes[after.first] * waiting_rows(before, after, lanes))
        for before, after in pairwise(stages)
    )


def _shortage(search: _Search, models: Mapping[str, ModelCosts]) -> str:
    machine = search.machine
    roomy = replace(machine, budget=1 << 60)
    streamed = _Search(roomy, search.weights, replace(search.style, pin=False))
    plan = streamed._divide(models, _leanest(models), apart=False)
    assert plan is not None
    need = whole_pages(plan.total_bytes - plan.ring_bytes + plan.slot_bytes)
    every = [(name, n) for name, costs in models.items() for n in range(len(costs.slices))]
    name, number = max(every, key=lambda one: models[one[0]].bytes_at(one[1], one[1] + 1, 1))
    row = models[name].bytes_at(number, number + 1, 1)
    heavy, slice_ = max(every, key=lambda one: models[one[0]].slices[one[1]].weight_bytes)
    slot = models[heavy].slices[slice_].weight_bytes
    each = f" on each of {machine.lanes} threads" if machine.lanes > 1 else ""
    return (
        f"{', '.join(map(repr, models))} needs a budget of {-(-need // 10_000) / 100:.2f} MB or "
        f"more, it has {format_bytes(machine.budget)}. One row takes {format_bytes(row)}{each} in "
        f"slice {number} of {name!r}, and the weights of slice {slice_} of {heavy!r} take "
        f"{format_bytes(slot)}. To need less, seal with smaller --slice-bytes or --memory-bytes"
    )
