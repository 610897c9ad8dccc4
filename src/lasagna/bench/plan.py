"""How good placements are: against exact ones on small clusters, against bounds on large ones.

Small: random models and servers, each planned by the fast way and by the integer program with all
columns and no limit of time. Large: 64 servers of four kinds, and measured costs of real models
(``examples/costs``), each under several names with a demand of its own, 1,000 slices together;
against the linear program that no choice of columns exceeds.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from lasagna.bench.report import Bar, Result
from lasagna.cli.costs_file import read_costs
from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Server
from lasagna.policy.costs import Forms, ModelCosts, SliceCosts
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.stages import Machine

MB: Final = 1_000_000
SMALL: Final = 500
SMALL_QUICK: Final = 40
LARGE: Final = 5
LARGE_SERVERS: Final = 64
LARGE_SLICES: Final = 1000
COSTS: Final = sorted((Path(__file__).resolve().parents[3] / "examples/costs").glob("*.json"))
LIMIT_S: Final = 10.0
SEED: Final = 20_261_125


FAST: Final = PlanOptions(time_limit_s=5.0, settled=False)
"""In the time that ``lasagna plan`` takes if not told otherwise; by what columns promise, as the
exact way is."""


def random_model(rng: np.random.Generator, slices: int, largest: int) -> ModelCosts:
    """Activations that shrink and weights that grow along the chain, as in convolutional networks.

    Args:
        rng: to draw from.
        slices: how many.
        largest: bytes of weights of a slice, at most.
    """
    depth = np.linspace(0.05, 1.0, slices)
    weights = rng.uniform(0.1, 1.0, slices) * depth * largest
    rows = rng.uniform(0.2, 1.0, slices + 1) * np.linspace(1.0, 0.05, slices + 1) * 4 * MB
    seconds = rng.lognormal(-5.5, 0.6, slices)
    gains = rng.uniform(0.6, 1.0, slices)  # of a batch's row, against a single one
    cuts = tuple(int(size) for size in rows)
    return ModelCosts(
        tuple(
            SliceCosts(
                int(weight),
                tuple(float(s * b * (g + (1 - g) / b)) for b in (1, 2, 4, 8)),
                tuple(int(size * b / 4) for b in (1, 2, 4, 8)),
            )
            for weight, s, g, size in zip(weights, seconds, gains, rows, strict=False)
        ),
        cuts,
        tuple(before + after for before, after in pairwise(cuts)),
        32,
    )


def random_cluster(
    rng: np.random.Generator, servers: int, kinds: int, models: dict[str, ModelCosts]
) -> Cluster:
    """Servers of so many kinds, with EPC from 32 to 256 MB, speed 0.5 to 2, 10 to 1,000 Mbit/s."""
    made = [
        Server(
            "",
            Machine(int(rng.choice((32, 64, 94, 128, 256))) * MB, threads, threads, 3e9, 0.0003),
            float(rng.choice((0.5, 1.0, 2.0))),
            float(rng.choice((10, 100, 1000))) * 125_000,
            0.0002,
        )
        for threads in (int(rng.integers(1, 3)) for _ in range(kinds))
    ]
    return Cluster(
        tuple(replace(made[n % kinds], name=f"s{n}") for n in range(servers)),
        {name: (costs,) for name, costs in models.items()},
        {name: float(rng.uniform(0.5, 5.0)) for name in models},
    )


def _small(rng: np.random.Generator) -> Cluster:
    models = {
        f"m{n}": random_model(rng, int(rng.integers(2, 6)), int(rng.integers(5, 40)) * MB)
        for n in range(int(rng.integers(1, 3)))
    }
    servers = int(rng.integers(2, 5))
    return random_cluster(rng, servers, int(rng.integers(1, servers + 1)), models)


def _large(rng: np.random.Generator) -> Cluster:
    """Servers with an EPC of 64 to 512 MB, speed 0.5 to 2, links of 100 to 1,000 Mbit/s."""
    models: dict[str, Forms] = {}
    while sum(len(forms[0].slices) for forms in models.values()) < LARGE_SLICES:
        name, forms = read_costs(COSTS[len(models) % len(COSTS)])
        models[f"{name}-{len(models)}"] = forms
    kinds = [
        Server(
            "",
            Machine(int(rng.choice((64, 94, 128, 256, 512))) * MB, 2, 2, 3e9, 0.0003),
            float(rng.choice((0.5, 1.0, 2.0))),
            float(rng.choice((100, 1000))) * 125_000,
        )
        for _ in range(4)
    ]
    demand = {
        name: float(rng.uniform(0.5, 2.0)) / forms[0].compute_at(0, len(forms[0].slices), 1)
        for name, forms in models.items()
    }
    return Cluster(
        tuple(replace(kinds[n % 4], name=f"s{n}") for n in range(LARGE_SERVERS)), models, demand
    )


def run(*, quick: bool) -> Result:
    """Plan all of them."""
    rng = np.random.default_rng(SEED)
    shares: list[float] = []
    refused = 0
    wanted = SMALL_QUICK if quick else SMALL
    for _ in track(range(wanted), description="small clusters"):
        cluster = _small(rng)
        try:
            best = plan_cluster(cluster, PlanOptions(exact=True))
        except BudgetError:
            refused += 1  # the fast way must refuse it too
            try:
                plan_cluster(cluster, FAST, clock=time.monotonic)
            except BudgetError:
                continue
            shares.append(float("inf"))
            continue
        fast = plan_cluster(cluster, FAST, clock=time.monotonic)
        shares.append(fast.scale / best.scale)
    gaps, seconds = [], []
    for _ in track(range(1 if quick else LARGE), description="large clusters"):
        cluster = _large(rng)
        begin = time.perf_counter()
        placement = plan_cluster(
            cluster, PlanOptions(time_limit_s=LIMIT_S - 2, settled=False), clock=time.monotonic
        )
        seconds.append(time.perf_counter() - begin)
        gaps.append(placement.gap)
    short = [1 - share for share in shares]
    return Result(
        samples={
            "fast over exact": shares,
            "gap to the bound, large": gaps,
            "seconds, large": seconds,
        },
        bars=[
            Bar("small: short of the optimum, median", float(np.median(short)), 0.02, "", False),
            Bar("small: short of the optimum, worst", max(short), 0.08, "", False),
            Bar("large: gap to the bound, worst", max(gaps), 0.15, "", False),
            Bar("large: 1,000 slices on 64 servers", max(seconds), LIMIT_S, "s", False),
        ],
        extra={
            "small clusters": wanted,
            "of which no plan exists": refused,
            "seed": SEED,
            "bound": "linear program: each server has its memory for every part in turn",
        },
        figure=_figure(shares, gaps),
    )


def _figure(shares: list[float], gaps: list[float]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.sort(shares), np.arange(1, len(shares) + 1) / len(shares), color="#2a6f97")
    left.axvline(0.98, color="#bc4b51", linestyle=":", label="bar for the median")
    left.axvline(0.92, color="#bc4b51", linestyle="--", label="bar for the worst")
    left.set_xlabel("throughput of the fast plan / of the exact one")
    left.set_ylabel("share of small clusters")
    left.legend()
    right.bar(range(len(gaps)), [100 * gap for gap in gaps], color="#2a6f97")
    right.axhline(15, color="#bc4b51", linestyle=":", label="the bar")
    right.set_xticks(range(len(gaps)))
    right.set_xlabel("large cluster (64 servers, 1,000 slices)")
    right.set_ylabel("gap to the bound, %")
    right.legend()
    return figure
