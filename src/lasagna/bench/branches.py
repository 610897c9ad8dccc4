"""What running branches of one request on several servers could win at most.

Placement knows chains of slices: one server at a time works on a request. In a model whose graph
branches, another server could compute one branch meanwhile. That is bounded here from measured
times of real nodes, whatever a planner might do. Between two neighbouring places that only one
tensor crosses lies a *region*. If anything of a region is computed elsewhere, some tensor of it is
carried there and some tensor back, and the region takes no less than its longest path. So a region
can't gain more than its time less the larger of the two.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from matplotlib.figure import Figure
from rich.progress import track

from lasagna.bench.report import Result
from lasagna.models.graph import Graph, uses
from lasagna.models.optimise import compile_variant
from lasagna.models.shapes import TensorInfo, measure_shapes
from lasagna.models.source import prepare
from lasagna.models.zoo.catalog import load

MODELS: Final = ("densenet121", "inception_v2", "minilm", "resnet50")
QUICK_MODELS: Final = ("inception_v2",)
LINKS: Final = (10, 100, 1000, 10_000)
MBIT: Final = 125_000.0
THREADS: Final = 2
RUNS: Final = 15
DELAY_S: Final = 0.0002
"""From a server to the switch, as ``policy.cluster.Server`` has it."""


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes between two places that one tensor crosses.

    Attributes:
        seconds: of all of them, one after the other, with all threads on each.
        path_s: of the longest path through them.
        least_bytes: of the smallest tensor that is computed or taken there.
    """

    seconds: float
    path_s: float
    least_bytes: int

    def gain_s(self, bandwidth: float) -> float:
        """Seconds that other servers could save, at most."""
        carry_s = 2 * (self.least_bytes / bandwidth + 2 * DELAY_S)
        return max(0.0, self.seconds - max(self.path_s, carry_s))


def run(*, quick: bool) -> Result:
    """Measure nodes of models, and reckon."""
    samples: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    for model in track(QUICK_MODELS if quick else MODELS, description="measuring nodes"):
        regions = regions_of(model)
        total_s = sum(region.seconds for region in regions)
        gains[model] = []
        for link in LINKS:
            share = sum(region.gain_s(link * MBIT) for region in regions) / total_s
            gains[model].append(share)
            samples[f"{model}, {link} Mbit/s: share of a request's time, at most"] = [share]
        samples[f"{model}: s a request, one row"] = [total_s]
    return Result(
        samples=samples,
        bars=[],
        extra={"threads": THREADS, "delay_s": DELAY_S, "measured": "ONNX Runtime's node times"},
        figure=_figure(gains),
    )


def regions_of(model: str) -> list[Region]:
    """Measure one model of the zoo and divide it."""
    source = prepare(load(model, seed=1))
    first, second = source.references[0], source.references[1]
    with tempfile.TemporaryDirectory(prefix="lasagna-bench-") as made:
        folder = Path(made)
        graph = compile_variant(source, folder, portable=False).graph
        tensors = measure_shapes(graph, first.inputs, second.inputs, batchable=source.batchable)
        times_s = _node_times_s(graph, folder, first.inputs)
    return _regions(graph, tensors, times_s)


def _node_times_s(graph: Graph, folder: Path, inputs: Mapping[str, np.ndarray]) -> list[float]:
    """Median seconds of each node, in the graph's order."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = THREADS
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(folder / "optimised.onnx", options)
    for _ in range(RUNS):
        session.run(None, dict(inputs))
    events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = {}
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            found.setdefault(name.removesuffix("_kernel_time"), []).append(event["dur"] / 1e6)
    return [float(np.median(found.get(node.name, [0.0]))) for node in graph.nodes]


def _regions(
    graph: Graph, tensors: Mapping[str, TensorInfo], times_s: Sequence[float]
) -> list[Region]:
    last = {name: n for n, node in enumerate(graph.nodes) for name in uses(node) if name in tensors}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    alive = [name for name in graph.inputs if name in last]
    regions: list[Region] = []
    ends_s: dict[str, float] = {}
    begin, sizes = 0, [tensors[name].spec.row_bytes for name in alive]
    for number, node in enumerate(graph.nodes):
        taken = [ends_s.get(name, 0.0) for name in uses(node)]
        made = [name for name in node.output if name in tensors]
        ends_s |= dict.fromkeys(made, max(taken, default=0.0) + times_s[number])
        sizes += [tensors[name].spec.row_bytes for name in made]
        alive = [name for name in {*alive, *made} if last.get(name, -1) > number]
        if len(alive) == 1 or number + 1 == len(graph.nodes):
            path_s = max(ends_s.values(), default=0.0)
            regions.append(Region(sum(times_s[begin : number + 1]), path_s, min(sizes)))
            begin, ends_s, sizes = number + 1, {}, [tensors[name].spec.row_bytes for name in alive]
    return regions


def _figure(gains: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(LINKS)
    for index, link in enumerate(LINKS):
        places = [n + index * width for n in range(len(gains))]
        values = [100 * found[index] for found in gains.values()]
        bars = axes.bar(places, values, width, label=f"{link:,} Mbit/s")
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=7)
    axes.set_xticks([n + 0.3 for n in range(len(gains))], list(gains))
    axes.set_ylabel("% of a lone request's time, at most")
    axes.set_title("What branches on other servers could save")
    axes.legend()
    return figure
