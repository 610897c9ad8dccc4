"""What a machine takes beside what its models' profiles say: measured factors, noise, paging."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from lasagna.policy.costs import ModelCosts
from lasagna.policy.paging import Paging
from lasagna.policy.stages import Machine
from lasagna.units import PAGE

_BLOCK: Final = 4096
MOST_BESIDE: Final = 8
"""Runs under way that are told apart."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured over profile, as a recorded real run shows it; the default is the profile.

    Attributes:
        compute: factor of all computing times.
        of_models: beside it, by model.
        of_batches: instead of both, by model, first slice of the run, rows, how many other runs
            were under way when it began, and whether one of them is in step with it: they share
            caches, memory's bandwidth, and what is loaded.
        load: factor of times to decrypt weights; seal: to open and seal rows.
        entry_s: what a run takes beside computing, loading and sealing, a call into the enclave
            first of all; None for the machine's.
        rests_s: instead, as of_batches but for steps, and with 0 rows for all batches: who helps
            with loads, who is in the way. Below 0 where loads hide that are not thought to.
        arrange_s: of an arrangement, beside loading what is pinned.
        plan_s: of working out a plan, while requests go on.
    """

    compute: float = 1.0
    of_models: Mapping[str, float] = field(default_factory=dict)
    of_batches: Mapping[tuple[str, int, int, int, bool], float] = field(default_factory=dict)
    load: float = 1.0
    seal: float = 1.0
    entry_s: float | None = None
    rests_s: Mapping[tuple[str, int, int, int], float] = field(default_factory=dict)
    arrange_s: float = 0.0
    plan_s: float = 0.0

    def compute_factor(
        self, model: str, first: int, rows: int, beside: int = 0, *, in_step: bool = False
    ) -> float:
        """Of a run that begins at this slice with so many rows, beside so many other runs."""
        for step in (in_step, not in_step):
            for near in _near(beside):
                found = self.of_batches.get((model, first, rows, near, step))
                if found is not None:
                    return found
        return self.compute * self.of_models.get(model, 1.0)

    def rest_s(self, model: str, first: int, rows: int, beside: int, machine: Machine) -> float:
        """Seconds of such a run, beside computing, loading and sealing."""
        for known in (rows, 0):
            for near in _near(beside):
                found = self.rests_s.get((model, first, known, near))
                if found is not None:
                    return found
        return machine.entry_s if self.entry_s is None else self.entry_s


def _near(beside: int) -> tuple[int, ...]:
    """Numbers of runs, the nearest first; fewer before more."""
    return (beside, *range(beside - 1, -1, -1), *range(beside + 1, MOST_BESIDE))


def noise(rng: np.random.Generator, sigma: float) -> Iterator[float]:
    """Factors of mean 1 without end, lognormal with this standard deviation of the logarithm."""
    while True:
        yield from rng.lognormal(-sigma * sigma / 2, sigma, _BLOCK).tolist()


def drawn(rng: np.random.Generator, factors: Sequence[float]) -> Iterator[float]:
    """Of these factors one after the other, each as likely, without end."""
    while True:
        yield from rng.choice(factors, _BLOCK).tolist()


class Resident:
    """Which models' working sets are in the EPC, when the least recently used pages are evicted.

    A pass touches all pages of its working set in the same order. If that is more than the EPC
    holds, each page is evicted before it is touched again: a cyclic scan defeats LRU and clock
    algorithms alike (measured: docs/experiments/0005-local-scheduler.md). If it fits, it stays
    until the passes of other models need the room.
    """

    def __init__(self, paging: Paging) -> None:
        """Nothing is resident."""
        self._room = paging.room_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def pass_pages(self, model: str, costs: ModelCosts) -> tuple[int, float]:
        """Pages that a pass of one row through the whole model has to load.

        Returns:
            How many, and the share of the pass after which the first ones are evicted again.
        """
        count = len(costs.slices)
        size = costs.weight_bytes + costs.copies_bytes + costs.bytes_at(0, count, 1)
        if size > self._room:
            self._sizes.clear()
            return -(-size // PAGE), max(0.0, self._room / size)
        if model in self._sizes:
            self._sizes.move_to_end(model)
            return 0, 1.0
        self._sizes[model] = size
        while sum(self._sizes.values()) > self._room:
            self._sizes.popitem(last=False)
        return -(-size // PAGE), 1.0

    def clear(self) -> None:
        """The process is gone."""
        self._sizes.clear()
