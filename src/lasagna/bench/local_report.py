"""What bench-local says: rows, bars, a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from matplotlib.figure import Figure

from lasagna.bench.load import Outcome
from lasagna.bench.report import Bar
from lasagna.policy.predictions import PredictionErrors
from lasagna.units import format_bytes

NATIVE_BARS: Final = {"vgg19": 0.90, "resnet50": 0.90, "inception_v2": 0.90, "alexnet": 0.80}
COLOURS: Final = {
    "native": "#8d99ae",
    "vanilla": "#bc4b51",
    "on-demand": "#f4a259",
    "dynamic-batch": "#5b8e7d",
    "lasagna": "#2a6f97",
}


class Load(msgspec.Struct, frozen=True):
    """What became of a load: answers a second, and latencies in seconds.

    Attributes:
        seconds: that it lasted.
        answered: requests, refused: others.
        p50_s: median latency, p95_s and p99_s: quantiles.
        goodput: answers a second within three times the latency of a lone request.
    """

    seconds: float
    answered: int
    refused: int
    p50_s: float
    p95_s: float
    p99_s: float
    goodput: float

    @classmethod
    def of(cls, outcome: Outcome, deadline_s: float) -> Load:
        """A load's summary."""
        return cls(
            outcome.seconds,
            outcome.answered,
            outcome.refused,
            outcome.percentile_s(0.5),
            outcome.percentile_s(0.95),
            outcome.percentile_s(0.99),
            outcome.within(dict.fromkeys(outcome.latencies_s, deadline_s)),
        )


class Row(msgspec.Struct):
    """One scenario with so many compute threads, in one EPC.

    Attributes:
        scenario: its name.
        threads: that compute.
        epc: profile.
        weight_bytes: of all its models, epc_bytes: that there are.
        commit: that was measured, and finished: when.
        throughputs: answers a second in each round, by policy and end of the published costs.
        lone_s: seconds of a request alone, by policy.
        rate: of arrivals a second in the open loops: 70 % of what vanilla takes.
        saturated: the last round under ``typical`` costs, open_loops: at that rate; by policy.
        counts: what a request took, by policy.
        errors: of predictions, by policy.
        plans: the division of memory in words, by policy.
    """

    scenario: str
    threads: int
    epc: str
    weight_bytes: int
    epc_bytes: int
    commit: str = ""
    finished: str = ""
    throughputs: dict[str, list[float]] = {}
    lone_s: dict[str, float] = {}
    rate: float = 0.0
    saturated: dict[str, Load] = {}
    open_loops: dict[str, Load] = {}
    counts: dict[str, dict[str, float]] = {}
    errors: dict[str, PredictionErrors] = {}
    plans: dict[str, list[str]] = {}

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.scenario}, {self.threads} thread{'s' * (self.threads > 1)}, {self.epc}"

    @property
    def exceeds(self) -> bool:
        """Whether vanilla pages: its working set is larger than the EPC."""
        return self.counts["vanilla"]["faults a request"] > 100

    @property
    def several(self) -> bool:
        """Whether it is a mix of models."""
        return len(self.scenario.split()) > 1

    def median(self, what: str) -> float:
        """Answers a second: the median round."""
        return median(self.throughputs[what])

    def over(self, other: str, end: str = "typical") -> float:
        """How many times another policy's throughput under such costs; paired by rounds."""
        ours = self.throughputs["lasagna typical"]
        theirs = self.throughputs[other if other == "native" else f"{other} {end}"]
        return median(a / b for a, b in zip(ours, theirs, strict=True))

    def line(self) -> str:
        """The row in a line."""
        others = ("native", "on-demand", "dynamic-batch", "vanilla")
        against = ", ".join(f"{self.over(other):.2f} x {other}" for other in others)
        return f"{self.title}: {self.median('lasagna typical'):.1f}/s, {against}"


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """The issue's bars, for what was measured."""
    bars = []
    for row in rows:
        if row.epc != "sgx1-128":
            bars.append(Bar(f"{row.title}: vanilla", row.over("vanilla"), 0.98))
            continue
        limit = (2.5 if row.several else 3.0) if row.exceeds else 0.98
        bars.append(Bar(f"{row.title}: vanilla", row.over("vanilla"), limit))
        if row.exceeds:
            low = row.over("vanilla", "low")
            bars.append(Bar(f"{row.title}: vanilla, low costs", low, 2.0))
        if row.exceeds or row.several:
            bars.append(_over_on_demand(row))
        if row.scenario in NATIVE_BARS:
            limit = NATIVE_BARS[row.scenario]
            bars.append(Bar(f"{row.title}: native", row.over("native"), limit))
        bars.append(Bar(f"{row.title}: dynamic-batch", row.over("dynamic-batch"), 1.0))
        p99, p50 = row.open_loops["lasagna"].p99_s, row.open_loops["vanilla"].p50_s
        name = f"{row.title}: p99 at 70 % / vanilla's p50"
        bars.append(Bar(name, p99 / p50, 1.0, higher_is_better=False))
        for kind, error in asdict(row.errors["lasagna"]).items():
            name = f"{row.title}: error of predicted {kind}"
            bars.append(Bar(name, error, 0.10, higher_is_better=False))
    return bars


def _over_on_demand(row: Row) -> Bar:
    value = row.over("on-demand")
    most = 1.5 if row.several or row.scenario == "alexnet" else 1.2
    name = f"{row.title}: on-demand"
    if row.threads == 1:  # a core is left for loading: 1.2, or 0.95 of native
        enough = 0.95 * row.median("native") / row.median("on-demand typical")
        return Bar(name, value, min(1.2, enough))
    return Bar(name, value, most)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Keep the rows, so that a run that is broken off loses one at most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_bytes(msgspec.json.format(msgspec.json.encode(list(rows)), indent=1) + b"\n")
    written.replace(path)


def table_of(rows: Sequence[Row]) -> str:
    """The rows for docs/, as Markdown: Lasagna's throughput, and how many times that of others."""
    lines = [
        "| models | threads | EPC | answers/s | x native | x on-demand | x dynamic-batch "
        "| x vanilla "
        "| loads a task | entries a task | faults a request | p99 at 70 % / vanilla's p50 |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        counts, vanilla = row.counts["lasagna"], row.counts["vanilla"]
        tail = ""
        if row.open_loops:
            ours, theirs = row.open_loops["lasagna"], row.open_loops["vanilla"]
            tail = f"{1000 * ours.p99_s:,.0f} / {1000 * theirs.p50_s:,.0f} ms"
        over = f"{row.over('vanilla'):.2f}"
        if row.exceeds and "vanilla low" in row.throughputs:
            over += f" (low: {row.over('vanilla', 'low'):.2f})"
        cells = [
            row.scenario,
            str(row.threads),
            row.epc,
            f"{row.median('lasagna typical'):.1f}",
            *(f"{row.over(other):.2f}" for other in ("native", "on-demand", "dynamic-batch")),
            over,
            f"{counts['loads a task']:.3f}",
            f"{counts['entries a task']:.4f}",
            f"{vanilla['faults a request']:,.0f} -> {counts['faults a request']:,.1f}",
            tail,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure_of(rows: Sequence[Row]) -> Figure:
    """Saturated throughput of each policy as a share of native's."""
    figure = Figure(figsize=(10, 0.75 * len(rows) + 2), layout="constrained")
    axes = figure.subplots()
    kinds = ("lasagna", "dynamic-batch", "on-demand", "vanilla")
    for place, row in enumerate(rows):
        native = row.median("native")
        for number, kind in enumerate(kinds):
            share = row.median(f"{kind} typical") / native
            height = place + 0.2 * (number - 1.5)
            axes.barh(height, share, 0.19, color=COLOURS[kind])
            note = f"{row.median(f'{kind} typical'):.1f}/s"
            if kind == "lasagna":
                note += f", {row.over('vanilla'):.1f} x vanilla"
            axes.text(share + 0.01, height, note, va="center", fontsize=6.5)
    axes.axvline(1.0, color=COLOURS["native"], linewidth=1.5)
    for kind in kinds:
        axes.barh(0, 0, color=COLOURS[kind], label=kind)
    axes.plot([], [], color=COLOURS["native"], label="native: unprotected, dynamic batching")
    axes.set_yticks(
        range(len(rows)),
        [
            f"{row.scenario}, {row.threads} thread{'s' * (row.threads > 1)}\n"
            f"{format_bytes(row.weight_bytes)}"
            for row in rows
        ],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35)
    axes.set_xlabel("saturated throughput, as a share of unprotected inference")
    axes.set_title("One server in an EMULATED EPC of 93.5 MiB (sgx1-128)")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure
