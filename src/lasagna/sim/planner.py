"""Divisions of enclave memory, each worked out once for all servers that ask for the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Final, TypeAlias

from lasagna.policy.costs import Forms
from lasagna.policy.events import Plan, Planned
from lasagna.policy.memory import divide_best, repin
from lasagna.policy.plan import MemoryPlan, Style
from lasagna.policy.stages import Machine
from lasagna.policy.staging import Stagings

GRAIN: Final = 0.1
"""Shares of demand are rounded to multiples of this, which is also by how much a mix must have
shifted for a scheduler to look for another plan (``policy.arranging.SHIFT``). Working one out for
four models takes about half a second, so simulations depend on few different ones."""

_Key: TypeAlias = tuple[
    tuple[tuple[str, Forms], ...], tuple[float, ...], tuple[Machine, ...], Style
]


class Planner:
    """Works out Plan commands.

    Attributes:
        worked_out: divisions that were; the other answers were known.
    """

    def __init__(self, grain: float = GRAIN) -> None:
        """Nothing is known.

        Args:
            grain: to multiples of which shares are rounded.
        """
        self._grain = grain
        self._known: dict[_Key, MemoryPlan] = {}
        self._stagings = Stagings()
        self._kept: dict[tuple[object, ...], MemoryPlan] = {}
        self.worked_out = 0

    def plan(self, command: Plan, at_s: float) -> Planned:
        """What a host would answer, but for demand that is rounded.

        Args:
            command: of a scheduler.
            at_s: when it is told.

        Raises:
            BudgetError: the models don't fit.
        """
        demand = self._rounded(command.demand)
        key = (
            tuple(command.models.items()),
            tuple(demand.values()),
            command.machines,
            command.style,
        )
        best = self._known.get(key)
        if best is None:
            best = divide_best(
                command.models, demand, command.machines, command.style, self._stagings
            )
            self._known[key] = best
            self.worked_out += 1
        present = command.present
        if present is None:
            return Planned(at_s, best, None)
        there = (*key, *_values(present))
        kept = self._kept.get(there)
        if kept is None:
            kept = self._kept[there] = repin(present, demand, command.machines[0])
        return Planned(at_s, best, kept)

    def _rounded(self, demand: Mapping[str, float]) -> dict[str, float]:
        total, grain = sum(demand.values()), self._grain
        return {name: grain * round(share / total / grain) for name, share in demand.items()}


def _values(plan: MemoryPlan) -> Iterator[object]:
    """All that a plan says, to be hashed."""
    for one in fields(plan):
        value = getattr(plan, one.name)
        yield tuple(value.items()) if isinstance(value, Mapping) else value
