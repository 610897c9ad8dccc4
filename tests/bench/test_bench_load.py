"""Promise: load is the same for all who are compared, and windows of measurement favour nobody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.bench.load import Outcome, _window, play, poisson, saturate, sequence
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


@given(st.integers(1, 40), st.integers(2, 10), st.integers(0, 39))
def test_a_window_counts_whole_batches(batch: int, batches: int, warm: int) -> None:
    times = [number + 1e-5 * row for number in range(batches + 2) for row in range(batch)]
    first, last = _window(times, min(warm, batch - 1))
    assert (last - first) / (times[last] - times[first]) == pytest.approx(batch, rel=0.01)


def test_goodput_counts_what_came_in_time() -> None:
    outcome = Outcome(2.0, {"a": [0.1, 0.3], "b": [0.1]}, refused=1)
    assert (outcome.answered, outcome.throughput) == (3, 1.5)
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
