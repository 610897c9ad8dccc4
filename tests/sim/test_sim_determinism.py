"""Promise: the same seed gives the same events in the same order, whatever the hash seed is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sim.scenario import digest

ROOT = Path(__file__).resolve().parents[2]


def test_event_logs_are_the_same_under_different_hash_seeds() -> None:
    """The determinism contract of ``lasagna.sim``: two processes, every event and command."""
    found = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim.scenario", "7"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "4242")
    ]
    assert len(found[0]) == 64
    assert found[0] == found[1]


def test_another_seed_gives_another_log() -> None:
    """The digest sees what happens."""
    assert digest(1) != digest(2)
