"""Promise: load comes at the rate, and as bursty, as asked for; the same from the same seed."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.errors import UsageError
from lasagna.sim.arrivals import (
    Arrival,
    diurnal,
    gamma,
    merge,
    mmpp,
    poisson,
    recorded,
    requests,
)

Process = Callable[[np.random.Generator], Iterator[float]]
PROCESSES: dict[str, Process] = {
    "poisson": lambda rng: poisson(rng, 50.0),
    "gamma": lambda rng: gamma(rng, 50.0, 3.0),
    "mmpp": lambda rng: mmpp(rng, (20.0, 110.0), (1.0, 0.5)),
    "diurnal": lambda rng: diurnal(rng, 50.0, 0.8, 10.0),
}


def some(name: str, count: int = 100_000, seed: int = 3) -> np.ndarray:
    return np.array(list(islice(PROCESSES[name](np.random.default_rng(seed)), count)))


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_times_are_in_order_and_come_at_the_rate(name: str) -> None:
    """Every process: 50 a second in the long run."""
    times = some(name)
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(50.0, rel=0.04)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_the_same_seed_gives_the_same_times(name: str) -> None:
    """Determinism begins with the load."""
    assert (some(name, 5000) == some(name, 5000)).all()
    assert (some(name, 5000) != some(name, 5000, seed=4)).any()


def test_a_long_stay_takes_no_more_memory_than_a_short_one() -> None:
    """Ten thousand hours of two million requests an hour are drawn as they are asked for."""
    times = mmpp(np.random.default_rng(1), (500.0, 500.0), (3.6e7, 3.6e7))
    tracemalloc.start()
    first = list(islice(times, 10_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first[-1] == pytest.approx(20.0, rel=0.1)
    assert peak < 10_000_000


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_vary_as_much_as_asked_for(cv: float) -> None:
    """A renewal process has the coefficient of variation that it was given."""
    gaps = np.diff(list(islice(gamma(np.random.default_rng(1), 50.0, cv), 100_000)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_two_states_are_burstier_than_one() -> None:
    """Counts of a modulated process vary more than a Poisson process's, whose index is 1."""

    def dispersion(name: str) -> float:
        times = some(name)
        counts = np.histogram(times, bins=np.arange(0.0, times[-1], 1.0))[0]
        return float(counts.var() / counts.mean())

    assert dispersion("poisson") == pytest.approx(1.0, abs=0.1)
    assert dispersion("mmpp") > 10


def test_a_day_has_its_peak_after_a_quarter() -> None:
    """The rate follows the sinusoid: 1.8 times the mean at its peak, 0.2 at its trough."""
    phases = some("diurnal") % 10.0
    counts = np.histogram(phases, bins=20, range=(0.0, 10.0))[0] / len(phases) * 20
    assert counts[4:6].mean() == pytest.approx(1.8, rel=0.05)
    assert counts[14:16].mean() == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5), st.integers(0, 1000))
def test_models_come_in_their_shares(weights: list[float], seed: int) -> None:
    """Only the ratios of a mix count."""
    rng = np.random.default_rng(seed)
    mix = {f"m{number}": weight for number, weight in enumerate(weights)}
    found = Counter(one.model for one in islice(requests(rng, poisson(rng, 1.0), mix), 4096))
    for name, weight in mix.items():
        assert found[name] / 4096 == pytest.approx(weight / sum(weights), abs=0.04)


def test_requests_end_in_time_and_have_their_limits() -> None:
    """Nothing comes later than asked for; limits are of the model."""
    rng = np.random.default_rng(0)
    limits = {"a": 0.5}
    found = list(requests(rng, poisson(rng, 9.0), {"a": 1, "b": 1}, until_s=20.0, limits_s=limits))
    assert found[-1].at_s <= 20.0
    assert all(one.limit_s == limits.get(one.model) for one in found)


@given(st.lists(st.lists(st.floats(0.0, 5.0)), max_size=4))
def test_merged_streams_are_in_order_and_ties_are_settled(streams: list[list[float]]) -> None:
    """Merging loses nothing; at one time the first stream goes first."""
    made = [[Arrival(t, f"m{n}") for t in sorted(times)] for n, times in enumerate(streams)]
    found = list(merge(*made))
    assert found == sorted((one for stream in made for one in stream), key=lambda one: one[:2])


def test_a_recording_is_read_lazily(tmp_path: Path) -> None:
    """What is left out of a line has its default."""
    path = tmp_path / "load.jsonl"
    path.write_text('{"at_s": 0.5, "model": "a"}\n{"at_s": 1, "model": "b", "rows": 3}\nrubbish')
    found = recorded(path)
    assert next(found) == Arrival(0.5, "a")
    assert next(found) == Arrival(1.0, "b", 3)
    with pytest.raises(UsageError, match="line 3: expected an arrival"):
        next(found)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"at_s": 1, "model": "a"}\n{"at_s": 0.5, "model": "a"}\n', "line 2: 0.5 s is before"),
        ('{"at_s": 1, "model": "a", "rows": 0}\n', "1 row or more"),
        ('{"at_s": 1, "modle": "a"}\n', "modle"),
    ],
)
def test_a_bad_recording_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """The line is named, and what is wrong with it."""
    path = tmp_path / "load.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=why):
        list(recorded(path))
    with pytest.raises(UsageError, match="can't read"):
        list(recorded(tmp_path / "none"))
