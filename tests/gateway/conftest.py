from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.gateway.asking import NAME, http_to, sealed
from tests.gateway.twin import TwinModel


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def model() -> TwinModel:
    return TwinModel(NAME)


@pytest.fixture
async def http(model: TwinModel) -> AsyncIterator[httpx.AsyncClient]:
    async with http_to(model) as client:
        yield client


@pytest.fixture
def request_of(model: TwinModel) -> tuple[bytes, dict[str, str], Any]:
    """Body, headers, and the call that opens the answer."""
    return sealed(model)
