"""What the EPC emulator costs by itself: by access pattern, threads and charge.

One program touches each page of 128 MB in a known order, with 93.5 MB resident: every touch is a
load. Without a charge that shows the emulator's own cost, with the charges of ``sgx1-128`` at both
ends of the published range whether the charge decides. And a network that fits is run with and
without the emulator: then it must cost nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, Self

import numpy as np
import onnx
from matplotlib.figure import Figure
from rich.console import Console

from lasagna.bench.epc_patterns import PATTERNS
from lasagna.bench.report import Bar, Result
from lasagna.bench.timing import measure
from lasagna.errors import LasagnaError
from lasagna.models.source import prepare
from lasagna.models.zoo.catalog import load
from lasagna.tee.epc import emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import ENDS, profile
from lasagna.tee.epc_stats import StatsFile, stats_path
from lasagna.units import MIB, PAGE

PROFILE: Final = "sgx1-128"
SCAN_BYTES: Final = 128 * MIB
THREADS: Final = (1, 2)
OWN_LIMIT_US: Final = 8.0
RECLAIM_LIMIT: Final = 90_000.0
FITS_LIMIT: Final = 0.98
FITTING: Final = "squeezenet"


class _Program:
    """A child that does something for each line that it is sent."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ask(self, line: str) -> float:
        """Have it done; the number that it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise LasagnaError(f"the measured program ended with status {self._process.wait()}")
        return float(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def run(*, quick: bool) -> Result:
    """Measure all patterns at all charges, and the overhead when everything fits."""
    reason = why_not()
    if reason is not None:
        raise LasagnaError(f"no emulator here: {reason}")
    rounds = 3 if quick else 9
    console = Console(stderr=True)
    with console.status("access patterns ..."):
        microseconds, reclaimed, ahead = _patterns(rounds)
    with console.status(f"{FITTING} with and without the emulator ..."):
        fits, samples = _fitting(5 * rounds)
    medians = {name: float(np.median(values)) for name, values in microseconds.items()}
    bars = [
        Bar(
            "own cost of a load, in order, 1 thread",
            medians["none, in order, 1 thread"],
            OWN_LIMIT_US,
            "us",
            higher_is_better=False,
        ),
        Bar("reclaim in a scan", reclaimed, RECLAIM_LIMIT, "pages/s"),
        Bar("speed when everything fits", fits, FITS_LIMIT, "of without"),
    ]
    charges: dict[str, float] = {}
    for end in ENDS:
        charges[end] = profile(PROFILE).costs(end).load_ns / 1000
    return Result(
        samples=microseconds | samples,
        bars=bars,
        extra={
            "unit": "microseconds a load; seconds a run for the network",
            "median_us": medians,
            "charge_us": charges,
            "share_of_pages_brought_ahead_in_the_last_round": ahead,
            "emulated": "the EPC: real page traffic, charges as published",
        },
        figure=_figure(medians, charges),
    )


def _series(charge: str, pattern: str, threads: int) -> str:
    return f"{charge}, {pattern}, {threads} thread{'s' * (threads != 1)}"


def _patterns(rounds: int) -> tuple[dict[str, list[float]], float, dict[str, float]]:
    """Microseconds a load; pages evicted a second in scans; shares of pages that came ahead."""
    found: dict[str, list[float]] = {}
    ahead: dict[str, float] = {}
    reclaimed = []
    charges = {"none": profile("none").costs()}
    charges |= {end: profile(PROFILE).costs(end) for end in ENDS}
    environment = emulator_environment(charges["none"], stats_folder())
    with _Program(["lasagna.bench.epc_patterns", str(SCAN_BYTES)], environment) as program:
        for pattern in PATTERNS:
            for threads in THREADS:
                line = f"{pattern} {threads}"
                program.ask(line)  # the pages' order of eviction is that of this pattern now
                file = StatsFile(stats_path(stats_folder(), program.pid))
                for _ in range(rounds):
                    for charge, costs in charges.items():
                        file.set_charges(costs)
                        before = file.read()
                        seconds = program.ask(line)
                        after = file.read()
                        loads = after["loaded"] - before["loaded"]
                        name = _series(charge, pattern, threads)
                        found.setdefault(name, []).append(seconds / loads * 1e6)
                        ahead[name] = (after["ahead"] - before["ahead"]) / loads
                        if (charge, pattern, threads) == ("none", "in order", 1):
                            reclaimed.append((after["evicted"] - before["evicted"]) / seconds)
    return found, float(np.median(reclaimed)), ahead


def _fitting(rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Speed under the emulator, relative to without, of a network that fits."""
    pages = profile(PROFILE).costs().limit_pages * PAGE
    assert pages > 64 * MIB
    with tempfile.TemporaryDirectory(prefix="lasagna-bench-") as folder, ExitStack() as stack:
        path = Path(folder) / "model.onnx"
        onnx.save(prepare(load(FITTING, seed=1)).model, path)
        arguments = ["lasagna.bench.plain_session", str(path)]
        emulated = emulator_environment(profile(PROFILE).costs())
        without = stack.enter_context(_Program(arguments, {}))
        within = stack.enter_context(_Program(arguments, emulated))
        timings = measure(
            {"without": partial(without.ask, "20"), "emulated": partial(within.ask, "20")},
            rounds=rounds,
            warmup=2,
        )
    return timings.ratio("without", "emulated").value, {
        f"{FITTING}, {name}": list(seconds / 20) for name, seconds in timings.seconds.items()
    }


def _figure(medians: dict[str, float], charges: dict[str, float]) -> Figure:
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    colours = {"none": "#8d99ae", "low": "#f4a259", "typical": "#2a6f97", "high": "#bc4b51"}
    labels = {"none": "the emulator's own cost, no charge"}
    labels |= {
        end: f"{PROFILE}, {end}: {us:g} us a load are charged" for end, us in charges.items()
    }
    groups = [(pattern, threads) for threads in THREADS for pattern in PATTERNS]
    for number, (charge, colour) in enumerate(colours.items()):
        values = [medians[_series(charge, *group)] for group in groups]
        places = np.arange(len(groups)) + 0.2 * (number - 1.5)
        axes.bar(places, values, 0.19, color=colour, label=labels[charge])
        if charge in charges:
            axes.axhline(charges[charge], color=colour, linestyle=":", linewidth=1)
    names = [f"{pattern}\n{threads} thread{'s' * (threads != 1)}" for pattern, threads in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.set_ylabel("microseconds a load (median)")
    axes.set_title("EPC emulator: what a page load takes, by access pattern (dotted: its charge)")
    axes.legend(fontsize=8)
    return figure
