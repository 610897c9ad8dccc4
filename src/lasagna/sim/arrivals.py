"""Load: when requests come, and for which model. Every generator is fed with a numpy Generator.

Times are seconds since the beginning, in order and without end, drawn in blocks. ``requests`` makes
arrivals of them; ``merge`` mixes several streams of these.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from lasagna.errors import UsageError

_BLOCK: Final = 4096


class Arrival(NamedTuple):
    """A request that comes in.

    Attributes:
        at_s: when.
        model: that it wants.
        rows: at least 1.
        limit_s: seconds after which its answer is worth nothing any more; None for never.
        tenant: whose it is.
        priority: requests of a higher one go first.
    """

    at_s: float
    model: str
    rows: int = 1
    limit_s: float | None = None
    tenant: str = ""
    priority: int = 0


def draws(rng: np.random.Generator) -> Iterator[float]:
    """Numbers from 0 to 1, without an end."""
    while True:
        yield from rng.random(_BLOCK).tolist()


def poisson(rng: np.random.Generator, rate: float) -> Iterator[float]:
    """A Poisson process of so many a second."""
    return gamma(rng, rate, 1.0)


def gamma(rng: np.random.Generator, rate: float, cv: float) -> Iterator[float]:
    """Renewals with gamma-distributed gaps.

    Args:
        rng: draws them.
        rate: a second.
        cv: standard deviation of the gaps over their mean; 1 is a Poisson process, more is bursty.
    """
    shape, at_s = 1.0 / (cv * cv), 0.0
    while True:
        times = at_s + np.cumsum(rng.gamma(shape, 1.0 / (shape * rate), _BLOCK))
        at_s = float(times[-1])
        yield from times.tolist()


def mmpp(
    rng: np.random.Generator, rates: tuple[float, float], stays_s: tuple[float, float]
) -> Iterator[float]:
    """A Poisson process whose rate changes between two states (Markov-modulated).

    Args:
        rng: draws the times.
        rates: a second, in each state; it begins in the first.
        stays_s: mean seconds in each state.
    """
    begin_s, state = 0.0, 0
    while True:
        stay_s = float(rng.exponential(stays_s[state]))
        at_s, end_s = begin_s, begin_s + stay_s
        while at_s < end_s:
            times = at_s + np.cumsum(rng.exponential(1.0 / rates[state], _BLOCK))
            at_s = float(times[-1])
            yield from times[times < end_s].tolist()
        begin_s, state = end_s, 1 - state


def diurnal(
    rng: np.random.Generator, rate: float, swing: float, period_s: float
) -> Iterator[float]:
    """A Poisson process whose rate goes up and down as a sinusoid, by thinning.

    Args:
        rng: draws the times.
        rate: mean a second.
        swing: share of the mean by which the rate rises and falls, up to 1.
        period_s: from peak to peak; the first one is after a quarter of it.
    """
    assert 0.0 <= swing <= 1.0
    at_s, peak = 0.0, rate * (1.0 + swing)
    while True:
        times = at_s + np.cumsum(rng.exponential(1.0 / peak, _BLOCK))
        at_s = float(times[-1])
        rates = rate * (1.0 + swing * np.sin(2.0 * math.pi * times / period_s))
        yield from times[rng.random(_BLOCK) * peak < rates].tolist()


def requests(
    rng: np.random.Generator,
    times: Iterable[float],
    mix: Mapping[str, float],
    *,
    until_s: float = math.inf,
    limits_s: Mapping[str, float] | None = None,
    rows: int = 1,
    tenant: str = "",
) -> Iterator[Arrival]:
    """Requests at these times.

    Args:
        rng: draws models, as many at once as make a block, so it must not be another's as well.
        times: in order.
        mix: share of each model; only ratios count.
        until_s: the first one that is later ends it.
        limits_s: of the answers to each model.
        rows: of each.
        tenant: whose they are.
    """
    names, limits = tuple(mix), limits_s or {}
    models = _drawn(rng, mix) if len(names) > 1 else repeat(names[0])
    for at_s, model in zip(times, models, strict=False):
        if at_s > until_s:
            return
        yield Arrival(at_s, model, rows, limits.get(model), tenant)


def _drawn(rng: np.random.Generator, mix: Mapping[str, float]) -> Iterator[str]:
    names = tuple(mix)
    shares = np.array([mix[name] for name in names])
    bounds = np.cumsum(shares / shares.sum())[:-1]
    while True:
        for index in np.searchsorted(bounds, rng.random(_BLOCK), side="right").tolist():
            yield names[index]


def merge(*streams: Iterable[Arrival]) -> Iterator[Arrival]:
    """All in order of time; where times are alike, in order of the streams."""
    return heapq.merge(*streams, key=lambda one: one.at_s)


def recorded(path: Path) -> Iterator[Arrival]:
    """Arrivals from a file of JSON lines with Arrival's attributes; only at_s and model must be.

    Raises:
        UsageError: it can't be read, or a line is not an arrival or before the one before it.
    """
    before_s = 0.0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found = _read(path, number, line)
                if found.at_s < before_s:
                    raise UsageError(
                        f"{path}, line {number}: {found.at_s} s is before {before_s} s"
                    )
                before_s = found.at_s
                yield found
    except OSError as error:
        raise UsageError(f"can't read arrivals from {path}: {error.strerror}") from None


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at_s: float
    model: str
    rows: int = 1
    limit_s: float | None = None
    tenant: str = ""
    priority: int = 0


def _read(path: Path, number: int, line: bytes) -> Arrival:
    try:
        one = msgspec.json.decode(line, type=_Line)
    except ValueError as error:  # msgspec's errors, and UnicodeDecodeError
        raise UsageError(f"{path}, line {number}: expected an arrival: {error}") from None
    if one.rows < 1:
        raise UsageError(f"{path}, line {number}: a request has 1 row or more, not {one.rows}")
    return Arrival(one.at_s, one.model, one.rows, one.limit_s, one.tenant, one.priority)
