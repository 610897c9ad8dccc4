"""What a host makes of a package's public facts, and how long it waits for a dying enclave."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.gateway.twin import INPUT, OUTPUT

from lasagna.errors import BudgetError
from lasagna.package.format import TensorSpec
from lasagna.server.lifecycle import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    HostConfig,
    backoff_s,
    may_wait,
    rows_limit,
)
from lasagna.server.served import ModelFacts
from lasagna.units import GIB, KIB, MIB, Bytes

PUBLIC = ModelFacts(b"d" * 32, (INPUT,), (OUTPUT,), batchable=True)
LARGE = TensorSpec("x", "float32", (1, 1024, 1024))


def config(frame_limit: int = GIB, max_batch: int = 16) -> HostConfig:
    return HostConfig(budget=Bytes(MIB), frame_limit=frame_limit, max_batch=max_batch)


def test_a_request_has_as_many_rows_as_were_wished_for() -> None:
    assert rows_limit(PUBLIC, config()) == 16
    assert rows_limit(replace(PUBLIC, batchable=False), config()) == 1


@pytest.mark.parametrize(
    "public", [replace(PUBLIC, inputs=(LARGE,)), replace(PUBLIC, outputs=(LARGE,))]
)
def test_a_batch_must_fit_a_frame(public: ModelFacts) -> None:
    assert rows_limit(public, config(16 * MIB)) == 3


def test_a_row_that_fits_no_frame_is_refused() -> None:
    with pytest.raises(BudgetError, match="raise the frame limit"):
        rows_limit(replace(PUBLIC, inputs=(LARGE,)), config(100 * KIB))


def test_pauses_between_starts_double_up_to_a_limit() -> None:
    pauses = [backoff_s(deaths) for deaths in range(1, 40)]
    assert pauses[0] == FIRST_BACKOFF_S
    assert pauses[1] == 2 * FIRST_BACKOFF_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_BACKOFF_S


def test_requests_wait_for_the_first_restarts_only() -> None:
    assert may_wait(1)
    assert not may_wait(3)
