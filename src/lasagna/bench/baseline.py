"""The vanilla baseline, measured in the emulated EPC beside Lasagna's two plans.

For each network, in one run and in rounds that alternate:

- *native*: an ordinary ONNX Runtime session, unprotected, outside the emulator;
- *vanilla*: the whole model in one session in an enclave of ``sgx1-128``, the EPC paged. The graph
  is the one that an ordinary session makes of the model, with its weights as constants, and all of
  ONNX Runtime's options are as by default, which is its best (docs/experiments/0004);
- *streamed*: the enclave with all weights through the ring;
- *mixed*: the enclave as it plans for itself: slices pinned while there is room, others streamed.

One compute thread each, one request at a time. All three enclaves are charged what ``sgx1-128``
costs, at both ends of the published range and in the middle, and what they use outside the emulated
region is deducted from their EPC.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from matplotlib.figure import Figure
from rich.console import Console

from lasagna.bench.direct import ClientRequest, InsecureDirectEnclave
from lasagna.bench.plain_session import calls_in, native_block
from lasagna.bench.report import Bar, Result
from lasagna.bench.timing import Timings, measure
from lasagna.enclave import messages as m
from lasagna.errors import EnclaveError, LasagnaError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare, random_inputs
from lasagna.models.zoo.catalog import load
from lasagna.models.zoo.light import LIGHT_NETWORKS
from lasagna.tee.epc import emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import ENDS, End, profile
from lasagna.tee.epc_stats import StatsFile, stats_path
from lasagna.tee.footprint import Footprint
from lasagna.units import format_bytes

PROFILE: Final = "sgx1-128"
QUICK_MODELS: Final = ("squeezenet", "alexnet", "resnet50")
KINDS: Final = ("vanilla", "streamed", "mixed")
BESIDE_BYTES: Final = 20_000_000
"""EPC for what is not in a plan: code, interpreter, sessions, frames. Faults would show if it were
too little."""
BLOCK_S: Final = 0.25
SHRINK_S: Final = 30.0
"""For pages beyond a limit that was lowered to leave."""
FAULTS_LIMIT: Final = 10.0


class _Enclave:
    """One enclave in the emulated EPC, and one request to it."""

    def __init__(
        self, enclave: InsecureDirectEnclave, request: ClientRequest, limit_pages: int
    ) -> None:
        self.enclave = enclave
        self._request = request
        self._file = StatsFile(stats_path(stats_folder(), enclave.pid))
        self.footprint = Footprint(self._file, limit_pages)
        self.faults: dict[str, list[float]] = {end: [] for end in ENDS}
        self.loads: dict[str, list[float]] = {end: [] for end in ENDS}
        self.repeat(2)
        self.footprint.begin()
        self.repeat(1)
        self.footprint.deduct()
        self.repeat(1)
        deadline_s = time.monotonic() + SHRINK_S
        while (now := self._file.read())["resident_pages"] > now["limit_pages"]:
            if time.monotonic() > deadline_s:
                raise LasagnaError("an enclave does not keep to the limit that was lowered")

    def repeat(self, calls: int) -> None:
        """Run the request so many times."""
        for _ in range(calls):
            (result,) = self.enclave.call(self.enclave.run(self._request), m.Ran).results
            if result.error:
                raise EnclaveError(result.error)

    def block(self, end: End, calls: int) -> None:
        """Run it so many times, charged as at this end of the range."""
        self._file.set_charges(profile(PROFILE).costs(end))
        before = self._file.read()
        self.repeat(calls)
        after = self._file.read()
        self.faults[end].append((after.faults - before.faults) / calls)
        self.loads[end].append((after["loaded"] - before["loaded"]) / calls)


@dataclass(frozen=True, slots=True)
class Row:
    """One network's figures: seconds a request by candidate, faults a request of the enclaves."""

    model: str
    weight_bytes: int
    timings: Timings
    faults: dict[str, float]
    loads: dict[str, float]
    hot_bytes: dict[str, int]
    plan_bytes: dict[str, int] = field(default_factory=dict)

    def over_vanilla(self, kind: str, end: End) -> float:
        """How many times as fast as vanilla."""
        return self.timings.ratio(f"vanilla {end}", f"{kind} {end}").value

    def over_charges(self, end: End) -> float:
        """Vanilla's time against native's and the charges of its loads: 1 if nothing else cost."""
        return self.timings.spread(f"vanilla {end}").median_s / self.charged_s(end)

    def charged_s(self, end: End) -> float:
        """What vanilla would take if nothing cost but computing and the charges of its loads."""
        charges = self.loads[f"vanilla {end}"] * profile(PROFILE).costs(end).load_ns / 1e9
        return self.timings.spread("native").median_s + charges


def run(*, quick: bool) -> Result:
    """Measure the nine networks, or three of them."""
    reason = why_not()
    if reason is not None:
        raise LasagnaError(f"no emulator here: {reason}")
    console = Console(stderr=True)
    light = list(LIGHT_NETWORKS)
    rows = []
    for name in QUICK_MODELS if quick else light:
        with console.status(f"{name}: sealing and measuring ..."):
            row = _model(name, rounds=3 if quick else 7)
        console.print(
            f"{name}: mixed {row.over_vanilla('mixed', 'typical'):.2f} x vanilla, "
            f"faults {row.faults['vanilla typical']:,.0f} -> {row.faults['mixed typical']:,.1f}"
        )
        rows.append(row)
    bars = []
    for row in rows:
        for kind in ("streamed", "mixed"):
            faults = row.faults[f"{kind} typical"]
            bars.append(
                Bar(
                    f"{row.model} {kind}: faults",
                    faults,
                    FAULTS_LIMIT,
                    "a request",
                    higher_is_better=False,
                )
            )
    return Result(
        samples={
            f"{row.model} {kind}": list(seconds)
            for row in rows
            for kind, seconds in row.timings.seconds.items()
        },
        bars=bars,
        extra={
            "unit": "seconds a request",
            "ratio": "vanilla seconds / Lasagna's seconds, medians of paired rounds",
            "emulated": f"the EPC of {PROFILE}: real page traffic, charges as published",
            "models": {row.model: _facts(row) for row in rows},
        },
        figure=_figure(rows),
    )


def _model(name: str, rounds: int) -> Row:
    source = prepare(load(name, seed=1))
    costs = profile(PROFILE).costs()
    emulated = emulator_environment(costs, stats_folder())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lasagna-bench-")))
        path = folder / "model.lsg"
        owner = Ed25519PrivateKey.generate()
        keys, report = seal(source, name, owner, path, SealOptions(portable=False))
        manifest = report.manifest
        inputs = random_inputs(open_session(source), 1, np.random.default_rng(1))
        native = native_block(source, inputs)
        enclaves: dict[str, _Enclave] = {}
        for kind in KINDS:
            enclave = stack.enter_context(
                InsecureDirectEnclave(
                    path,
                    keys,
                    costs.epc_bytes - BESIDE_BYTES,
                    pin=kind != "streamed",
                    vanilla=kind == "vanilla",
                    environment=emulated,
                )
            )
            request = enclave.seal(manifest.inputs, inputs)
            enclaves[kind] = _Enclave(enclave, request, costs.limit_pages)
        calls = {"native": calls_in(BLOCK_S, native, at_least=1)}
        candidates: dict[str, Callable[[], object]] = {"native": partial(native, calls["native"])}
        for kind, one in enclaves.items():
            calls[kind] = calls_in(BLOCK_S, one.repeat, at_least=1)
            for end in ENDS:
                candidates[f"{kind} {end}"] = partial(one.block, end, calls[kind])
        timings = measure(candidates, rounds=rounds, warmup=1)
        several = [(kind, one, end) for kind, one in enclaves.items() for end in ENDS]
        return Row(
            name,
            manifest.variants[0].weight_bytes,
            Timings({w: s / calls[w.split()[0]] for w, s in timings.seconds.items()}),
            {f"{kind} {end}": float(np.median(one.faults[end])) for kind, one, end in several},
            {f"{kind} {end}": float(np.median(one.loads[end])) for kind, one, end in several},
            {kind: one.footprint.hot_bytes for kind, one in enclaves.items()},
            {kind: one.enclave.plan.total_bytes for kind, one in enclaves.items()},
        )


def _facts(row: Row) -> dict[str, object]:
    return {
        "weight_bytes": row.weight_bytes,
        "plan_bytes": row.plan_bytes,
        "hot_bytes_outside_the_region": row.hot_bytes,
        "milliseconds": {
            what: 1000 * row.timings.spread(what).median_s for what in row.timings.seconds
        },
        "faults_a_request": row.faults,
        "over_vanilla": {
            f"{kind} {end}": row.over_vanilla(kind, end)
            for kind in ("streamed", "mixed")
            for end in ENDS
        },
        "vanilla_over_native_and_charges": {end: row.over_charges(end) for end in ENDS},
        "mixed_over_native_and_charges_of_vanilla": {
            end: row.charged_s(end) / row.timings.spread(f"mixed {end}").median_s for end in ENDS
        },
    }


def _figure(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(10, 0.7 * len(rows) + 2.4), layout="constrained")
    axes = figure.subplots()
    colours = {
        "native": "#8d99ae",
        "vanilla": "#bc4b51",
        "streamed": "#f4a259",
        "mixed": "#2a6f97",
    }
    for place, row in enumerate(rows):
        for number, (kind, colour) in enumerate(colours.items()):
            height = place + 0.2 * (number - 1.5)
            what = kind if kind == "native" else f"{kind} typical"
            middle = furthest = 1000 * row.timings.spread(what).median_s
            axes.barh(height, middle, 0.19, color=colour)
            if kind != "native":
                ends = [1000 * row.timings.spread(f"{kind} {end}").median_s for end in ENDS]
                furthest = max(middle, *ends)
                axes.plot([min(ends), furthest], [height, height], color="black", linewidth=1)
            note = f"{middle:,.0f} ms"
            if kind != "native":
                note += f", {row.faults[what]:,.0f} faults"
            axes.text(1.06 * furthest, height, note, va="center", fontsize=6.5)
    labels = {
        "native": "plain ONNX Runtime, unprotected",
        "vanilla": "vanilla: the same in the emulated EPC, paged",
        "streamed": "Lasagna, all weights streamed",
        "mixed": "Lasagna, pinned while there is room",
    }
    for kind, colour in colours.items():
        axes.barh(0, 0, color=colour, label=labels[kind])
    axes.plot([], [], color="black", label="low to high end of the published costs")
    axes.set_yticks(
        range(len(rows)), [f"{r.model}\n{format_bytes(r.weight_bytes)}" for r in rows], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a request, one compute thread (logarithmic)")
    axes.set_title(f"One request in an emulated EPC of 93.5 MiB ({PROFILE}), median")
    low, high = axes.get_xlim()
    axes.set_xlim(low, 3 * high)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
