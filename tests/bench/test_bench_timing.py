from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from lasagna.bench.timing import Timings, measure
from lasagna.errors import UsageError


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def test_measure_times_each_candidate_once_a_round() -> None:
    clock = Clock()

    timings = measure({"a": clock.takes(2), "b": clock.takes(0.5)}, rounds=3, clock=clock)

    assert timings.seconds["a"].tolist() == [2, 2, 2]
    assert timings.seconds["b"].tolist() == [0.5, 0.5, 0.5]


def test_measure_turns_the_order_round_after_each_round() -> None:
    order: list[str] = []

    measure({name: partial(order.append, name) for name in "abc"}, rounds=3, warmup=1)

    # The warm-up round is number -1, so it runs backward and round 0 forward.
    assert "".join(order) == "cbaabccbaabc"


def test_measure_drops_the_warmup() -> None:
    clock = Clock()
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0])

    def first_calls_are_slow() -> None:
        clock.now += next(durations)

    timings = measure({"a": first_calls_are_slow}, rounds=3, warmup=2, clock=clock)

    assert timings.seconds["a"].tolist() == [1, 2, 3]


def test_measure_divides_by_the_calls_of_a_sample() -> None:
    clock = Clock()

    timings = measure({"a": clock.takes(0.25)}, rounds=1, calls=4, clock=clock)

    assert clock.now == 3 * 4 * 0.25  # two warm-up rounds and one that counts
    assert timings.seconds["a"].tolist() == [0.25]


def test_measure_tells_each_finished_round() -> None:
    rounds: list[int] = []

    measure({"a": lambda: None}, rounds=3, on_round=rounds.append)

    assert rounds == [1, 2, 3]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}, {"calls": 0}])
def test_measure_refuses_counts_out_of_range(wrong: dict[str, int]) -> None:
    counts = {"rounds": 1, "warmup": 0, "calls": 1} | wrong

    with pytest.raises(UsageError):
        measure(
            {"a": lambda: None},
            rounds=counts["rounds"],
            warmup=counts["warmup"],
            calls=counts["calls"],
        )


def test_measure_refuses_no_candidates() -> None:
    with pytest.raises(UsageError):
        measure({}, rounds=1)


def test_spread_is_median_and_quartiles() -> None:
    spread = Timings({"a": np.array([5.0, 1.0, 2.0, 4.0, 3.0])}).spread("a")

    assert (spread.q1_s, spread.median_s, spread.q3_s) == (2, 3, 4)
    assert (spread.minimum_s, spread.rounds, spread.iqr_s) == (1, 5, 2)


def test_ratio_is_the_ratio_of_medians() -> None:
    timings = Timings({"a": np.array([2.0, 4.0, 90.0]), "b": np.array([1.0, 2.0, 3.0])})

    assert timings.ratio("a", "b").value == 2


def test_ratio_of_the_same_samples_is_certain() -> None:
    noisy = np.random.default_rng(1).lognormal(size=50)

    ratio = Timings({"a": noisy, "b": noisy.copy()}).ratio("a", "b")

    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


def test_ratio_keeps_rounds_paired() -> None:
    # The machine's speed varies by a factor of e from round to round; b is always 1.5 times a.
    machine = np.exp(np.random.default_rng(2).uniform(-1, 1, size=40))

    ratio = Timings({"a": 1.5 * machine, "b": machine}).ratio("a", "b")

    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)


def test_ratio_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        samples = {
            "a": 2 * random.lognormal(sigma=0.3, size=41),
            "b": random.lognormal(sigma=0.3, size=41),
        }
        ratio = Timings(samples).ratio("a", "b", confidence=0.9, resamples=400)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 2 <= ratio.high

    assert 170 <= covered <= 195  # 90 % of 200 is 180; the bootstrap of a median is a bit wide


def test_ratio_is_repeatable() -> None:
    random = np.random.default_rng(4)
    timings = Timings({"a": random.lognormal(size=20), "b": random.lognormal(size=20)})

    assert timings.ratio("a", "b") == timings.ratio("a", "b")
    assert timings.ratio("a", "b", seed=1) != timings.ratio("a", "b")


@pytest.mark.parametrize(("confidence", "resamples"), [(0.0, 10), (1.0, 10), (0.9, 0)])
def test_ratio_refuses_settings_out_of_range(confidence: float, resamples: int) -> None:
    timings = Timings({"a": np.ones(3), "b": np.ones(3)})

    with pytest.raises(UsageError):
        timings.ratio("a", "b", confidence=confidence, resamples=resamples)
