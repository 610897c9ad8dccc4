"""Promise: from a run's journal comes what a simulation needs to take as long as it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.sim.cases import MACHINE
from tests.sim.recording import SETTINGS, TRUE, TWO_LANES, recorded

from lasagna.errors import UsageError
from lasagna.journal import JournalWriter
from lasagna.policy.stages import Machine
from lasagna.sim.calibrating import calibrated
from lasagna.sim.calibration import Calibration, drawn


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


def test_rare_slow_runs_are_found_as_often_as_they_were(tmp_path: Path) -> None:
    """Two lanes, every fourth run takes six times as long: no run's time is counted as a mate's."""
    path = tmp_path / "journal.jsonl"
    factors = drawn(np.random.default_rng(3), [1.0, 1.0, 1.0, 6.0])
    recorded(path, 9.0, TRUE, TWO_LANES, factors)
    ratios = np.array(calibrated(path).ratios)
    assert len(ratios) > 60
    usual, slow = np.isclose(ratios, 1.0, rtol=0.02), np.isclose(ratios, 6.0, rtol=0.02)
    assert np.mean(usual | slow) > 0.95
    assert 0.15 < np.mean(slow) < 0.35


def test_a_journal_without_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with JournalWriter(path, MACHINE, SETTINGS):
        pass
    with pytest.raises(UsageError, match="no run has ended"):
        calibrated(path)
