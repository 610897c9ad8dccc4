"""Promise: models share an enclave, every policy answers rightly, and a trace tells all."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.lookup import TOKENS, lookup_model
from tests.server.conftest import INPUT, Array, Model
from tests.server.rig import Rig, dispatched, hosting, noise

from lasagna.errors import OverloadedError, PackageError, UsageError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare
from lasagna.policy.baselines import POLICIES
from lasagna.server.broker import InsecureBroker
from lasagna.server.served import ServiceClass, State
from lasagna.server.trace import read_trace

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


def lookup_package(folder: Path, broker: InsecureBroker) -> tuple[Path, InsecureBroker]:
    """A second model, and a broker with the keys of both."""
    package = folder / "lookup.lsg"
    options = SealOptions(slice_bytes=4096, profile=False)
    owner = Ed25519PrivateKey.generate()
    keys, _ = seal(prepare(lookup_model()), "lookup", owner, package, options)
    return package, replace(broker, models=[*broker.models, keys])


async def test_two_models_are_served_by_one_enclave(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    package, both = lookup_package(tmp_path, broker)
    plain = open_session(prepare(lookup_model()))
    async with hosting([model.package, package], both, tmp_path, max_batch=4) as rig:
        other = Rig(rig.enclave, rig.backend, rig.relay, "lookup")
        tokens = [
            {"ids": np.random.default_rng(seed).integers(0, 100, (1, TOKENS))} for seed in range(6)
        ]
        answers = await asyncio.gather(
            *(rig.infer({INPUT: image}) for _ in range(4)), *(other.infer(one) for one in tokens)
        )
        for answer in answers[:4]:
            np.testing.assert_allclose(answer, model.expected({INPUT: image}), rtol=1e-4)
        for answer, one in zip(answers[4:], tokens, strict=True):
            np.testing.assert_allclose(answer, plain.run(None, one)[0], rtol=1e-4, atol=1e-6)
        assert len(rig.backend.started) == 1
        rig.backend.send(signal.SIGKILL)
        await rig.until(State.RESTARTING)
        await other.until(State.READY)
        assert (await other.infer(tokens[0])).shape == (1, 8)
        assert (await rig.infer({INPUT: image})).shape == (1, 1000, 1, 1)


async def test_a_model_that_fails_leaves_the_other_one_served(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    package, both = lookup_package(tmp_path, broker)
    damaged = model.copy_to(tmp_path)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    async with hosting([damaged, package], both, tmp_path) as rig:
        other = Rig(rig.enclave, rig.backend, rig.relay, "lookup")
        assert rig.host.status.state is State.FAILED
        assert "the package was changed" in rig.host.status.reason
        assert (await other.infer({"ids": np.ones((1, TOKENS), np.int64)})).shape == (1, 8)
        with pytest.raises(PackageError):
            await rig.host.attest(b"n" * 16, 5.0)


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_gives_the_same_answers(
    model: Model, broker: InsecureBroker, tmp_path: Path, policy: str
) -> None:
    inputs = [{INPUT: noise(1, seed)} for seed in range(5)] + [{INPUT: noise(3, 9)}]
    async with hosting(model.package, broker, tmp_path, policy=policy, threads=2) as rig:
        answers = await asyncio.gather(*(rig.infer(one) for one in inputs))
    for answer, one in zip(answers, inputs, strict=True):
        np.testing.assert_allclose(answer, model.expected(one), rtol=1e-4)


async def test_an_unknown_policy_is_refused_with_the_known_ones(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no policy 'best'; choose lasagna, dynamic-batch"):
        async with hosting(model.package, broker, tmp_path, policy="best"):
            pass


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    rig: Rig, model: Model, image: Array
) -> None:
    sealed = await rig.seal({INPUT: image})
    assert (await rig.answer(sealed)).shape == (1, 1000, 1, 1)
    with pytest.raises(OverloadedError, match="after its deadline") as caught:
        await rig.host.infer(sealed[1], 5.0, ServiceClass(deadline_s=1e-6))
    assert caught.value.retry_after_s >= 0


async def test_higher_priorities_go_first(rig: Rig, image: Array) -> None:
    sealed = await rig.seal({INPUT: image})
    order: list[int] = []

    async def ask(priority: int) -> None:
        await rig.host.infer(sealed[1], 20.0, ServiceClass(priority=priority))
        order.append(priority)

    rig.backend.send(signal.SIGSTOP)
    running = [asyncio.create_task(ask(9)) for _ in range(2)]  # they are in the enclave
    await dispatched()
    low = [asyncio.create_task(ask(0)) for _ in range(8)]
    await dispatched()
    high = [asyncio.create_task(ask(1)) for _ in range(4)]
    await dispatched()
    rig.backend.send(signal.SIGCONT)
    await asyncio.gather(*running, *low, *high)
    assert order == [9] * 2 + [1] * 4 + [0] * 8


async def test_a_trace_has_every_slice_of_every_run(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    async with hosting(
        model.package, broker, tmp_path, trace=path, policy="on-demand", budget=12_000_000
    ) as rig:
        for _ in range(3):
            await rig.infer({INPUT: image})
        slices = rig.host.facts.plan.slices if rig.host.facts.plan else 0
        await rig.enclave.stop(drain_s=10.0)
    trace = read_trace(path)
    assert trace.header.policy == "on-demand"
    assert trace.header.models == (rig.host.name,)
    computed = [span for span in trace.spans if span.kind == "compute"]
    runs = sorted({span.run for span in computed})
    assert len(runs) >= 2  # recording begins with the first question for spans
    for run in runs[1:]:
        assert [span.slice for span in computed if span.run == run] == list(range(slices))
    assert {"open", "load", "compute", "seal"} <= {span.kind for span in trace.spans}
    assert all(span.begin_s <= span.end_s for span in trace.spans)
