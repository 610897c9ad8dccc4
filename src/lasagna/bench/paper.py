"""The paper's claim and beyond, simulated: clusters under load, Lasagna against every baseline.

Everything here is simulated from the measured profiles of real models (``examples/costs``); pages
that the kernel swaps are charged as published for ``sgx1-128``. Each cell is the same requests for
each policy. *Capacity* is what the plan promises; load is a share of it. Lasagna's plan for a cell
knows the expected load, and was chosen by simulations with other requests (``sim.judging``), with
the style in which its servers divide memory. Those that are Lasagna but for their routes have that
plan and that style; for each other policy the best style is chosen in the same way. The limit for
goodput is 3 times the unloaded latency of whole models.

The models are those of ``make bench-local``: six alone, and its three mixes (on 8 equal servers).

- **equal**: 4, 8 and 16 servers with ``sgx1-128``, load from 10 to 120 %.
- **unequal**: EPC of 64 to 512 MB, speed 0.5 to 2.
- **links**: 1 to 1,000 Mbit/s, where carrying activations costs more than it gains.
- **admission**: 120 % of the load, where what would be too late is refused.
- **single**: a lone request on 4 servers, against MEDIA.
- **media**: 120 % of the load, against MEDIA as described, and repeated on the servers left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from rich.progress import track

from lasagna.bench.local import SCENARIOS
from lasagna.bench.paper_cells import WHOLE, Case, Cell, bars_of, figure_of, rank
from lasagna.bench.report import Result
from lasagna.cli.costs_file import read_costs
from lasagna.cli.plan import silent_library
from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Server, sliced
from lasagna.policy.paging import HOT_BYTES
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import Objective, Style, style_for
from lasagna.policy.spread import whole_models
from lasagna.policy.stages import Machine
from lasagna.sim.arrivals import Arrival, poisson, requests
from lasagna.sim.candidates import STYLES, Candidate
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.judging import plan_judged
from lasagna.sim.metrics import Figures
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import BESIDE_BYTES, Prepared, cluster_policy, prepared, roomy
from lasagna.tee.epc_profiles import profile

COSTS: Final = Path(__file__).resolve().parents[3] / "examples/costs"
QUICK_MODELS: Final = ("alexnet", "inception_v2")
LOADS: Final = (0.1, 0.5, 0.9, 1.2)
SIZES: Final = (4, 8, 16)
MIXED: Final = (8,)
"""Servers for several models at once."""
LINKS: Final = (1, 10, 100, 1000)
MBIT: Final = 125_000.0
REQUESTS: Final = 1500
"""Of one cell, unless they are rare: enough for a mean within some percent."""
SPANS_S: Final = (3.0, 60.0)
"""Of virtual time, at least and at most: at least some batches of each server."""
FULL_S: Final = 10.0
"""At least in overload: what the largest batches hold at the end is little of it."""
MIXED_S: Final = 30.0
"""At least with several models: servers divide memory among them as they come to know the mix."""
WARM: Final = 0.3
PLAN_S: Final = 10.0
PLAN_EACH_S: Final = 5.0
"""Of planning; and for each further model, since dividing memory among them takes longer."""
DEADLINE: Final = 3.0
"""Times the unloaded latency of whole models, within which an answer counts for goodput."""
LONE_RATE: Final = 0.02
"""Requests a second of which none meets another."""
PAGED: Final = profile("sgx1-128").costs()
SEED: Final = 3


def machine(epc_bytes: int, threads: int = 2) -> Machine:
    """Of a server with so much EPC."""
    return Machine(epc_bytes - BESIDE_BYTES, threads, threads, 3e9, 0.0003)


def equal(count: int, link: float = 1000.0) -> tuple[Server, ...]:
    """Servers of one kind."""
    own = machine(PAGED.epc_bytes)
    return tuple(Server(f"s{n}", own, bandwidth=link * MBIT) for n in range(count))


def unequal(count: int) -> tuple[Server, ...]:
    """EPC of 64 to 512 MB, speed 0.5 to 2, in turn."""
    kinds = ((64, 1.0), (94, 2.0), (128, 0.5), (512, 1.0))
    return tuple(
        Server(f"s{n}", machine(kinds[n % 4][0] * 1_000_000), kinds[n % 4][1]) for n in range(count)
    )


def cases(*, quick: bool) -> Iterator[Case]:
    """All of them, or a few."""
    for model in QUICK_MODELS if quick else SCENARIOS:
        alone = len(SCENARIOS[model]) == 1
        for count in SIZES[:1] if quick else SIZES if alone else MIXED:
            for load in LOADS[1::2] if quick else LOADS:
                yield Case("equal", f"{count} servers", model, equal(count), load)
        if not alone:
            continue
        for load in (0.7, 1.2):
            yield Case("unequal", "8 unequal servers", model, unequal(8), load)
        for link in LINKS:
            few = WHOLE[:3]
            yield Case("links", f"{link} Mbit/s", model, equal(4, link), 0.7, few)
        yield Case("admission", "4 servers", model, equal(4), 1.2, WHOLE)
        for link in (10, 100):
            those = ("lasagna", "media", "media-repeated")
            yield Case("single", f"{link} Mbit/s", model, equal(4, link), 0.0, those[:2])
            yield Case("media", f"{link} Mbit/s", model, equal(4, link), 1.2, those)


def measure(case: Case) -> Cell:
    """Simulate a case, for each policy."""
    mix = SCENARIOS[case.model]
    models = dict(read_costs(COSTS / f"{name}.json") for name in mix)
    cluster = Cluster(
        case.servers, models, {name: share / sum(mix.values()) for name, share in mix.items()}
    )
    figures = {}
    planner = Planner()
    plan_s = PLAN_S + PLAN_EACH_S * (len(models) - 1)
    with silent_library():
        most = plan_cluster(cluster, PlanOptions("throughput", plan_s / 2), clock=time.monotonic)
        rate = case.load * most.throughput if case.load else LONE_RATE
        cluster = replace(
            cluster,
            demand={name: rate * share for name, share in cluster.demand.items()},
            limits_s=_limits_s(cluster, most),
        )
        admission = case.group == "admission"
        objective: Objective = "throughput" if case.load > 1.0 and not admission else "latency"
        judged = plan_judged(
            cluster if objective == "latency" else replace(cluster, limits_s={}),
            PlanOptions(objective, plan_s),
            clock=time.monotonic,
            seed=SEED + 1,
            planner=planner,
            run=Options(admission=admission),
        )
    chosen = judged.best
    for name in case.policies:
        try:
            ways = _ways(case, cluster, chosen, name)
            if len(ways) > 1:
                tried = [rank(case, _simulate(case, rate, one, planner, SEED + 1)) for one in ways]
                ways = [ways[tried.index(min(tried))]]
            figures[name] = _simulate(case, rate, ways[0], planner, SEED)
        except BudgetError:
            continue  # it can't serve these models with these servers
    plan = (
        f"{chosen.name}, servers divide memory for {chosen.aim}, routes by the rule {chosen.rule}"
    )
    return Cell(case, most.throughput, _exceeds(cluster), plan, figures)


def _limits_s(cluster: Cluster, plan: Placement) -> dict[str, float]:
    """From lone requests to whole models; as the plan has it where they fit no server."""
    try:
        placement = whole_models(cluster)
    except BudgetError:
        placement = plan
    virtual = VirtualCluster(cluster, placement, Options(settings=roomy(style_for("latency"))))
    lone = (
        Arrival((10 * number + n) / LONE_RATE, model)
        for number, model in enumerate(cluster.models)
        for n in range(1, 11)
    )
    figures = virtual.run(lone).figures()
    return {name: DEADLINE * figures[name].mean_s for name in cluster.models}


def _ways(case: Case, cluster: Cluster, chosen: Candidate, name: str) -> list[Prepared]:
    """In which a policy may be run, each with another style.

    Raises:
        BudgetError: it can't serve these models.
    """
    policy = cluster_policy(name)
    page_s = (PAGED.load_ns + PAGED.evict_ns) / 1e9
    styles = [chosen.style] if policy.placed == "plan" else list(STYLES.values())
    found: dict[Style, Prepared] = {}
    for style in styles:
        options = Options(
            rule=chosen.rule, settings=roomy(style), admission=case.group == "admission"
        )
        ready = prepared(policy, cluster, chosen.placement, options, page_s)
        found.setdefault(ready.options.settings.style, ready)
    return list(found.values())


def _simulate(case: Case, rate: float, ready: Prepared, planner: Planner, seed: int) -> Figures:
    least_s = MIXED_S if len(ready.cluster.wanted) > 1 else SPANS_S[0]
    if case.load > 1.0:
        least_s = FULL_S
    span_s = min(max(least_s, REQUESTS / rate), SPANS_S[1]) if case.load else 20 / rate
    load = requests(
        np.random.default_rng((seed, 2)),
        poisson(np.random.default_rng((seed, 1)), rate),
        {name: ready.cluster.demand[name] for name in ready.cluster.wanted},
        until_s=span_s,
        limits_s=dict(ready.cluster.limits_s),
    )
    virtual = VirtualCluster(
        ready.cluster, ready.placement, ready.options, seed=seed, planner=planner
    )
    until_s = span_s if case.load > 1.0 else 10 * span_s
    outcome = virtual.run(load, until_s=until_s)
    # Where more comes than is served, those that came late are not answered: all count.
    return outcome.requests.figures(since_s=0.0 if case.load > 1.0 else WARM * span_s)


def _exceeds(cluster: Cluster) -> bool:
    costs = [sliced(forms) for forms in cluster.models.values()]
    weights = sum(one.weight_bytes for one in costs)
    running = max(one.bytes_at(0, len(one.slices), 1) for one in costs)
    return weights + running > PAGED.epc_bytes - HOT_BYTES


def run(*, quick: bool) -> Result:
    """Simulate all of them, on two cores."""
    every = list(cases(quick=quick))
    cores = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        cells = list(track(pool.map(measure, every), total=len(every), description="simulating"))
    return Result(
        samples={
            f"{cell.case.group}, {cell.case.title}, {cell.case.model}, load {cell.case.load:g}: "
            f"{name}, {what}": [value]
            for cell in cells
            for name, figures in cell.figures.items()
            for what, value in (
                ("answers/s", figures.throughput),
                ("in time/s", figures.goodput),
                ("mean s", figures.mean_s),
                ("p99 s", figures.p99_s),
            )
        },
        bars=bars_of(cells),
        extra={
            "simulated": True,
            "profiles": "examples/costs",
            "paging": "as published for sgx1-128",
            "plans": {
                f"{cell.case.group}, {cell.case.title}, {cell.case.model}, "
                f"load {cell.case.load:g}": cell.plan
                for cell in cells
            },
            "capacity": {
                f"{cell.case.title}, {cell.case.model}": cell.capacity
                for cell in cells
                if cell.case.group == "equal"
            },
        },
        figure=figure_of(cells),
    )
