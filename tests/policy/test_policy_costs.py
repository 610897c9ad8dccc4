"""Promise: costs lie between what was measured, grow beyond it, and correct themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.policy.costs import Correction, SliceCosts

SLICE = SliceCosts(1000, (1.0, 1.5, 2.5, 4.5), (100, 150, 300, 500))


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.5), (3, 2.0), (8, 4.5), (16, 8.5)])
def test_computing_lies_on_the_curve(rows: int, seconds: float) -> None:
    assert SLICE.compute_at(rows) == pytest.approx(seconds)


@pytest.mark.parametrize(("rows", "size"), [(1, 100), (3, 300), (5, 500), (8, 500), (12, 701)])
def test_workspace_is_never_below_what_was_measured(rows: int, size: int) -> None:
    assert SLICE.workspace_at(rows) == size


@given(st.floats(0.2, 5.0), st.lists(st.floats(0.95, 1.05), min_size=40, max_size=80))
def test_a_correction_finds_the_factor_of_another_machine(
    factor: float, noise: list[float]
) -> None:
    correction = Correction()
    for one in noise:
        correction.note(2.0, 2.0 * factor * one)
    assert correction.factor == pytest.approx(factor, rel=0.06)


def test_what_was_not_measured_changes_nothing() -> None:
    correction = Correction()
    correction.note(0.0, 1.0)
    correction.note(1.0, 0.0)
    assert correction.factor == 1.0
    assert not correction.measured
