"""The paper's claim and beyond, simulated: clusters under load, Lasagna against every baseline.

Everything here is simulated from the measured profiles of real models (``examples/costs``); pages
that the kernel swaps are charged as published for ``sgx1-128``. Each cell is the same requests for
each policy. *Capacity* is what the plan promises; load is a share of it. Lasagna's plan for a cell
knows the expected load, and was chosen by simulations with other requests (``sim.judging``). In a
cell all policies' servers work in the style that was chosen there. The limit for goodput is 3 times
the unloaded latency of whole models.

- **equal**: 4, 8 and 16 servers with ``sgx1-128``, each model alone, load from 10 to 120 %.
- **unequal**: EPC of 64 to 512 MB, speed 0.5 to 2.
- **links**: 1 to 1,000 Mbit/s, where carrying activations costs more than it gains.
- **admission**: 120 % of the load, where what would be too late is refused.
- **single**: a lone request on 4 servers, against MEDIA.
- **media**: 120 % of the load, against MEDIA as described, and repeated on the servers left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from lasagna.bench.report import Bar, Result
from lasagna.cli.costs_file import read_costs
from lasagna.cli.plan import silent_library
from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Server, sliced
from lasagna.policy.costs import Forms
from lasagna.policy.paging import HOT_BYTES
from lasagna.policy.placed import Placement
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import Objective, style_for
from lasagna.policy.spread import whole_models
from lasagna.policy.stages import Machine
from lasagna.sim.arrivals import Arrival, poisson, requests
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.judging import Candidate, plan_judged
from lasagna.sim.metrics import Figures
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import BESIDE_BYTES, cluster_policy, prepared, roomy
from lasagna.tee.epc_profiles import profile

COSTS: Final = Path(__file__).resolve().parents[3] / "examples/costs"
MODELS: Final = ("alexnet", "densenet121", "inception_v2", "minilm", "resnet50", "vgg19")
QUICK_MODELS: Final = ("alexnet", "inception_v2")
POLICIES: Final = (
    "lasagna",
    "local-only",
    "global-only",
    "whole-model",
    "on-demand",
    "vanilla",
    "media",
    "media-repeated",
    "round-robin",
    "random",
    "least-outstanding",
    "power-of-two",
)
PARTLY: Final = (
    "local-only",
    "global-only",
    "round-robin",
    "random",
    "least-outstanding",
    "power-of-two",
)
"""Lasagna with one thing done otherwise: the placement, the servers or the routes."""
WHOLE: Final = ("lasagna", "whole-model", "on-demand", "vanilla")
LOADS: Final = (0.1, 0.5, 0.9, 1.2)
SIZES: Final = (4, 8, 16)
LINKS: Final = (1, 10, 100, 1000)
MBIT: Final = 125_000.0
REQUESTS: Final = 1500
"""Of one cell, at most: enough for a mean within some percent."""
SPANS_S: Final = (3.0, 30.0)
"""Of virtual time, at least and at most: at least some batches of each server."""
WARM: Final = 0.3
PLAN_S: Final = 10.0
DEADLINE: Final = 3.0
"""Times the unloaded latency of whole models, within which an answer counts for goodput."""
COLOURS: Final = ("#2a6f97", *(f"C{n}" for n in range(1, 10)), "#c9ada7", "#344e41")
BRANCHING: Final = ("densenet121", "inception_v2", "minilm", "resnet50")
LONE_RATE: Final = 0.02
"""Requests a second of which none meets another."""
PAGED: Final = profile("sgx1-128").costs()
SEED: Final = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster with a load, for one policy.

    Attributes:
        group: of the cases above.
        title: of the cluster.
        model: that is served.
        servers: of the cluster.
        load: as a share of capacity; 0 for a lone request.
        policies: to compare.
    """

    group: str
    title: str
    model: str
    servers: tuple[Server, ...]
    load: float
    policies: tuple[str, ...] = POLICIES


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of a case.

    Attributes:
        case: it.
        capacity: requests a second that the plan promises.
        exceeds: whether the model's working set exceeds one server's EPC.
        plan: how Lasagna's came about.
        figures: of each policy that can be run there.
    """

    case: Case
    capacity: float
    exceeds: bool
    plan: str
    figures: dict[str, Figures]

    def ratio(self, over: str, what: str = "throughput") -> float:
        """Lasagna's throughput or goodput over another's, or another's mean latency over its."""
        own, other = self.figures["lasagna"], self.figures[over]
        if what == "latency":
            return other.mean_s / own.mean_s
        if what == "goodput":
            return own.goodput / other.goodput if other.goodput else float("inf")
        return own.throughput / other.throughput if other.answered else float("inf")


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
    models = QUICK_MODELS if quick else MODELS
    for model in models:
        for count in SIZES[:1] if quick else SIZES:
            for load in LOADS[1::2] if quick else LOADS:
                yield Case("equal", f"{count} servers", model, equal(count), load)
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
    _, forms = read_costs(COSTS / f"{case.model}.json")
    cluster = Cluster(case.servers, {case.model: forms}, {case.model: 1.0})
    figures = {}
    planner = Planner()
    with silent_library():
        most = plan_cluster(cluster, PlanOptions("throughput", PLAN_S / 2), clock=time.monotonic)
        rate = case.load * most.throughput if case.load else LONE_RATE
        cluster = replace(
            cluster,
            demand={case.model: rate},
            limits_s={case.model: DEADLINE * _unloaded_s(cluster, most)},
        )
        admission = case.group == "admission"
        objective: Objective = "throughput" if case.load > 1.0 and not admission else "latency"
        chosen = plan_judged(
            cluster if objective == "latency" else replace(cluster, limits_s={}),
            PlanOptions(objective, PLAN_S),
            clock=time.monotonic,
            seed=SEED + 1,
            planner=planner,
            admission=admission,
        ).best
    for name in case.policies:
        try:
            figures[name] = _simulate(case, rate, cluster, chosen, name, planner)
        except BudgetError:
            continue  # it can't serve this model with these servers
    plan = f"{chosen.name}, servers divide memory for {chosen.aim}"
    return Cell(case, most.throughput, _exceeds(forms), plan, figures)


def _unloaded_s(cluster: Cluster, plan: Placement) -> float:
    """Mean of a lone request to whole models; as the plan has it where they fit no server."""
    try:
        placement = whole_models(cluster)
    except BudgetError:
        placement = plan
    virtual = VirtualCluster(cluster, placement, Options(settings=roomy(style_for("latency"))))
    (model,) = cluster.models
    lone = (Arrival(n / LONE_RATE, model) for n in range(1, 11))
    return virtual.run(lone).requests.figures().mean_s


def _simulate(
    case: Case, rate: float, cluster: Cluster, chosen: Candidate, name: str, planner: Planner
) -> Figures:
    page_s = (PAGED.load_ns + PAGED.evict_ns) / 1e9
    options = Options(settings=roomy(chosen.style), admission=case.group == "admission")
    ready = prepared(cluster_policy(name), cluster, chosen.placement, options, page_s)
    span_s = min(max(SPANS_S[0], REQUESTS / rate), SPANS_S[1]) if case.load else 20 / rate
    rng = np.random.default_rng(SEED)
    load = requests(
        rng,
        poisson(rng, rate),
        {case.model: 1.0},
        until_s=span_s,
        limits_s=dict(cluster.limits_s),
    )
    virtual = VirtualCluster(
        ready.cluster, ready.placement, ready.options, seed=SEED, planner=planner
    )
    until_s = span_s if case.load > 1.0 else 10 * span_s
    outcome = virtual.run(load, until_s=until_s)
    # Where more comes than is served, those that came late are not answered: all count.
    return outcome.requests.figures(since_s=0.0 if case.load > 1.0 else WARM * span_s)


def _exceeds(forms: Forms) -> bool:
    costs = sliced(forms)
    size = costs.weight_bytes + costs.bytes_at(0, len(costs.slices), 1)
    return size > PAGED.epc_bytes - HOT_BYTES


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
        bars=_bars(cells),
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
        figure=_figure(cells),
    )


def _of(cells: Sequence[Cell], group: str, load: float | None = None) -> list[Cell]:
    return [
        cell
        for cell in cells
        if cell.case.group == group and (load is None or cell.case.load == load)
    ]


def _bars(cells: Sequence[Cell]) -> list[Bar]:
    bars = []
    full = _of(cells, "equal", LOADS[-1])
    beyond = [cell.ratio("vanilla") for cell in full if cell.exceeds]
    if beyond:
        bars.append(Bar("models beyond the EPC: throughput over vanilla, least", min(beyond), 1.97))
        median = float(np.median(beyond))
        bars.append(Bar("models beyond the EPC: throughput over vanilla, median", median, 3.0))
    bars.append(
        Bar(
            "all models: throughput over vanilla, least", min(c.ratio("vanilla") for c in full), 1.0
        )
    )
    calm = [cell for cell in _of(cells, "equal") if cell.case.load < 1.0]
    for over in WHOLE[1:]:
        worst = min(cell.ratio(over, "latency") for cell in calm)
        bars.append(Bar(f"all loads: mean latency of {over} over Lasagna's, least", worst, 1.0))
        worst = min(cell.ratio(over, "goodput") for cell in calm)
        bars.append(Bar(f"all loads: goodput over {over}, least", worst, 1.0))
        worst = min(cell.ratio(over, "goodput") for cell in _of(cells, "admission"))
        bars.append(Bar(f"overload, late ones refused: goodput over {over}, least", worst, 1.0))
    for over in PARTLY:
        own = [c for c in (*calm, *_of(cells, "unequal")) if c.case.load < 1.0]
        ratios = [cell.ratio(over, "latency") for cell in own if over in cell.figures]
        name = f"all servers and loads: mean latency of {over} over Lasagna's"
        bars.append(Bar(f"{name}, median", float(np.median(ratios)), 1.0))
        bars.append(Bar(f"{name}, least", min(ratios), 1.0))
    for group, what in (("unequal", "unequal servers"), ("links", "all links")):
        chosen = _of(cells, group)
        for over in WHOLE[1:3]:
            worst = min(
                cell.ratio(over, "throughput" if cell.case.load > 1.0 else "latency")
                for cell in chosen
            )
            bars.append(Bar(f"{what}: against {over}, least", worst, 1.0))
    lone = {cell.case: cell.ratio("media", "latency") for cell in _of(cells, "single")}
    bars.append(
        Bar("a lone request: MEDIA's latency over Lasagna's, least", min(lone.values()), 1.0)
    )
    branching = [ratio for case, ratio in lone.items() if case.model in BRANCHING]
    if branching:
        bars.append(Bar("the same, branching models: least", min(branching), 1.001))
    much = [cell for cell in [*_of(cells, "media"), *full] if "media" in cell.figures]
    for over, what in (("media", "MEDIA"), ("media-repeated", "MEDIA repeated on all servers")):
        least = min(cell.ratio(over) for cell in much)
        bars.append(Bar(f"throughput over {what}, least", least, 1.5))
    return bars


def _figure(cells: Sequence[Cell]) -> Figure:
    full = _of(cells, "equal", LOADS[-1])
    models = list(dict.fromkeys(cell.case.model for cell in full))
    figure = Figure(figsize=(10, 3 * len(models) / 2 + 2), layout="constrained")
    axes = figure.subplots(-(-len(models) // 2), 2, squeeze=False)
    for model, axis in zip(models, axes.flat, strict=False):
        sizes = [cell for cell in full if cell.case.model == model]
        width = 0.8 / len(POLICIES)
        for index, name in enumerate(POLICIES):
            values = [
                cell.figures[name].throughput / cell.capacity if name in cell.figures else 0.0
                for cell in sizes
            ]
            places = [number + index * width for number in range(len(sizes))]
            axis.bar(places, values, width, label=name, color=COLOURS[index])
        axis.set_xticks([n + 0.4 for n in range(len(sizes))], [c.case.title for c in sizes])
        axis.set_title(model)
        axis.axhline(1.0, color="black", linewidth=0.5)
    axes.flat[0].set_ylabel("answers/s over the plan's promise")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("Simulated: what clusters answer at 120 % of the plan's load")
    return figure
