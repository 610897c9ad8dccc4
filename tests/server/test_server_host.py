"""Hosts over real enclave processes: what they answer, and what happens when enclaves die."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import numpy as np
import pytest
from tests.server.conftest import INPUT, Array, Model
from tests.server.rig import Backend, Rig, dispatched, hosting, noise

from lasagna.enclave.messages import SealedRows
from lasagna.errors import (
    BudgetError,
    InvalidInputError,
    KeyRefusedError,
    LasagnaError,
    OverloadedError,
    PackageError,
    ServiceError,
    TrustError,
    UsageError,
)
from lasagna.server.broker import InsecureBroker
from lasagna.server.broker_state import BrokerSecrets
from lasagna.server.lifecycle import HostConfig, enclave_life
from lasagna.server.plan_facts import PlanFacts
from lasagna.server.served import State
from lasagna.trust.keys import SecretKey, ServiceSecret
from lasagna.trust.policy import MeasurementIn
from lasagna.units import KIB, MIB, Bytes

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


# Answers.


async def test_answers_are_those_of_onnx_runtime(rig: Rig, model: Model, image: Array) -> None:
    inputs = {INPUT: image}
    np.testing.assert_allclose(await rig.infer(inputs), model.expected(inputs), rtol=1e-4)
    assert rig.host.status.state is State.READY


async def test_several_rows(rig: Rig, model: Model) -> None:
    inputs = {INPUT: noise(rig.host.facts.max_rows)}
    assert len(inputs[INPUT]) > 1
    np.testing.assert_allclose(await rig.infer(inputs), model.expected(inputs), rtol=1e-4)


async def test_statistics_count_what_was_done(rig: Rig, image: Array) -> None:
    before = (await rig.host.statistics(5.0)).counters
    await rig.infer({INPUT: image})
    after = await rig.host.statistics(5.0)
    assert after.counters.rows == before.rows + 1
    assert after.counters.runs > before.runs
    assert after.plan == rig.host.facts.plan
    assert after.budget_bytes == 64 * MIB


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_nan_and_infinities_pass_as_in_onnx_runtime(
    rig: Rig, model: Model, image: Array, value: float
) -> None:
    strange = image.copy()
    strange[0, 1, 100:110, 50:60] = value
    inputs = {INPUT: strange}
    np.testing.assert_allclose(
        await rig.infer(inputs), model.expected(inputs), rtol=1e-4, equal_nan=True
    )


async def test_requests_at_once_get_each_their_own_answer(rig: Rig, model: Model) -> None:
    inputs = [{INPUT: noise(1, seed)} for seed in range(8)]
    answers = await asyncio.gather(*(rig.infer(one) for one in inputs))
    for answer, one in zip(answers, inputs, strict=True):
        np.testing.assert_allclose(answer, model.expected(one), rtol=1e-4)


async def test_what_waits_is_answered_in_batches(rig: Rig, model: Model) -> None:
    inputs = [{INPUT: noise(1, seed)} for seed in range(6)]
    sealed = [await rig.seal(one) for one in inputs]
    rig.backend.send(signal.SIGSTOP)
    waiting = [asyncio.create_task(rig.answer(one)) for one in sealed]
    await dispatched()
    rig.backend.send(signal.SIGCONT)
    for task, one in zip(waiting, inputs, strict=True):
        np.testing.assert_allclose(await task, model.expected(one), rtol=1e-4)


# Requests that are wrong.


async def test_more_rows_than_a_request_may_have_are_refused(rig: Rig, image: Array) -> None:
    limit = rig.host.facts.max_rows
    _, rows = await rig.seal({INPUT: image})
    many = SealedRows(rows.request_id, rows.capsule, limit + 1, rows.records)
    with pytest.raises(InvalidInputError, match=f"takes up to {limit} of this model: split"):
        await rig.host.infer(many, 5.0)


async def test_garbage_is_refused_and_harms_nobody_in_its_batch(
    rig: Rig, model: Model, image: Array
) -> None:
    call, rows = await rig.seal({INPUT: image})
    record = bytearray(rows.records[0][0])
    record[-1] ^= 1
    damaged = SealedRows(rows.request_id, rows.capsule, 1, ((memoryview(bytes(record)),),))
    foreign = SealedRows(b"x" * 16, rows.capsule, 1, rows.records)
    good = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGSTOP)
    tasks = [
        asyncio.create_task(rig.answer(one))
        for one in (good, (call, damaged), (call, foreign), good, good)
    ]
    await dispatched()
    rig.backend.send(signal.SIGCONT)
    first, bad, other, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, TrustError)
    assert "does not open" in str(bad)
    assert isinstance(other, TrustError)
    for answer in (first, second, third):
        assert isinstance(answer, np.ndarray)
        np.testing.assert_allclose(answer, model.expected({INPUT: image}), rtol=1e-4)


async def test_a_request_of_another_service_is_refused(
    rig: Rig, model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    secrets = BrokerSecrets(broker.secrets.signing_key, ServiceSecret(SecretKey(b"t" * 32)))
    elsewhere = InsecureBroker(secrets, broker.models, broker.policy, True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    async with hosting(model.package, elsewhere, folder) as other:
        sealed = await other.seal({INPUT: image})
        assert (await other.answer(sealed)).shape == (1, 1000, 1, 1)
    with pytest.raises(TrustError, match="does not open"):
        await rig.answer(sealed)


# Models that can't be served.


async def refused(rig: Rig, kind: type[LasagnaError], message: str) -> None:
    assert rig.host.status.state is State.FAILED
    assert message in rig.host.status.reason
    rows = SealedRows(b"r" * 16, bytes(81), 1, ((memoryview(b""),),))
    with pytest.raises(kind):
        await rig.host.infer(rows, 5.0)
    with pytest.raises(kind):
        await rig.host.attest(b"n" * 16, 5.0)
    assert len(rig.backend.started) == 1


async def test_a_package_with_a_changed_section(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    package = model.copy_to(tmp_path)
    damage(package, package.stat().st_size // 2)
    async with hosting(package, broker, tmp_path) as rig:
        await refused(rig, PackageError, "does not open: the package was changed")


async def test_a_package_with_a_changed_manifest(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    package = model.copy_to(tmp_path)
    data = package.read_bytes()
    package.write_bytes(data.replace(b"softmaxout_1", b"softmaxout_2", 1))
    async with hosting(package, broker, tmp_path) as rig:
        await refused(rig, PackageError, "not signed by the owner's key")


async def test_a_package_that_is_changed_while_it_is_served(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    package = model.copy_to(tmp_path)
    budget = Bytes(10_000_000)
    async with hosting(package, broker, tmp_path, budget=budget, max_batch=1) as rig:
        plan = plan_of(rig)
        assert plan.pinned_bytes < plan.weight_bytes  # so the rest is read for every request
        sealed = await rig.seal({INPUT: image})
        await rig.answer(sealed)
        damage(package, *range(package.stat().st_size // 2, package.stat().st_size, 4 * KIB))
        with pytest.raises(PackageError, match="the package was changed"):
            await rig.answer(sealed)
        await rig.until(State.FAILED)
        with pytest.raises(PackageError):
            await rig.answer(sealed)


async def test_a_file_that_is_no_package(broker: InsecureBroker, tmp_path: Path) -> None:
    file = tmp_path / "text.lsg"
    file.write_text("x" * 1000)
    with pytest.raises(PackageError, match="not a Lasagna package"):
        async with hosting(file, broker, tmp_path):
            pass


async def test_a_broker_without_the_models_key(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    empty = InsecureBroker(broker.secrets, [], broker.policy, True)
    async with hosting(model.package, empty, tmp_path) as rig:
        await refused(rig, KeyRefusedError, "has no keys for package")


@pytest.mark.parametrize(
    ("allowed", "emulated", "message"),
    [(b"o" * 32, True, "is not allowed"), (None, False, "the evidence is emulated")],
)
async def test_a_broker_that_refuses_the_enclave(
    model: Model,
    broker: InsecureBroker,
    tmp_path: Path,
    allowed: bytes | None,
    emulated: bool,
    message: str,
) -> None:
    policy = MeasurementIn(frozenset({allowed})) if allowed else broker.policy
    strict = InsecureBroker(broker.secrets, broker.models, policy, emulated)
    async with hosting(model.package, strict, tmp_path) as rig:
        await refused(rig, KeyRefusedError, message)


async def test_a_broker_that_answers_nonsense(
    model: Model, broker: InsecureBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InsecureBroker, "release", lambda *_: bytes(273))
    async with hosting(model.package, broker, tmp_path) as rig:
        await refused(rig, KeyRefusedError, "the enclave refuses the key broker's answer")


async def test_a_broker_that_is_away_for_a_while(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    away = [ServiceError("can't be reached", 0)]
    async with hosting(model.package, broker, tmp_path, failures=away) as rig:
        assert rig.host.status.state is State.READY
        assert len(rig.backend.started) == 2
        assert (await rig.infer({INPUT: image})).shape == (1, 1000, 1, 1)


async def test_a_budget_that_is_too_small(
    model: Model, broker: InsecureBroker, tmp_path: Path
) -> None:
    async with hosting(model.package, broker, tmp_path, budget=Bytes(100 * KIB)) as rig:
        await refused(rig, BudgetError, "needs a budget of")


# Stopping.


async def test_stopping_finishes_what_is_here_and_refuses_the_rest(
    rig: Rig, model: Model, image: Array
) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGSTOP)
    here = [asyncio.create_task(rig.answer(sealed)) for _ in range(5)]
    await dispatched()
    stopping = asyncio.create_task(rig.enclave.stop(drain_s=20.0))
    await dispatched()
    with pytest.raises(OverloadedError, match="shutting down"):
        await rig.answer(sealed)
    rig.backend.send(signal.SIGCONT)
    await stopping
    for answer in await asyncio.gather(*here):
        np.testing.assert_allclose(answer, model.expected({INPUT: image}), rtol=1e-4)
    assert await rig.backend.started[-1].wait() == 0  # it ended by itself


async def test_stopping_does_not_wait_for_ever(rig: Rig, image: Array) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGSTOP)
    here = asyncio.create_task(rig.answer(sealed))
    await dispatched()
    await rig.enclave.stop(drain_s=0.05)
    with pytest.raises(OverloadedError, match="shutting down"):
        await here


async def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    config = HostConfig(budget=Bytes(MIB))
    with pytest.raises(UsageError, match="choose a shorter --socket-dir"):
        async with enclave_life(Backend(), config, tmp_path / ("x" * 100), "m"):
            pass


def plan_of(rig: Rig) -> PlanFacts:
    plan = rig.host.facts.plan
    assert plan is not None
    return plan


def damage(path: Path, *offsets: int) -> None:
    """Change bytes in place: whoever has mapped the file sees it."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
