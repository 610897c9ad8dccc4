"""Promise: a request whose values do not suit the model is refused, and nobody else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.lookup import OUT_OF_RANGE, TOKENS, lookup_model
from tests.server.conftest import Array
from tests.server.rig import Rig, dispatched, hosting

from lasagna.errors import EnclaveError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare
from lasagna.server.broker import InsecureBroker

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
async def lookup(broker: InsecureBroker, tmp_path: Path) -> AsyncIterator[Rig]:
    """A host of a model that looks rows of a table up."""
    package = tmp_path / "lookup.lsg"
    options = SealOptions(slice_bytes=4096, profile=False)
    source, owner = prepare(lookup_model()), Ed25519PrivateKey.generate()
    keys, _ = seal(source, "lookup", owner, package, options)
    async with hosting(package, replace(broker, models=[keys]), tmp_path, max_batch=8) as rig:
        yield rig


def tokens(seed: int) -> dict[str, Array]:
    return {"ids": np.random.default_rng(seed).integers(0, 100, (1, TOKENS))}


async def test_one_bad_row_fails_nobody_else_in_its_batch(lookup: Rig) -> None:
    plain = open_session(prepare(lookup_model()))
    inputs = [tokens(seed) for seed in range(6)]
    inputs[3]["ids"][0, 2] = OUT_OF_RANGE
    sealed = [await lookup.seal(one) for one in inputs]
    before = (await lookup.host.statistics(5.0)).counters
    lookup.backend.send(signal.SIGSTOP)
    tasks = [asyncio.create_task(lookup.answer(one)) for one in sealed]
    await dispatched()
    lookup.backend.send(signal.SIGCONT)
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    for number, (answer, one) in enumerate(zip(answers, inputs, strict=True)):
        if number == 3:
            assert type(answer) is EnclaveError
            assert "do not suit the model" in str(answer)
            assert str(OUT_OF_RANGE) not in str(answer)
        else:
            assert isinstance(answer, np.ndarray)
            np.testing.assert_allclose(answer, plain.run(None, one)[0], rtol=1e-4, atol=1e-6)
    after = (await lookup.host.statistics(5.0)).counters
    # Two at once, then a batch of four, which fails, then its requests one by one; then Forget
    # and GetStats.
    assert after.entries - before.entries == 2 + 1 + 4 + 1 + 1
    assert len(lookup.backend.started) == 1


async def test_a_bad_row_alone_is_refused_at_once(lookup: Rig) -> None:
    with pytest.raises(EnclaveError, match="do not suit the model"):
        await lookup.infer({"ids": np.full((1, TOKENS), OUT_OF_RANGE)})
    assert (await lookup.infer(tokens(0))).shape == (1, 8)
