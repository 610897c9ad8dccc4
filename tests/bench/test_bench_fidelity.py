"""Promise: real runs that were kept can be simulated again, with what was asked then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.sim.recording import TRUE, arrivals, recorded

from lasagna.bench.__main__ import main
from lasagna.bench.fidelity import LIMITS, OPENED, SATURATED, Kept, run
from lasagna.bench.virtual import Figures
from lasagna.errors import UsageError
from lasagna.policy.baselines import POLICIES

PART = "alexnet, 1 thread"
RATE = 6.0


def keep(out: Path) -> Figures:
    """Runs of every policy, all by the same server; what it did at the rate."""
    runs = out / "fidelity-runs"
    runs.mkdir()
    journal = out / "journal.jsonl"
    p50, p99 = np.quantile(recorded(journal, RATE, TRUE), (0.5, 0.99))
    real = {load: Figures(RATE, float(p50), float(p99)) for load in (SATURATED, OPENED)}
    asked = arrivals(RATE)
    for policy in POLICIES:
        shutil.copy(journal, runs / f"{PART}, {policy}.jsonl")
        kept = Kept(PART, policy, "abc", 2, 0.0, 4, 40, ["a", "b"], asked, real, real)
        (runs / f"{PART}, {policy}.json").write_bytes(msgspec.json.encode(kept))
    return real[OPENED]


def test_kept_runs_are_simulated_again(tmp_path: Path) -> None:
    """Rows of all policies, and where the load was what was recorded they agree."""
    real = keep(tmp_path)
    result = run(quick=False, only=[PART], out=tmp_path, again=True)
    rows = json.loads((tmp_path / "fidelity-rows.json").read_text())
    assert len(rows) == 2 * len(POLICIES)
    assert {row["commit"] for row in rows} == {"abc"}
    opened = [msgspec.convert(row["simulated"], Figures) for row in rows if row["load"] == OPENED]
    for one in opened:
        errors = real.errors(one)
        assert all(errors[what] <= limit for what, limit in LIMITS.items())
    assert len(result.bars) == len(rows) * len(LIMITS)


def test_runs_that_were_not_kept_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{PART}, .*json is missing; leave out --again"):
        run(quick=False, only=[PART], out=tmp_path, again=True)


def test_runs_of_another_version_are_named(tmp_path: Path) -> None:
    keep(tmp_path)
    file = tmp_path / "fidelity-runs" / f"{PART}, lasagna.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match=f"{file.name} is of another version: .*; remove it"):
        run(quick=False, only=[PART], out=tmp_path, again=True)


def test_only_fidelity_keeps_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--again"])
    assert "plan keeps no runs that could be simulated again" in capsys.readouterr().err
