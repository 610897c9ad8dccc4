"""Compare candidates fairly on a machine that is not quiet.

Timing all of A and then all of B gives B whatever the machine did meanwhile: another tenant, a
clock that dropped, a cache that filled. So each *round* runs every candidate once, and the order
turns round from one round to the next. What slows a round slows all its candidates, and a ratio
taken within rounds cancels it. Medians and quartiles are reported, never means: one preempted
round must not decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lasagna.errors import UsageError

Samples: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the width of one candidate's samples, in seconds a call."""

    median_s: float
    q1_s: float
    q3_s: float
    minimum_s: float
    rounds: int

    @property
    def iqr_s(self) -> float:
        """The interquartile range: the middle half of the rounds lies within it."""
        return self.q3_s - self.q1_s


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two medians with the interval that a paired bootstrap gives it."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True, eq=False)
class Timings:
    """What `measure` returns.

    Attributes:
        seconds: for each candidate its seconds a call, one sample a round. Entry i of every
            candidate was taken in round i.
    """

    seconds: Mapping[str, Samples]

    def spread(self, name: str) -> Spread:
        """Median and quartiles of one candidate."""
        samples = self.seconds[name]
        q1, median, q3 = (float(value) for value in np.quantile(samples, [0.25, 0.5, 0.75]))
        return Spread(median, q1, q3, float(samples.min()), len(samples))

    def ratio(
        self,
        numerator: str,
        denominator: str,
        *,
        confidence: float = 0.95,
        resamples: int = 4000,
        seed: int = 0,
    ) -> Ratio:
        """How many times as long ``numerator`` takes as ``denominator``.

        Returns:
            The ratio of the two medians. Its interval is the percentile bootstrap over whole
            rounds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3), so
            a noisy round stays a pair. The same samples and seed give the same interval.

        Raises:
            UsageError: ``confidence`` is not between 0 and 1, or ``resamples`` is below 1.
        """
        if not 0 < confidence < 1 or resamples < 1:
            raise UsageError("confidence lies between 0 and 1, and at least one resample is needed")
        above, below = self.seconds[numerator], self.seconds[denominator]
        rounds = len(above)
        picks = np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))
        ratios = np.median(above[picks], axis=1) / np.median(below[picks], axis=1)
        tail = (1 - confidence) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        value = np.median(above) / np.median(below)
        return Ratio(float(value), float(low), float(high), confidence)


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
) -> Timings:
    """Time the candidates in interleaved rounds.

    Args:
        candidates: what to call, by name. Prepare everything else before: only the call is timed.
        rounds: samples of each candidate.
        warmup: rounds run first and thrown away.
        calls: calls in one sample. Raise it until a sample takes a millisecond or more.
        clock: seconds, monotonic. Tests pass their own.
        on_round: told the number of each finished round, from 1 on, for a progress bar.

    Raises:
        UsageError: there is no candidate, or a count is out of range.
    """
    if not candidates or rounds < 1 or warmup < 0 or calls < 1:
        raise UsageError("measure needs a candidate, a round and a call at least")
    forward = list(candidates)
    seconds: dict[str, Samples] = {name: np.empty(rounds) for name in forward}
    for number in range(-warmup, rounds):
        for name in _order(forward, number):
            elapsed = _time(candidates[name], calls, clock)
            if number >= 0:
                seconds[name][number] = elapsed / calls
        if number >= 0 and on_round is not None:
            on_round(number + 1)
    return Timings(seconds)


def _order(names: Sequence[str], number: int) -> Sequence[str]:
    """Forward in even rounds, backward in odd ones: over two rounds no place is better."""
    return names if number % 2 == 0 else names[::-1]


def _time(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return clock() - start
