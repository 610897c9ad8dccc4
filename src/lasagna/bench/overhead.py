"""What sealing, slicing and streaming cost: secure inference against plain ONNX Runtime.

For every model, in one run and in rounds that alternate: an ordinary ONNX Runtime session of one
thread, and enclaves of one compute thread with everything pinned, with everything streamed, and
with memory for 60 % of the weights: pinned slices and ring together. Activations and workspace,
which an ordinary session needs as well, come on top. A secure request is sealed when it goes in and
its answer when it comes out. Two figures each: *alone*, one request at a time, and *busy*, two in
flight, so that opening one overlaps with computing another, as on a server with a queue. The bars
are on *busy*; *alone* is what a lone client sees. Client-side sealing is the client's and not
counted. The enclave is an ordinary process here: nothing is emulated, nothing is paged.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from matplotlib.figure import Figure
from rich.console import Console

from lasagna.bench.direct import ClientRequest, InsecureDirectEnclave
from lasagna.bench.plain_session import Block, calls_in, native_block
from lasagna.bench.report import Bar, Result
from lasagna.bench.timing import Timings, measure
from lasagna.enclave import messages as m
from lasagna.errors import EnclaveError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare, random_inputs
from lasagna.models.zoo.catalog import CATALOG, load
from lasagna.server.plan_facts import PlanFacts
from lasagna.units import MIB, format_bytes

QUICK_MODELS: Final = ("squeezenet", "alexnet", "resnet50")
PINNED_LIMIT: Final = 0.95
STREAMED_LIMIT: Final = 0.85
MIXED_LIMIT: Final = 0.92
MIXED_SHARE: Final = 0.6
BLOCK_S: Final = 0.25
"""Each candidate runs for about this long in a round, so that caches are its own."""
KINDS: Final = ("pinned", "streamed", "mixed")


@dataclass(frozen=True, slots=True)
class Row:
    """One model's figures: rate against native, by kind and load, and how each was planned."""

    model: str
    weight_bytes: int
    timings: Timings
    plans: dict[str, PlanFacts]

    def ratio(self, kind: str, load_: str) -> float:
        """Native seconds over secure seconds: 1 is as fast as native."""
        return self.timings.ratio("native", f"{kind} {load_}").value


def run(*, quick: bool) -> Result:
    """Measure all models of the zoo, or three of them."""
    console = Console(stderr=True)
    names = QUICK_MODELS if quick else tuple(CATALOG)
    rows = []
    for name in names:
        with console.status(f"{name}: sealing and measuring ..."):
            row = _model(name, rounds=5 if quick else 9)
        ratios = ", ".join(f"{kind} {row.ratio(kind, 'busy'):.3f}" for kind in row.plans)
        console.print(f"{name}: {ratios}")
        rows.append(row)
    return Result(
        samples={
            f"{row.model} {kind}": list(row.timings.seconds[kind])
            for row in rows
            for kind in row.timings.seconds
        },
        bars=list(itertools.chain.from_iterable(_bars(row) for row in rows)),
        extra={
            "unit": "seconds a request",
            "ratio": "native seconds / secure seconds, medians of paired rounds",
            "models": {row.model: _facts(row) for row in rows},
            "enclave": "ordinary process, no EPC limit emulated",
        },
        figure=_figure(rows),
    )


def _bars(row: Row) -> list[Bar]:
    bars = []
    for kind, limit in (("pinned", PINNED_LIMIT), ("mixed", MIXED_LIMIT)):
        bars.append(Bar(f"{row.model} {kind}", row.ratio(kind, "busy"), limit, "of native"))
    if row.model == "resnet50":
        value = row.ratio("streamed", "busy")
        bars.append(Bar("resnet50 streamed", value, STREAMED_LIMIT, "of native"))
    return bars


def _model(name: str, rounds: int) -> Row:
    source = prepare(load(name, seed=1))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lasagna-bench-")))
        path = folder / "model.lsg"
        owner = Ed25519PrivateKey.generate()
        keys, report = seal(source, name, owner, path, SealOptions(portable=False))
        manifest = report.manifest
        weights = manifest.variants[0].weight_bytes
        roomy = 2 * weights + 1024 * MIB
        inputs = random_inputs(open_session(source), 1, np.random.default_rng(1))
        blocks: dict[str, Block] = {"native": native_block(source, inputs)}
        plans = {}
        budget = roomy
        for kind in KINDS:
            enclave = stack.enter_context(
                InsecureDirectEnclave(path, keys, budget, pin=kind != "streamed")
            )
            plans[kind] = plan = enclave.plan
            if kind == "streamed":
                beside = plan.total_bytes - plan.ring_slots * plan.slot_bytes
                budget = beside + int(MIXED_SHARE * weights)
            request = enclave.seal(manifest.inputs, inputs)
            blocks[f"{kind} alone"] = partial(_infer, enclave, request, in_flight=1)
            blocks[f"{kind} busy"] = partial(_infer, enclave, request, in_flight=2)
        calls = calls_in(BLOCK_S, blocks["native"], at_least=2)
        candidates = {what: partial(block, calls) for what, block in blocks.items()}
        timings = measure(candidates, rounds=rounds, warmup=1)
    per_request = {what: seconds / calls for what, seconds in timings.seconds.items()}
    return Row(name, weights, Timings(per_request), plans)


def _infer(
    enclave: InsecureDirectEnclave, request: ClientRequest, calls: int, *, in_flight: int
) -> None:
    """Run one sealed request so many times, with so many on their way at once."""
    sent = 0
    for received in range(calls):
        while sent < min(calls, received + in_flight):
            enclave.send(enclave.run(request))
            sent += 1
        (result,) = enclave.receive(m.Ran).results
        if result.error:
            raise EnclaveError(result.error)


def _facts(row: Row) -> dict[str, object]:
    loads = [f"{kind} {load_}" for kind in row.plans for load_ in ("alone", "busy")]
    ratios = {what: row.timings.ratio("native", what) for what in loads}
    return {
        "weight_bytes": row.weight_bytes,
        "native_s": row.timings.spread("native").median_s,
        "ratios": {what: [r.value, r.low, r.high] for what, r in ratios.items()},
        "plans": {kind: msgspec.to_builtins(plan) for kind, plan in row.plans.items()},
    }


def _figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(10, 0.62 * len(rows) + 2.2), layout="constrained")
    axes = figure.subplots()
    colours = {"pinned": "#2a6f97", "mixed": "#f4a259", "streamed": "#bc4b51"}
    limits = {"pinned": PINNED_LIMIT, "mixed": MIXED_LIMIT, "streamed": STREAMED_LIMIT}
    for place, row in enumerate(rows):
        for number, kind in enumerate(("pinned", "mixed", "streamed")):
            ratio = row.timings.ratio("native", f"{kind} busy")
            height = place + 0.26 * (number - 1)
            axes.barh(height, ratio.value, 0.24, color=colours[kind])
            axes.plot([ratio.low, ratio.high], [height, height], color="black", linewidth=1)
            alone = row.ratio(kind, "alone")
            axes.plot([alone], [height], "o", color="white", markeredgecolor="black", markersize=4)
            axes.text(0.02, height, f"{ratio.value:.2f}", va="center", color="white", fontsize=8)
    for kind in KINDS:
        label = {
            "pinned": "all weights pinned",
            "mixed": "memory for 60 % of the weights",
            "streamed": "all weights streamed",
        }[kind]
        axes.barh(0, 0, color=colours[kind], label=label)
        axes.axvline(limits[kind], color=colours[kind], linestyle=":", linewidth=1)
    axes.plot([], [], "o", color="white", markeredgecolor="black", label="a lone request")
    axes.plot([], [], ":", color="grey", label="the bar of each colour")
    axes.axvline(1.0, color="black", linewidth=0.8)
    names = [f"{row.model}\n{format_bytes(row.weight_bytes)}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("speed relative to plain ONNX Runtime, one compute thread each (1 = as fast)")
    axes.set_title("Secure inference against plain ONNX Runtime (enclave as ordinary process)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
