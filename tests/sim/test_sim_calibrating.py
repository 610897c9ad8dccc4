"""Promise: from a run's journal comes what a simulation needs to take as long as it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.sim.cases import MACHINE, MB, load, model

from lasagna.errors import UsageError
from lasagna.journal import JournalWriter
from lasagna.policy.events import Arrived
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings
from lasagna.sim.calibrating import calibrated
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


def recorded(
    path: Path, rate: float, calibration: Calibration, machine: Machine = MACHINE
) -> list[float]:
    """A journal of an enclave that takes what the calibration says; latencies of requests."""
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
            heard=writer.write,
        )
        enclave.start(MODELS)

        def arrive(facts: tuple[int, str]) -> None:
            number, name = facts
            asked[number] = clock.now_s
            enclave.tell(Arrived(clock.now_s, number, name))

        for number, one in enumerate(load(1, rate, 20.0, "a", "b"), 1):
            clock.at(one.at_s + 2.0, arrive, (number, one.model))
        clock.run()
    return took


def test_factors_are_found(tmp_path: Path) -> None:
    """What a simulated machine was made of is what its journal says."""
    path = tmp_path / "journal.jsonl"
    recorded(path, 6.0, TRUE)
    found = calibrated(path)
    assert found.machine == MACHINE
    assert set(found.models) == {"a", "b"}
    assert found.runs > 30
    got = found.calibration
    assert got.of_models["a"] == pytest.approx(1.3, rel=0.03)
    assert got.of_models["b"] == pytest.approx(1.6, rel=0.03)
    assert got.load == pytest.approx(1.5, rel=0.02)
    assert got.seal == pytest.approx(2.0, rel=0.02)
    assert got.entry_s == pytest.approx(0.003, abs=0.0006)
    assert got.plan_s == pytest.approx(0.4, rel=0.01)
    assert got.arrange_s >= 0.2
    assert np.quantile(found.ratios, (0.25, 0.75)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("machine", [MACHINE, TWO_LANES], ids=["one lane", "two lanes"])
def test_a_calibrated_simulation_takes_as_long(tmp_path: Path, machine: Machine) -> None:
    """The mean latency of the same arrivals, within three percent."""
    path, again = tmp_path / "journal.jsonl", tmp_path / "again.jsonl"
    real = recorded(path, 6.0, TRUE, machine)
    simulated = recorded(again, 6.0, calibrated(path).calibration, machine)
    plain = recorded(again, 6.0, Calibration(), machine)
    mean = sum(real) / len(real)
    assert sum(simulated) / len(simulated) == pytest.approx(mean, rel=0.03)
    assert sum(plain) / len(plain) < 0.9 * mean


def test_a_journal_without_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with JournalWriter(path, MACHINE, SETTINGS):
        pass
    with pytest.raises(UsageError, match="no run has ended"):
        calibrated(path)
