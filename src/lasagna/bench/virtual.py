"""A calibrated server in virtual time, under the load that a real one had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import numpy as np

from lasagna.bench.load import rate_of
from lasagna.policy.events import Arrived
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


class _Simulated:
    """A calibrated server in virtual time, and when its requests were asked and answered."""

    def __init__(self, known: Calibrated, settings: Settings, outside_s: float) -> None:
        self.outside_s = outside_s
        self.clock = Clock()
        self.asked_s: dict[int, float] = {}
        self.took_s: list[float] = []
        self.ends_s: list[float] = []
        rng = np.random.default_rng(SEED)
        self.enclave = VirtualEnclave(
            self.clock,
            known.machine,
            settings,
            Planner(),
            self._ended,
            calibration=known.calibration,
            noise=drawn(rng, known.ratios),
        )
        self.enclave.start(known.models, prepared=True)

    def ask(self, model: str) -> None:
        number = len(self.asked_s) + 1
        self.asked_s[number] = self.clock.now_s
        self.enclave.tell(Arrived(self.clock.now_s, number, model))

    def _ended(self, end: End) -> None:
        ends_s = self.clock.now_s + self.outside_s
        self.took_s.append(ends_s - self.asked_s[end.request])
        self.ends_s.append(ends_s)
        self.answered()

    def answered(self) -> None:
        """A request has ended; must not ask at once."""


class _Closed(_Simulated):
    """Asks for another one for each that was answered."""

    def __init__(
        self, known: Calibrated, settings: Settings, outside_s: float, order: Sequence[str]
    ) -> None:
        super().__init__(known, settings, outside_s)
        self._order = cycle(order)

    def more(self, _: None) -> None:
        """Ask for the next one."""
        self.ask(next(self._order))

    def answered(self) -> None:
        self.clock.at(self.clock.now_s + self.outside_s, self.more)


def saturated(
    known: Calibrated,
    settings: Settings,
    outside_s: float,
    order: Sequence[str],
    outstanding: int,
    answers: int,
) -> Figures:
    """What a server does that always has so many requests.

    Args:
        known: what the machine takes, and of what models.
        settings: of the server's scheduler.
        outside_s: of a request, beside the scheduler's part.
        order: of the models that are asked for, over and over.
        outstanding: requests at any time.
        answers: that count, after the first ``outstanding`` ones.
    """
    one = _Closed(known, settings, outside_s, order)
    for _ in range(outstanding):
        one.clock.at(0.0, one.more)
    while len(one.ends_s) < outstanding + answers:
        one.clock.run(until_s=one.clock.now_s + 1.0)
    took = one.took_s[outstanding : outstanding + answers]
    p50, p99 = np.quantile(took, (0.5, 0.99))
    ends = one.ends_s[outstanding : outstanding + answers]
    return Figures(rate_of(ends), float(p50), float(p99))


def opened(
    known: Calibrated, settings: Settings, outside_s: float, arrivals: Sequence[tuple[float, str]]
) -> Figures:
    """What a server does when requests arrive so, whether others were answered or not.

    Args:
        known: what the machine takes, and of what models.
        settings: of the server's scheduler.
        outside_s: of a request, beside the scheduler's part.
        arrivals: seconds, and the model.
    """
    one = _Simulated(known, settings, outside_s)
    for at_s, model in arrivals:
        one.clock.at(1.0 + at_s, one.ask, model)
    one.clock.run()
    p50, p99 = np.quantile(one.took_s, (0.5, 0.99))
    return Figures(len(one.took_s) / (one.ends_s[-1] - 1.0), float(p50), float(p99))
