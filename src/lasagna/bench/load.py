"""Load on a server: closed loops that saturate it, and open loops with arrivals of their own.

Latency counts from when a request was to arrive, not from when there was time to send it
("coordinated omission": Tene, How NOT to Measure Latency, 2013).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import OverloadedError

Infer = Callable[[str], Awaitable[None]]
"""Answers one request for a model."""
DRAIN_S: Final = 60.0
BURST_S: Final = 0.004
"""Answers less than this apart are of one batch."""
STEPS: Final = 6
"""Batches of answers to measure at least, if that takes no longer than MOST_S."""
MOST_S: Final = 30.0
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a load.

    Attributes:
        seconds: that it lasted, from the first arrival to the last answer that counts.
        latencies_s: of answered requests, by model, in order of their answers.
        refused: requests that were.
        throughput: answers a second.
    """

    seconds: float
    latencies_s: Mapping[str, Sequence[float]]
    refused: int
    throughput: float

    @property
    def answered(self) -> int:
        """Requests."""
        return sum(map(len, self.latencies_s.values()))

    def percentile_s(self, share: float) -> float:
        """Latency over all models; NaN without answers."""
        every = list(itertools.chain.from_iterable(self.latencies_s.values()))
        return float(np.quantile(every, share)) if every else float("nan")

    def within(self, limits_s: Mapping[str, float]) -> float:
        """Answers a second that came within a limit."""
        good = sum(
            latency <= limits_s[name]
            for name, found in self.latencies_s.items()
            for latency in found
        )
        return good / self.seconds


def poisson(
    mix: Mapping[str, float], rate: float, seconds: float, seed: int
) -> list[tuple[float, str]]:
    """Arrivals: when, and for which model.

    Args:
        mix: share of each model.
        rate: a second, in all.
        seconds: until there are no more.
        seed: the same seed gives the same arrivals.
    """
    rng = np.random.default_rng(seed)
    names, total = list(mix), sum(mix.values())
    found, at = [], float(rng.exponential(1 / rate))
    while at < seconds:
        found.append((at, names[int(rng.choice(len(names), p=[mix[n] / total for n in names]))]))
        at += float(rng.exponential(1 / rate))
    return found


def sequence(mix: Mapping[str, float], count: int, seed: int) -> list[str]:
    """Models of so many requests, in the mix's shares."""
    rng = np.random.default_rng(seed)
    names, total = list(mix), sum(mix.values())
    return [names[i] for i in rng.choice(len(names), count, p=[mix[n] / total for n in names])]


async def saturate(
    infer: Infer, models: Sequence[str], outstanding: int, seconds: float, at_least: int = 1
) -> Outcome:
    """Keep so many requests waiting; answers count from a first full turn on.

    Args:
        infer: answers one.
        models: of the requests, over and over.
        outstanding: requests at any time.
        seconds: to measure.
        at_least: answers to wait for, should that take longer.
    """
    loop = asyncio.get_running_loop()
    following = itertools.cycle(models)
    done: list[tuple[float, str, float]] = []
    warm = outstanding
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            model = next(following)
            begin_s = loop.time()
            await infer(model)
            done.append((loop.time(), model, loop.time() - begin_s))
            if len(done) < warm + at_least + 1:
                continue
            lasted_s = loop.time() - done[warm][0]
            if lasted_s < seconds:
                continue
            if lasted_s > MOST_S or len(steps([at_s for at_s, *_ in done[warm:]])[0]) > STEPS:
                stop.set()

    tasks = [asyncio.create_task(client()) for _ in range(outstanding)]
    watch = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([watch, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        watch.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
    counted = done[warm:]
    latencies: dict[str, list[float]] = {}
    for _, model, latency_s in counted:
        latencies.setdefault(model, []).append(latency_s)
    times_s = [at_s for at_s, *_ in counted]
    return Outcome(times_s[-1] - times_s[0], latencies, 0, rate_of(times_s))


def rate_of(times_s: Sequence[float]) -> float:
    """Answers a second, from the times at which they came.

    They come in batches, of several threads out of step. From the end of one batch to the end of
    another it is a matter of luck how many others lie between: with two threads and four batches
    each, up to 12 % too many. So a line is fitted through the middles of all steps of their count:
    exact for one thread, and off by 6 % at most for two with five batches each.

    Returns:
        NaN for a single batch.
    """
    at_s, counts = steps(times_s)
    if len(at_s) < 2:
        return float("nan")
    middles = np.cumsum(counts) - counts / 2
    return float(np.polyfit(at_s, middles, 1)[0])


def steps(times_s: Sequence[float]) -> tuple[Array, Array]:
    """When batches of answers came, and how many answers each had."""
    times = np.asarray(times_s)
    if not len(times):
        return times, times
    ends = np.append(np.flatnonzero(np.diff(times) > BURST_S), len(times) - 1)
    return times[ends], np.diff(np.append(-1, ends)).astype(float)


async def play(infer: Infer, arrivals: Sequence[tuple[float, str]]) -> Outcome:
    """Send requests when they arrive, whether others are answered or not."""
    loop = asyncio.get_running_loop()
    start_s = loop.time() + 0.01
    latencies: dict[str, list[float]] = {}
    refused = 0
    last_s = start_s

    async def one(at_s: float, model: str) -> None:
        nonlocal refused, last_s
        try:
            await infer(model)
        except OverloadedError:
            refused += 1
        else:
            latencies.setdefault(model, []).append(loop.time() - at_s)
        last_s = max(last_s, loop.time())

    tasks = []
    for at_s, model in arrivals:
        pause_s = start_s + at_s - loop.time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        tasks.append(asyncio.create_task(one(start_s + at_s, model)))
    async with asyncio.timeout(DRAIN_S):
        await asyncio.gather(*tasks)
    seconds = last_s - start_s
    answered = sum(map(len, latencies.values()))
    return Outcome(seconds, latencies, refused, answered / seconds)
