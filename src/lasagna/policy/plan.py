"""A division of an enclave's memory among its models, as data. ``policy.memory`` works it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from lasagna.errors import UsageError
from lasagna.policy.costs import ModelCosts
from lasagna.policy.stages import Machine, Stage


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A division of the memory. Sizes in bytes; they add up to no more than the budget.

    Attributes:
        costs: of each model, in the form in which it is run.
        stages: of each model, in order.
        pinned: slices of each model whose weights stay.
        slots: of the ring, each of slot_bytes; 0 when everything is pinned.
        input_slots: for opened inputs of runs that wait, each of input_bytes; 0 to open them when
            the run begins.
        lanes: batches that are computed at once, each by so many threads as width says.
        cores: processors for computing and loading.
        activation_bytes: of the batch that runs on one of them.
        workspace_bytes: of kernels, for all threads, and of copies of weights in sessions.
        staging_bytes: of weights' ciphertext on its way.
        frame_slots: for requests' ciphertext on its way, each of frame_bytes.
        waiting_bytes: activations of requests between two stages.
        pinned_bytes: weights that stay.
        request_s: predicted seconds of the server for a request of each model, when it is busy.
    """

    costs: Mapping[str, ModelCosts]
    stages: Mapping[str, tuple[Stage, ...]]
    pinned: Mapping[str, frozenset[int]]
    slots: int
    slot_bytes: int
    input_slots: int
    input_bytes: int
    lanes: int
    width: int
    cores: int
    activation_bytes: int
    workspace_bytes: int
    staging_bytes: int
    frame_slots: int
    frame_bytes: int
    waiting_bytes: int
    pinned_bytes: int
    request_s: Mapping[str, float]

    @property
    def ring_bytes(self) -> int:
        """Of all slots."""
        return self.slots * self.slot_bytes

    @property
    def running_bytes(self) -> int:
        """For what runs or is about to: activations, workspace, inputs."""
        inputs = self.input_slots * self.input_bytes
        return self.lanes * self.activation_bytes + self.workspace_bytes + inputs

    @property
    def total_bytes(self) -> int:
        """Of the whole plan."""
        held = self.ring_bytes + self.pinned_bytes + self.waiting_bytes + self.staging_bytes
        held += self.frame_slots * self.frame_bytes
        return held + self.running_bytes


Objective = Literal["throughput", "latency"]
"""What counts most: the most answers a second, or the least time of a request."""
OBJECTIVES: Final[tuple[Objective, ...]] = ("throughput", "latency")


def objective_named(text: str) -> Objective:
    """An objective by its name.

    Raises:
        UsageError: there is none of that name.
    """
    for objective in OBJECTIVES:
        if text == objective:
            return objective
    raise UsageError(f"an objective is one of {', '.join(OBJECTIVES)}, not {text!r}")


@dataclass(frozen=True, slots=True)
class Style:
    """What a division may make use of; the default is everything.

    Attributes:
        staged: divide models into stages with batches of their own.
        max_rows: of a batch.
        pin: keep weights where there is room; otherwise stream all of them.
        whole: run models whole where they fit.
        together: let all threads compute one batch where that is better.
        apart: let threads have a batch each where that is better, which is no good for lone
            requests.
    """

    staged: bool = True
    max_rows: int = 32
    pin: bool = True
    whole: bool = True
    together: bool = True
    apart: bool = True

    def shapes(self, machine: Machine) -> tuple[Machine, ...]:
        """In which a machine's threads may share the work, the given one first."""
        every = machine.shapes()
        if not self.apart:
            return every[-1:]
        return every if self.together else every[:1]


def style_for(objective: Objective, style: Style | None = None) -> Style:
    """A style for an objective: for latency, lone requests get all threads.

    Args:
        objective: what counts most.
        style: what else a division may make use of; everything by default.
    """
    return replace(style or Style(), apart=objective != "latency")


def mean_s(plan: MemoryPlan, demand: Mapping[str, float]) -> float:
    """Predicted seconds of the server for a mean request."""
    weights = shares(plan.costs, demand)
    total = sum(weights.values())
    return sum(weights[name] * seconds for name, seconds in plan.request_s.items()) / total


def shares(models: Iterable[str], demand: Mapping[str, float]) -> dict[str, float]:
    """Demand for each model; one without any has a thousandth of the least."""
    least = min((share for share in demand.values() if share > 0), default=1.0)
    return {name: demand.get(name, 0.0) or least / 1000 for name in models}
