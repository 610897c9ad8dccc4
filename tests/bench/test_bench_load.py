"""Promise: load is the same for all who are compared, and windows of measurement favour nobody."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.bench.load import Outcome, play, poisson, rate_of, saturate, sequence
from lasagna.errors import OverloadedError

pytestmark = pytest.mark.anyio
MIX = {"a": 3.0, "b": 1.0}


def test_arrivals_are_those_of_the_seed_and_keep_rate_and_mix() -> None:
    arrivals = poisson(MIX, rate=50.0, seconds=100.0, seed=1)
    assert arrivals == poisson(MIX, rate=50.0, seconds=100.0, seed=1)
    assert arrivals != poisson(MIX, rate=50.0, seconds=100.0, seed=2)
    assert len(arrivals) == pytest.approx(5000, rel=0.1)
    assert sum(name == "a" for _, name in arrivals) == pytest.approx(3750, rel=0.1)
    assert [at for at, _ in arrivals] == sorted(at for at, _ in arrivals)


def test_a_closed_loop_asks_in_the_mix() -> None:
    assert sequence(MIX, 4000, 1).count("a") == pytest.approx(3000, rel=0.05)


@given(st.integers(1, 40), st.integers(1, 20), st.floats(0.0, 0.9))
def test_one_thread_counts_what_it_answers(batch: int, batches: int, begin: float) -> None:
    times = [number + begin for number in range(batches + 1) for _ in range(batch)]
    assert rate_of(times) == pytest.approx(batch)


@given(st.integers(1, 40), st.integers(5, 20), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_threads_that_are_out_of_step_count_no_more_than_they_answer(
    batch: int, batches: int, phase: float, begin: float
) -> None:
    ends = sorted(number + shift for number in range(batches + 2) for shift in (0.0, phase))
    times = [end for end in ends if begin <= end <= begin + batches for _ in range(batch)]
    assert rate_of(times) == pytest.approx(2 * batch, rel=0.07)


def test_a_rate_needs_two_moments() -> None:
    assert math.isnan(rate_of([1.0]))
    assert math.isnan(rate_of([1.0, 1.0]))


def test_goodput_counts_what_came_in_time() -> None:
    outcome = Outcome(2.0, {"a": [0.1, 0.3], "b": [0.1]}, refused=1, throughput=1.5)
    assert outcome.answered == 3
    assert outcome.within({"a": 0.2, "b": 0.05}) == 0.5
    assert outcome.percentile_s(0.5) == 0.1


async def test_refusals_are_counted_and_do_not_end_a_load() -> None:
    async def infer(model: str) -> None:
        if model == "b":
            raise OverloadedError("full", 1.0)

    outcome = await play(infer, [(0.0, "a"), (0.001, "b"), (0.002, "a")])
    assert (outcome.answered, outcome.refused) == (2, 1)


async def test_an_error_ends_a_closed_loop() -> None:
    async def infer(model: str) -> None:
        raise OverloadedError("full", 1.0)

    with pytest.raises(OverloadedError):
        await saturate(infer, ["a"], outstanding=3, seconds=1.0)
