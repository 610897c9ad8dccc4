"""Promise: through a real host and enclave, tenants get their shares when the server is busy, and
nobody starves behind a higher priority."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from tests.server.conftest import INPUT, Array, Model
from tests.server.rig import DEADLINE_S, hosting

from lasagna.server.broker import InsecureBroker
from lasagna.server.served import ServiceClass

pytestmark = [pytest.mark.anyio, pytest.mark.integration]
OUTSTANDING = 40
"""Requests of each tenant that wait at any time: more than a batch of everybody's."""


async def test_tenants_get_their_shares(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    weights = {"gold": 2.0, "plain": 1.0}
    served = Counter[str]()
    begun = asyncio.Event()

    async with hosting(model.package, broker, tmp_path, tenant_weights=weights) as rig:
        _, rows = await rig.seal({INPUT: image})

        async def client(tenant: str) -> None:
            while served.total() < 500:
                await rig.host.infer(rows, DEADLINE_S, ServiceClass(tenant=tenant))
                if begun.is_set():
                    served[tenant] += 1
                elif rig.enclave.scheduler.waiting_rows >= OUTSTANDING:
                    begun.set()

        async with asyncio.timeout(2 * DEADLINE_S), asyncio.TaskGroup() as group:
            for tenant in weights:
                for _ in range(OUTSTANDING):
                    group.create_task(client(tenant))
    assert served["gold"] / served["plain"] == pytest.approx(2.0, rel=0.1)


async def test_nobody_starves_behind_a_higher_priority(
    model: Model, broker: InsecureBroker, image: Array, tmp_path: Path
) -> None:
    async with hosting(model.package, broker, tmp_path, patience_s=0.5) as rig:
        _, rows = await rig.seal({INPUT: image})
        answered = asyncio.Event()
        flood = 0

        async def hurried() -> None:
            nonlocal flood
            while not answered.is_set():
                await rig.host.infer(rows, DEADLINE_S, ServiceClass(priority=4))
                flood += 1

        async def patient() -> None:
            await rig.host.infer(rows, DEADLINE_S, ServiceClass(priority=-4))
            answered.set()

        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for _ in range(OUTSTANDING):
                group.create_task(hurried())
            group.create_task(patient())
    # There was always somebody of a higher priority, and it waited behind many of them.
    assert flood > OUTSTANDING
