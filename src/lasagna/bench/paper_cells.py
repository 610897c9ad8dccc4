"""What became of the cells of ``make bench-paper``: ratios, bars, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from lasagna.bench.report import Bar
from lasagna.policy.cluster import Server
from lasagna.sim.metrics import Figures

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
FULL: Final = 1.2
"""Load at which throughput counts."""
COLOURS: Final = ("#2a6f97", *(f"C{n}" for n in range(1, 10)), "#c9ada7", "#344e41")
BRANCHING: Final = ("densenet121", "inception_v2", "minilm", "resnet50")


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster with a load, for one policy.

    Attributes:
        group: of the cases above.
        title: of the cluster.
        model: that is served, or the name of several.
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
        exceeds: whether the models' working set exceeds one server's EPC.
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


def _of(cells: Sequence[Cell], group: str, load: float | None = None) -> list[Cell]:
    return [
        cell
        for cell in cells
        if cell.case.group == group and (load is None or cell.case.load == load)
    ]


def rank(case: Case, found: Figures) -> tuple[float, float]:
    """Of a way to run a policy, to choose one: the least is best."""
    if case.group == "admission":
        return -found.goodput, 0.0
    if case.load > 1.0:
        return -found.throughput, 0.0
    # Who leaves requests unanswered is not quick for it.
    return -found.answered, found.mean_s if math.isfinite(found.mean_s) else math.inf


def bars_of(cells: Sequence[Cell]) -> list[Bar]:
    """What is to be kept."""
    full = _of(cells, "equal", FULL)
    bars = []
    for group, what in (("equal", ""), ("unequal", "unequal servers, ")):
        beyond = [cell.ratio("vanilla") for cell in _of(cells, group, FULL) if cell.exceeds]
        if beyond:
            name = f"{what}models beyond the EPC: throughput over vanilla"
            bars.append(Bar(f"{name}, least", min(beyond), 1.97))
            bars.append(Bar(f"{name}, median", float(np.median(beyond)), 3.0))
    least = min(cell.ratio("vanilla") for cell in full)
    bars.append(Bar("all models: throughput over vanilla, least", least, 1.0))
    calm = [cell for cell in _of(cells, "equal") if cell.case.load < 1.0]
    for over in WHOLE[1:]:
        for what in ("latency", "goodput"):
            worst = min(cell.ratio(over, what) for cell in calm)
            bars.append(Bar(f"all loads below capacity: {_title(over, what)}, least", worst, 1.0))
        worst = min(cell.ratio(over, "goodput") for cell in _of(cells, "admission"))
        bars.append(Bar(f"overload, late ones refused: goodput over {over}, least", worst, 1.0))
    bars += _other_ways([*calm, *(c for c in _of(cells, "unequal") if c.case.load < 1.0)])
    for over in PARTLY:
        ratios = [cell.ratio(over) for cell in (*full, *_of(cells, "unequal", FULL))]
        name = f"120 %, all servers: throughput over {over}"
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
    return [*bars, *_against_media(cells, full)]


def _other_ways(cells: Sequence[Cell]) -> Iterator[Bar]:
    """Against what is Lasagna with one thing done otherwise."""
    for over in PARTLY:
        for what in ("latency", "goodput"):
            ratios = [cell.ratio(over, what) for cell in cells if over in cell.figures]
            name = f"all servers and loads below capacity: {_title(over, what)}"
            yield Bar(f"{name}, median", float(np.median(ratios)), 1.0)
            yield Bar(f"{name}, least", min(ratios), 1.0)


def _title(over: str, what: str) -> str:
    return f"mean latency of {over} over Lasagna's" if what == "latency" else f"goodput over {over}"


def _against_media(cells: Sequence[Cell], full: Sequence[Cell]) -> Iterator[Bar]:
    lone = {cell.case: cell.ratio("media", "latency") for cell in _of(cells, "single")}
    yield Bar("a lone request: MEDIA's latency over Lasagna's, least", min(lone.values()), 1.0)
    branching = [ratio for case, ratio in lone.items() if case.model in BRANCHING]
    if branching:
        yield Bar("the same, branching models: least", min(branching), 1.001)
    much = [cell for cell in [*_of(cells, "media"), *full] if "media" in cell.figures]
    for over, what in (("media", "MEDIA"), ("media-repeated", "MEDIA repeated on all servers")):
        least = min(cell.ratio(over) for cell in much)
        yield Bar(f"throughput over {what}, least", least, 1.5)


def figure_of(cells: Sequence[Cell]) -> Figure:
    """What is answered in overload, for each model and policy."""
    full = _of(cells, "equal", FULL)
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
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    axes.flat[0].set_ylabel("answers/s over the plan's promise")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("Simulated: what clusters answer at 120 % of the plan's load")
    return figure
