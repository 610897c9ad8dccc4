"""What a scheduler remembers: requests, models, and the rows at every cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lasagna.policy.costs import Correction, ModelCosts
from lasagna.policy.events import Arrived, Rows
from lasagna.policy.fair import FairQueue
from lasagna.policy.plan import MemoryPlan, Style
from lasagna.policy.stages import Stage, waiting_rows

NEVER: Final = float("inf")
"""A time that does not come."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator chooses.

    Attributes:
        queue_rows: that may wait outside the enclave; more are refused.
        patience_s: who has waited so long outside goes before all priorities and shares.
        weights: of tenants; those that are not named have 1.
        style: what the division of the memory may make use of.
        in_order: who came first is served first, whatever that costs.
    """

    queue_rows: int = 256
    patience_s: float = 10.0
    weights: Mapping[str, float] = field(default_factory=dict)
    style: Style = field(default_factory=Style)
    in_order: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """A request that somebody waits for.

    Attributes:
        facts: how it came in.
        left: rows that have not reached the model's end.
        inside: rows that are in the enclave.
        deaths: enclaves that died while it was in a run.
        alone: it runs in batches of its own, since one that it was in came to nothing.
    """

    facts: Arrived
    left: int
    inside: int = 0
    deaths: int = 0
    alone: bool = False

    @property
    def deadline_s(self) -> float:
        """When its answer is worth nothing any more."""
        return NEVER if self.facts.deadline_s is None else self.facts.deadline_s


@dataclass(slots=True, eq=False)
class StageState:
    """A stage, and the rows that wait at the cut before it.

    Attributes:
        plan: its slices and largest batch.
        load_s: profile's seconds of decrypting what is not pinned of it.
        capacity: rows that there is memory for at the cut before it.
        held: rows that take memory there: on their way to it, waiting at it, or in a run from it.
        waiting: rows at the cut, first come first.
        waiting_rows: how many they are.
        profile_s: seconds of computing by rows.
        correction: of those; by_rows: of batches of one size, where some have been measured.
    """

    plan: Stage
    load_s: float
    capacity: int
    held: int = 0
    waiting: deque[Rows] = field(default_factory=deque)
    waiting_rows: int = 0
    profile_s: dict[int, float] = field(default_factory=dict)
    correction: Correction = field(default_factory=Correction)
    by_rows: dict[int, Correction] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ModelState:
    """A model that is served, and its requests outside the enclave.

    ``costs`` are those of the form in which it runs. There are no stages before there is a plan.
    """

    name: str
    costs: ModelCosts
    outside: FairQueue
    stages: list[StageState] = field(default_factory=list)

    def divide(self, plan: MemoryPlan | None, load_rate: float) -> None:
        """Take the stages of a plan; only rows that wait to begin anew are carried over."""
        first = self.stages[0] if self.stages else None
        self.stages = []
        if plan is None or self.name not in plan.costs:
            return
        self.costs = plan.costs[self.name]
        before: Stage | None = None
        for one in plan.stages[self.name]:
            room = waiting_rows(before, one, plan.lanes) if before else 0
            self.stages.append(StageState(one, 0.0, room))
            before = one
        if first is not None:
            begins = self.stages[0]
            begins.waiting = first.waiting
            begins.waiting_rows = begins.held = first.waiting_rows
        self.weigh(plan, load_rate)

    def weigh(self, plan: MemoryPlan | None, load_rate: float) -> None:
        """What each stage has to load, after pins have moved."""
        assert plan is not None
        pinned = plan.pinned[self.name]
        for stage in self.stages:
            streamed = sum(
                self.costs.slices[n].weight_bytes
                for n in range(stage.plan.first, stage.plan.last)
                if n not in pinned
            )
            stage.load_s = streamed / load_rate
