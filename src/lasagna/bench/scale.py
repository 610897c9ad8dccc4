"""How fast clusters are simulated: tasks a second on one core, and microseconds a request.

A task is one slice of one row. Sixteen servers with an emulated-size EPC serve measured models
(``examples/costs``), each server one of them or all of them, at 80 % of what the placement without
a plan promises. Memory plans are worked out in a first run that is not counted: they are kept.
Counted are processor seconds of this process.

Then 10 million requests on 1,000 servers with 50 models, four whole ones on each: four cells of 250
servers, each with two balancers and a quarter of the requests, two at a time, as
docs/explanation/many-servers.md has it.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from lasagna.bench.report import Bar, Result
from lasagna.cli.costs_file import read_costs
from lasagna.cli.plan import silent_library
from lasagna.policy.cluster import Cluster, Part, Server, sliced
from lasagna.policy.costs import Forms
from lasagna.policy.placed import Placement
from lasagna.policy.spread import whole_models
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings
from lasagna.sim.arrivals import poisson, requests
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner

LIMIT: Final = 200_000.0
SERVERS: Final = 16
MODELS: Final = ("resnet50", "alexnet", "inception_v2", "minilm")
LOAD: Final = 0.8
CELLS: Final = 4
CORES: Final = 2
CELL_SERVERS: Final = 250
CELL_MODELS: Final = 50
BALANCERS: Final = 2
REPORT_S: Final = 0.5
MANY: Final = 10_000_000
MINUTES: Final = 20.0
MACHINE: Final = Machine(79_500_000, 2, 2, 3e9, 0.0003)
COSTS: Final = Path(__file__).resolve().parents[3] / "examples/costs"


def _models() -> dict[str, Forms]:
    return dict(read_costs(COSTS / f"{name}.json") for name in MODELS)


def _cluster(models: Mapping[str, Forms]) -> Cluster:
    servers = tuple(Server(f"s{number}", MACHINE) for number in range(SERVERS))
    return Cluster(servers, models, dict.fromkeys(models, 1.0))


def _apart(placement: Placement) -> Placement:
    """Each server with one of the models, in turn."""
    parts = {
        part: costs
        for part, costs in placement.parts.items()
        if part.model == MODELS[int(part.server[1:]) % len(MODELS)]
    }
    return replace(placement, parts=parts)


def _measure(cluster: Cluster, placement: Placement, planner: Planner, count: int) -> np.ndarray:
    """Tasks a second, and seconds a request."""
    rng = np.random.default_rng(1)
    load = itertools.islice(
        requests(rng, poisson(rng, LOAD * placement.throughput), dict(cluster.demand)), count
    )
    options = Options(settings=Settings(queue_rows=10**6))
    begin = time.process_time()
    outcome = VirtualCluster(cluster, placement, options, seed=1, planner=planner).run(load)
    took_s = time.process_time() - begin
    figures = outcome.requests.figures()
    assert figures.answered == count
    tasks = sum(
        outcome.requests.figures(name).answered * len(sliced(forms).slices)
        for name, forms in cluster.models.items()
    )
    return np.array([tasks / took_s, took_s / count])


def _cell(number: int, servers: int, count: int) -> tuple[float, int, float]:
    """One cell's share of many requests.

    Args:
        number: of the cell, its seed.
        servers: in it.
        count: of requests.

    Returns:
        Seconds of this process, answered requests, their median latency.
    """
    gc.disable()  # nothing here is in cycles, and going through it all takes a tenth of the time
    begin = time.process_time()
    known = _models()
    with silent_library():
        every = whole_models(_cluster(known))
    names = [f"{MODELS[n % len(MODELS)]}-{n}" for n in range(CELL_MODELS)]
    models = {name: known[name.split("-")[0]] for name in names}
    those = tuple(Server(f"s{n}", MACHINE) for n in range(servers))
    cluster = Cluster(those, models, dict.fromkeys(models, 1.0))
    each = every.throughput / SERVERS
    parts = {}
    for n, server in enumerate(those):
        for k in range(len(MODELS)):
            name = names[(len(MODELS) * n + k) % CELL_MODELS]
            part = Part(name.split("-")[0], 0, len(sliced(models[name]).slices), "s0")
            costs = replace(every.parts[part], rate=each / len(MODELS))
            parts[Part(name, part.first, part.last, server.name)] = costs
    placement = replace(every, parts=parts, throughput=each * servers)
    rng = np.random.default_rng(number)
    load = itertools.islice(
        requests(rng, poisson(rng, LOAD * placement.throughput), dict(cluster.demand)), count
    )
    settings = Settings(queue_rows=10**6, stories=0)
    options = Options(settings=settings, balancers=BALANCERS, report_s=REPORT_S)
    outcome = VirtualCluster(cluster, placement, options, seed=number).run(load)
    figures = outcome.requests.figures()
    return time.process_time() - begin, figures.answered, figures.p50_s


def _many(*, quick: bool) -> tuple[float, int, list[float]]:
    """Minutes for all cells on two cores, requests answered, median latencies."""
    servers, count = (50, 10_000) if quick else (CELL_SERVERS, MANY // CELLS)
    begin = time.perf_counter()
    fresh = get_context("spawn")  # a fork would inherit the solver's locks, but not its threads
    with ProcessPoolExecutor(CORES, mp_context=fresh) as pool:
        done = list(pool.map(_cell, range(CELLS), [servers] * CELLS, [count] * CELLS))
    minutes = (time.perf_counter() - begin) / 60
    return minutes, sum(answered for _, answered, _ in done), [p50_s for *_, p50_s in done]


def run(*, quick: bool) -> Result:
    """Simulate both placements, in rounds."""
    cluster = _cluster(_models())
    with silent_library():
        every = whole_models(cluster)
    cases = {"one model a server": _apart(every), "four models a server": every}
    count = 5_000 if quick else 30_000
    planner = Planner()
    samples: dict[str, list[float]] = {}
    for placement in cases.values():
        _measure(cluster, placement, planner, count)
    for _ in range(3 if quick else 7):
        for name, placement in cases.items():
            tasks, seconds = _measure(cluster, placement, planner, count)
            samples.setdefault(f"tasks a second, {name}", []).append(tasks)
            samples.setdefault(f"us a request, {name}", []).append(1e6 * seconds)
    minutes, answered, medians = _many(quick=quick)
    samples["minutes for many requests"] = [minutes]
    samples["median latency of a cell, s"] = medians
    rates = {name: float(np.median(samples[f"tasks a second, {name}"])) for name in cases}
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(rates), [rate / 1000 for rate in rates.values()], color="#2a6f97")
    axes.axhline(LIMIT / 1000, color="#bc4b51", linestyle=":", label="the bar")
    axes.set_ylabel("thousand tasks a second, one core")
    axes.set_title("What is simulated (a task: one slice of one row)")
    axes.legend()
    return Result(
        samples=samples,
        bars=[
            *(Bar(f"tasks simulated, {name}", rate, LIMIT, "/s") for name, rate in rates.items()),
            Bar(f"{answered:,} requests on two cores", minutes, MINUTES, "min", False),
        ],
        extra={"servers": SERVERS, "models": list(MODELS), "requests": count, "load": LOAD},
        figure=figure,
    )
