"""Promise: the workspace that a package states suffices for every batch, and sealing measures with
the options that people use, not only with those of fast tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lasagna.models.profile import extend
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.models.zoo.catalog import load
from lasagna.package.format import PROFILE_BATCHES

sizes = st.integers(0, 10**9)


@given(sizes, sizes, st.floats(1, 3), st.floats(1, 3))
def test_the_workspace_of_a_batch_is_never_less_than_it_takes(
    fixed: int, row: int, first: float, second: float
) -> None:
    """Whatever batch 1 and 2 were found to need, each up to three times too much."""
    needs = [int((fixed + row) * first), int((fixed + 2 * row) * second)]
    for batch, stated in zip(PROFILE_BATCHES, extend(needs), strict=True):
        assert stated >= int((fixed + row * batch) * (1 - 1e-12))


def test_a_model_that_is_not_batched_needs_what_one_row_needs() -> None:
    assert extend([5]) == (5, 5, 5, 5)


@pytest.mark.integration
def test_sealing_as_people_do_it(tmp_path: Path) -> None:
    """Every default: both variants, measured. (A slope that was too small once stopped this.)"""
    source, owner = prepare(load("squeezenet")), Ed25519PrivateKey.generate()
    _, report = seal(source, "squeezenet", owner, tmp_path / "squeezenet.lsg", SealOptions())
    assert len(report.manifest.variants) == 2
    for variant in report.manifest.variants:
        assert all(min(facts.compute_s) > 0 for facts in variant.slices)
