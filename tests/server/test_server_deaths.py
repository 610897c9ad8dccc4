"""What becomes of requests when their enclave dies, hangs or can't be started."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import numpy as np
import pytest
from tests.server.conftest import INPUT, Array, Model
from tests.server.rig import Rig, dispatched, hosting

from lasagna.errors import (
    EnclaveLostError,
    OverloadedError,
    PackageError,
    ServiceError,
)
from lasagna.server.broker import InsecureBroker
from lasagna.server.served import State

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


async def test_a_request_in_flight_survives_its_enclave(
    rig: Rig, model: Model, image: Array
) -> None:
    inputs = {INPUT: image}
    sealed = await rig.seal(inputs)
    rig.backend.send(signal.SIGSTOP)  # it can't answer before it dies
    tasks = [asyncio.create_task(rig.answer(sealed)) for _ in range(4)]
    await dispatched()
    rig.backend.send(signal.SIGKILL)
    for task in tasks:
        np.testing.assert_allclose(await task, model.expected(inputs), rtol=1e-4)
    assert len(rig.backend.started) == 2
    np.testing.assert_allclose(await rig.infer(inputs), model.expected(inputs), rtol=1e-4)


async def test_a_request_that_is_there_at_two_deaths_is_given_up(
    rig: Rig, model: Model, image: Array
) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGSTOP)
    task = asyncio.create_task(rig.answer(sealed))
    await dispatched()
    rig.backend.send(signal.SIGKILL)
    await rig.until(State.RESTARTING)
    await rig.until(State.READY)
    rig.backend.send(signal.SIGKILL)
    with pytest.raises(EnclaveLostError, match="died twice with this request in it"):
        await task
    await rig.until(State.READY)
    assert (await rig.answer(sealed)).shape == (1, 1000, 1, 1)


async def test_between_two_enclaves_requests_wait(rig: Rig, model: Model, image: Array) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGKILL)
    await rig.until(State.RESTARTING)
    assert "the enclave" in rig.host.status.reason
    with pytest.raises(EnclaveLostError):
        await rig.host.attest(b"n" * 16, 5.0)
    np.testing.assert_allclose(await rig.answer(sealed), model.expected({INPUT: image}), rtol=1e-4)


async def test_an_enclave_that_hangs_is_replaced(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    async with hosting(model.package, broker, tmp_path, answer_timeout_s=1.0) as rig:
        sealed = await rig.seal({INPUT: image})
        rig.backend.send(signal.SIGSTOP)
        np.testing.assert_allclose(
            await rig.answer(sealed), model.expected({INPUT: image}), rtol=1e-4
        )
        assert len(rig.backend.started) == 2


async def test_an_enclaves_memory_is_measured_by_the_kernel_and_exceeds_its_plan(rig: Rig) -> None:
    told = await rig.host.statistics(5.0)
    assert told.plan.total_bytes < told.process_peak_bytes < 2**30


async def test_a_deadline_holds_while_the_enclave_hangs(rig: Rig, image: Array) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.backend.send(signal.SIGSTOP)
    with pytest.raises(OverloadedError, match=r"no answer within 0\.05 s"):
        await rig.answer(sealed, timeout_s=0.05)
    with pytest.raises(OverloadedError, match=r"no answer within 0\.05 s"):
        await rig.host.attest(b"n" * 16, timeout_s=0.05)
    rig.backend.send(signal.SIGCONT)
    assert (await rig.answer(sealed)).shape == (1, 1000, 1, 1)
    assert len(rig.backend.started) == 1


async def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    async with hosting(model.package, broker, tmp_path, queue_limit=2) as rig:
        sealed = await rig.seal({INPUT: image})
        rig.backend.send(signal.SIGSTOP)
        tasks = [asyncio.create_task(rig.answer(sealed)) for _ in range(4)]  # 2 run, 2 wait
        await dispatched()
        with pytest.raises(OverloadedError, match="2 rows wait, the limit is 2") as caught:
            await rig.answer(sealed)
        assert caught.value.retry_after_s > 0
        tasks.pop().cancel()
        await dispatched()
        tasks.append(asyncio.create_task(rig.answer(sealed)))
        await dispatched()
        rig.backend.send(signal.SIGCONT)
        assert len(await asyncio.gather(*tasks)) == 4


async def test_after_some_deaths_requests_no_longer_wait_but_later_ones_are_answered(
    rig: Rig, model: Model, image: Array
) -> None:
    sealed = await rig.seal({INPUT: image})
    rig.relay.failures += [ServiceError("the broker is away", 0)] * 2
    rig.backend.send(signal.SIGKILL)
    await rig.until(State.RESTARTING)
    waiting = asyncio.create_task(rig.answer(sealed))
    with pytest.raises(EnclaveLostError, match="died 3 times in a row: the broker is away"):
        await waiting
    with pytest.raises(EnclaveLostError, match="the broker is away"):
        await rig.answer(sealed)
    await rig.until(State.READY)
    np.testing.assert_allclose(await rig.answer(sealed), model.expected({INPUT: image}), rtol=1e-4)


async def test_a_package_that_was_replaced_is_served_after_a_death(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    package = model.copy_to(tmp_path)
    async with hosting(package, broker, tmp_path) as rig:
        package.write_bytes(b"no package")
        rig.backend.send(signal.SIGKILL)
        await rig.until(State.FAILED)
        assert "is no package" in rig.host.status.reason
        with pytest.raises(PackageError):
            await rig.host.attest(b"n" * 16, 5.0)
