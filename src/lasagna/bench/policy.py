"""How many tasks a second the local scheduler decides, on one core.

A task is one slice of one row. The scheduler is kept saturated with requests for as many models as
named, and every run ends at once: all the time is the policy's own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from lasagna.bench.report import Bar, Result
from lasagna.policy.costs import ModelCosts, SliceCosts
from lasagna.policy.events import (
    Answer,
    Arrange,
    Arranged,
    Arrived,
    EnclaveReady,
    Event,
    ModelAdded,
    Plan,
    Planned,
    Ran,
    Run,
)
from lasagna.policy.memory import divide
from lasagna.policy.scheduler import Scheduler
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings

LIMIT: Final = 100_000.0
MODELS: Final = (1, 4, 16)
WAITING: Final = 128
SLICES: Final = 30
MB: Final = 1_000_000


def _model() -> ModelCosts:
    """Thirty slices: much memory a row at first, many weights at the end."""
    early = SLICES // 3
    weights = [MB // 2] * early + [8 * MB] * (SLICES - early)
    row_bytes = [4 * MB] * early + [100_000] * (SLICES - early)
    slices = tuple(
        SliceCosts(size, (0.001, 0.002, 0.004, 0.008), (10_000, 20_000, 40_000, 80_000))
        for size in weights
    )
    cuts = (*row_bytes, 4000)
    return ModelCosts(slices, cuts, tuple(2 * size for size in row_bytes), 32)


def _tasks_a_second(models: int, seconds: float) -> float:
    scheduler = Scheduler(Machine(90 * MB, 2, 2, 3.4e9, 0.0002), Settings(queue_rows=10_000))
    names = [f"model {number}" for number in range(models)]
    runs: deque[Run] = deque()
    answered = sent = tasks = 0
    now_s = 0.0

    def tell(event: Event) -> None:
        nonlocal answered
        for command in scheduler.handle(event):
            if isinstance(command, Run):
                runs.append(command)
            elif isinstance(command, Answer):
                answered += 1
            elif isinstance(command, Plan):  # worked out elsewhere, so only once here
                present = command.present
                best = present or divide(command.models, command.demand, command.machines[0])
                tell(Planned(now_s, best, present))
            elif isinstance(command, Arrange):
                tell(Arranged(now_s))

    for name in names:
        tell(ModelAdded(now_s, name, (_model(),)))
    tell(EnclaveReady(now_s))
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        while sent - answered < WAITING:
            sent += 1
            tell(Arrived(now_s, sent, names[sent % models], tenant=str(sent % 5)))
        run = runs.popleft()
        now_s += 0.001
        tasks += (run.last - run.first) * sum(part.count for part in run.batch)
        tell(Ran(now_s, run.run, 0.001 * (run.last - run.first)))
    return tasks / (time.perf_counter() - begin)


def run(*, quick: bool) -> Result:
    """Measure with one model and with several."""
    rounds = 3 if quick else 15
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        for models in MODELS:
            samples.setdefault(f"{models} models", []).append(_tasks_a_second(models, 0.5))
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(medians), [value / 1000 for value in medians.values()], color="#2a6f97")
    axes.axhline(LIMIT / 1000, color="#bc4b51", linestyle=":", label="the bar")
    axes.set_ylabel("thousand tasks a second, one core")
    axes.set_title("What the local scheduler decides (a task: one slice of one row)")
    axes.legend()
    return Result(
        samples=samples,
        bars=[
            Bar(f"tasks decided, {name}", value, LIMIT, "a second")
            for name, value in medians.items()
        ],
        extra={"unit": "tasks a second", "slices": SLICES, "rows_waiting": WAITING},
        figure=figure,
    )
