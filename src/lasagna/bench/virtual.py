"""A calibrated server in virtual time, under the load that a real one had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import numpy as np

from lasagna.bench.load import rate_of
from lasagna.policy.events import Arrived, Cancelled
from lasagna.policy.state import Settings
from lasagna.sim.calibrating import Calibrated
from lasagna.sim.calibration import drawn
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import End, VirtualEnclave
from lasagna.sim.planner import Planner

SEED: Final = 11
"""Of the factors that are drawn."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a run, real or simulated. Seconds."""

    throughput: float
    p50_s: float
    p99_s: float

    def errors(self, other: Figures) -> dict[str, float]:
        """By how much another's differ, as shares of these."""
        return {
            "throughput": abs(other.throughput / self.throughput - 1),
            "p50": abs(other.p50_s / self.p50_s - 1),
            "p99": abs(other.p99_s / self.p99_s - 1),
        }


class VirtualRun:
    """A calibrated server in virtual time, which is asked for what a real one was."""

    def __init__(self, known: Calibrated, settings: Settings, outside_s: float) -> None:
        """It is open, and nothing has been asked of it.

        Args:
            known: what the machine takes, and of what models.
            settings: of the server's scheduler.
            outside_s: of a request, beside the scheduler's part.
        """
        self._outside_s = outside_s
        self._clock = Clock()
        self._following: Iterator[str] = iter(())
        self._last = 0
        self._asked_s: dict[int, float] = {}
        self._took_s: list[float] = []
        self._ends_s: list[float] = []
        self._enclave = VirtualEnclave(
            self._clock,
            known.machine,
            settings,
            Planner(),
            self._ended,
            calibration=known.calibration,
            noise=drawn(np.random.default_rng(SEED), known.ratios),
        )
        self._enclave.start(known.models, prepared=True)

    def saturated(self, order: Sequence[str], outstanding: int, answers: int) -> Figures:
        """What it does that always has so many requests; those that are left are withdrawn.

        Args:
            order: of the models that are asked for, over and over.
            outstanding: requests at any time.
            answers: that count, after the first ``outstanding`` ones.
        """
        self._following = cycle(order)
        begin_s = self._clock.now_s
        for _ in range(outstanding):
            self._clock.at(begin_s, self._ask_next)
        while len(self._ends_s) < outstanding + answers:
            self._clock.run(until_s=self._clock.now_s + 1.0)
        self._following = iter(())
        counted = slice(outstanding, outstanding + answers)
        figures = self._figures(self._took_s[counted], rate_of(self._ends_s[counted]))
        for request in list(self._asked_s):
            del self._asked_s[request]
            self._enclave.tell(Cancelled(self._clock.now_s, request))
        return figures

    def opened(self, arrivals: Sequence[tuple[float, str]]) -> Figures:
        """What it does when requests arrive so, whether others were answered or not.

        Args:
            arrivals: seconds, and the model.
        """
        begin_s, before = self._clock.now_s, len(self._took_s)
        for at_s, model in arrivals:
            self._clock.at(begin_s + at_s, self._ask, model)
        self._clock.run()
        took_s = self._took_s[before:]
        return self._figures(took_s, len(took_s) / (self._ends_s[-1] - begin_s))

    def _figures(self, took_s: Sequence[float], throughput: float) -> Figures:
        p50, p99 = np.quantile(took_s, (0.5, 0.99))
        return Figures(throughput, float(p50), float(p99))

    def _ask(self, model: str) -> None:
        self._last = request = self._last + 1
        self._asked_s[request] = self._clock.now_s
        self._enclave.tell(Arrived(self._clock.now_s, request, model))

    def _ask_next(self, _: None) -> None:
        model = next(self._following, None)
        if model is not None:
            self._ask(model)

    def _ended(self, end: End) -> None:
        asked_s = self._asked_s.pop(end.request, None)
        if asked_s is None:
            return  # it was withdrawn
        ends_s = self._clock.now_s + self._outside_s
        self._took_s.append(ends_s - asked_s)
        self._ends_s.append(ends_s)
        self._clock.at(ends_s, self._ask_next)
