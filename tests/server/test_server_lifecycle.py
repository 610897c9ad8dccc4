"""What a host makes of a package and of what the enclave says about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.gateway.twin import INPUT, OUTPUT, plan_of

from lasagna.enclave.messages import Loaded
from lasagna.errors import BudgetError, ProtocolError
from lasagna.package.format import TensorSpec
from lasagna.server.lifecycle import loaded_facts
from lasagna.server.served import ModelFacts
from lasagna.units import GIB, KIB, MIB

PUBLIC = ModelFacts(b"d" * 32, (INPUT,), (OUTPUT,), batchable=True)
LOADED = Loaded(1, b"d" * 32, "twin", plan_of(16), 0.1)
LARGE = TensorSpec("x", "float32", (1, 1024, 1024))


def test_the_plan_decides_how_many_rows_are_taken() -> None:
    facts = loaded_facts(PUBLIC, LOADED, GIB)
    assert facts.max_rows == 16
    assert facts.plan == LOADED.plan


@pytest.mark.parametrize(
    "public", [replace(PUBLIC, inputs=(LARGE,)), replace(PUBLIC, outputs=(LARGE,))]
)
def test_a_batch_must_fit_a_frame(public: ModelFacts) -> None:
    assert loaded_facts(public, LOADED, 16 * MIB).max_rows == 3


def test_a_row_that_fits_no_frame_is_refused() -> None:
    with pytest.raises(BudgetError, match="raise the frame limit"):
        loaded_facts(replace(PUBLIC, inputs=(LARGE,)), LOADED, 100 * KIB)


def test_a_package_that_changed_meanwhile_is_noticed() -> None:
    with pytest.raises(ProtocolError, match="changed while it was loaded"):
        loaded_facts(replace(PUBLIC, digest=b"e" * 32), LOADED, GIB)
