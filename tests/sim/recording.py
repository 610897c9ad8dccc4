"""A journal of a virtual enclave that is known to take other times than its profiles say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.sim.cases import MACHINE, MB, load, model

from lasagna.journal import JournalWriter
from lasagna.policy.events import Arrived
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings
from lasagna.sim.calibration import Calibration
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import VirtualEnclave
from lasagna.sim.planner import Planner

SETTINGS = Settings(queue_rows=10_000)
MODELS = {
    "a": (model(6, 0.05, weight=4 * MB),),
    "b": (model(12, 0.08, weight=12 * MB),),
}
TRUE = Calibration(
    of_models={"a": 1.3, "b": 1.6}, load=1.5, seal=2.0, entry_s=0.003, arrange_s=0.2, plan_s=0.4
)
TWO_LANES = replace(MACHINE, lanes=2)
"""No core to spare: threads load while they wait."""


def arrivals(rate: float) -> list[tuple[float, str]]:
    """Of 20 seconds: when, and for which model."""
    return [(one.at_s, one.model) for one in load(1, rate, 20.0, *MODELS)]


def recorded(
    path: Path,
    rate: float,
    calibration: Calibration,
    machine: Machine = MACHINE,
    factors: Iterator[float] | None = None,
) -> list[float]:
    """Write the journal of an enclave that takes what the calibration says, asked as above.

    Returns:
        Latencies of the requests, in seconds.
    """
    clock = Clock()
    asked: dict[int, float] = {}
    took: list[float] = []
    with JournalWriter(path, machine, SETTINGS) as writer:
        enclave = VirtualEnclave(
            clock,
            machine,
            SETTINGS,
            Planner(),
            lambda end: took.append(clock.now_s - asked[end.request]),
            calibration=calibration,
            noise=factors,
            heard=writer.write,
        )
        enclave.start(MODELS)

        def arrive(facts: tuple[int, str]) -> None:
            number, name = facts
            asked[number] = clock.now_s
            enclave.tell(Arrived(clock.now_s, number, name))

        for number, (at_s, name) in enumerate(arrivals(rate), 1):
            clock.at(at_s + 2.0, arrive, (number, name))
        clock.run()
    return took
