"""Load on a server: closed loops that saturate it, and open loops with arrivals of their own.

Latency counts from when a request was to arrive, not from when there was time to send it
("coordinated omission": Tene, How NOT to Measure Latency, 2013).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lasagna.errors import OverloadedError

Infer = Callable[[str], Awaitable[None]]
"""Answers one request for a model."""
DRAIN_S: Final = 60.0
BURST_S: Final = 0.003
"""Answers less than this apart are of one batch."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a load.

    Attributes:
        seconds: that it lasted, from the first arrival to the last answer that counts.
        latencies_s: of answered requests, by model, in order of their answers.
        refused: requests that were.
    """

    seconds: float
    latencies_s: Mapping[str, Sequence[float]]
    refused: int

    @property
    def answered(self) -> int:
        """Requests."""
        return sum(map(len, self.latencies_s.values()))

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

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
            if loop.time() - done[warm][0] >= seconds:
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
    first, last = _window([at_s for at_s, *_ in done], warm)
    latencies: dict[str, list[float]] = {}
    for _, model, latency_s in done[first + 1 : last + 1]:
        latencies.setdefault(model, []).append(latency_s)
    return Outcome(done[last][0] - done[first][0], latencies, 0)


def _window(times_s: Sequence[float], warm: int) -> tuple[int, int]:
    """First and last answer to measure between: both the last of their batch.

    Answers come in batches. A window that begins in the middle of one would count some of it and
    none of the time that it took.
    """
    gaps = np.diff(times_s)
    ends = [index for index in np.flatnonzero(gaps > BURST_S).tolist() if index >= warm]
    return (ends[0], ends[-1]) if len(ends) > 1 else (warm, len(times_s) - 1)


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
    return Outcome(last_s - start_s, latencies, refused)
