"""Promise: what a real host decided over a real enclave, a fresh scheduler decides again."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path

import pytest
from tests.server.conftest import INPUT, Model, anyio_backend, broker, model
from tests.server.rig import hosting, noise

from lasagna.journal import Journal
from lasagna.server.broker import InsecureBroker
from lasagna.server.served import State
from lasagna.sim.replay import replay

pytestmark = [pytest.mark.integration, pytest.mark.anyio]
__all__ = ["anyio_backend", "broker", "model"]  # fixtures


async def test_a_real_run_is_replayed_with_the_same_commands(
    model: Model,
    broker: InsecureBroker,
    tmp_path: Path,
) -> None:
    """SqueezeNet, answered in batches, through the death of its enclave."""
    path = tmp_path / "journal.jsonl"
    async with hosting(model.package, broker, tmp_path, journal=path) as rig:
        await asyncio.gather(*(rig.infer({INPUT: noise(1 + n % 3, n)}) for n in range(12)))
        rig.backend.send(signal.SIGKILL)
        await rig.until(State.RESTARTING)
        await rig.until(State.READY)
        await asyncio.gather(*(rig.infer({INPUT: noise(1, n)}) for n in range(4)))
    assert replay(path) is None
    events = Counter(type(entry.event).__name__ for entry in Journal(path))
    commands = Counter(type(one).__name__ for entry in Journal(path) for one in entry.commands)
    assert commands["Answer"] == events["Arrived"] == 16
    assert commands["Run"] == events["Ran"] >= 4
    assert events["EnclaveLost"] == 2
