"""How true the simulator is: real servers against simulated ones under the same load.

Every server runs twice. The first run's journal says what this machine takes beside the models'
profiles (``sim.calibrating``), and what client, broker and host add to a request's time beside the
scheduler's: a constant. The second is compared: a closed loop that keeps the server saturated, and
Poisson arrivals at 70 % of what that gave. Where the two differ too much in what they answer when
saturated, the machine was another one in the meantime: it runs again, and the two in a row that
differ least are taken. Latencies are the client's. The EPC is emulated; for vanilla, what paging
takes is in its computing times. All real runs are kept: ``--again`` simulates them with another
simulator, without measuring.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lasagna.bench.load import Outcome, play, poisson, saturate, sequence
from lasagna.bench.local import (
    ANSWER_S,
    FEW,
    OUTSTANDING,
    SCENARIOS,
    LocalModels,
    asking,
    serve,
)
from lasagna.bench.machine import read_commit
from lasagna.bench.report import Bar, Result, read_rows
from lasagna.bench.virtual import Figures, VirtualRun
from lasagna.errors import LasagnaError, UsageError
from lasagna.journal import Journal
from lasagna.policy.baselines import POLICIES
from lasagna.sim.calibrating import calibrated
from lasagna.tee.epc import why_not
from lasagna.tee.epc_profiles import profile

PARTS: Final = {
    f"{scenario}, {threads} thread{'s' * (threads > 1)}": (scenario, threads)
    for scenario in ("alexnet", "resnet50", "inception_v2", "four small")
    for threads in (1, 2)
}
QUICK: Final = ("alexnet, 2 threads",)
LOAD: Final = 0.7
SATURATED: Final = "saturated"
OPENED: Final = f"at {100 * LOAD:.0f} %"
ORDER: Final = 997
"""Requests after which a closed loop repeats itself."""
EPC: Final = profile("sgx1-128")
SEEDS: Final = (11, 12, 13, 14)
"""Of the requests of each run, as many as there may be."""
LIMITS: Final = {"throughput": 0.08, "p50": 0.08, "p99": 0.15}
ALIKE: Final = LIMITS["throughput"] / 2
"""By how much two real runs may differ in throughput, to judge a simulation."""


@dataclass(frozen=True, slots=True)
class Row:
    """A server under a load.

    Attributes:
        part: of ``PARTS``.
        policy: that the server has.
        load: in words.
        commit: of the server's code; simulator: of the simulator's.
        runs: real ones until two in a row were alike, or there were as many as may be.
        real: what was measured; simulated: what the simulator says.
        before: what the calibrating run measured.
    """

    part: str
    policy: str
    load: str
    commit: str
    simulator: str
    runs: int
    real: Figures
    simulated: Figures
    before: Figures


@dataclass(frozen=True, slots=True)
class Kept:
    """Real runs of a server, beside the journal of the first one: all that simulating takes.

    Attributes:
        part: of ``PARTS``; policy: of the server; commit: of its code.
        runs: real ones until two in a row were alike, or there were as many as may be.
        outside_s: of a request, in client, broker and host.
        outstanding: requests at any time, when saturated; answers: until the end.
        order: of their models.
        arrivals: when, in seconds, and for which model, at ``LOAD`` of the throughput.
        real: by load, of the run that simulations are compared with.
        before: of the calibrating one, with other requests and ``LOAD`` of its own answers.
    """

    part: str
    policy: str
    commit: str
    runs: int
    outside_s: float
    outstanding: int
    answers: int
    order: Sequence[str]
    arrivals: Sequence[tuple[float, str]]
    real: dict[str, Figures]
    before: dict[str, Figures]


def run(
    *, quick: bool, only: Sequence[str] = (), out: Path = Path("results"), again: bool = False
) -> Result:
    """Run and simulate all of them.

    Args:
        quick: one part, in short, two runs of each server.
        only: of the parts; the others' rows are taken from the run before.
        out: folder of the rows, and of the real runs, which are kept.
        again: simulate the kept runs, and run no server.

    Raises:
        UsageError: there is no such part, no run was kept, or the rows are of another version.
    """
    for part in only:
        if part not in PARTS:
            raise UsageError(f"there is no part {part!r}; choose {'; '.join(PARTS)}")
    chosen = only or (QUICK if quick else tuple(PARTS))
    reason = why_not()
    if reason is not None and not again:
        raise LasagnaError(f"no emulator here: {reason}")
    file = out / ("fidelity-rows-quick.json" if quick else "fidelity-rows.json")
    runs = out / ("fidelity-runs-quick" if quick else "fidelity-runs")
    rows = read_rows(file, Row) if only else []
    kept = [_kept(runs, part, policy) for part in chosen for policy in POLICIES]
    if again and (missing := [one for one in kept if not one.exists()]):
        raise UsageError(f"{missing[0]} is missing; leave out --again, or choose parts by --only")
    for part in chosen:
        if not again:
            runs.mkdir(parents=True, exist_ok=True)
            asyncio.run(_measured(part, runs, quick=quick))
        rows = [row for row in rows if row.part != part] + _simulated(runs, part)
        rows.sort(key=lambda row: list(PARTS).index(row.part))  # stable: policies keep their order
        out.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    samples: dict[str, list[float]] = {}
    bars = []
    twice: dict[str, list[float]] = {what: [] for what in LIMITS}
    for row in rows:
        name = f"{row.part}, {row.policy}, {row.load}"
        samples[f"{name}: answers/s, real and simulated"] = [
            row.real.throughput,
            row.simulated.throughput,
        ]
        samples[f"{name}: p50 s"] = [row.real.p50_s, row.simulated.p50_s]
        samples[f"{name}: p99 s"] = [row.real.p99_s, row.simulated.p99_s]
        for what, error in row.real.errors(row.simulated).items():
            bars.append(Bar(f"{name}: {what}", error, LIMITS[what], "", False))
        for what, error in row.real.errors(row.before).items():
            twice[what].append(error)
    return Result(
        samples=samples,
        bars=bars,
        extra={
            "emulated": "the EPC: real page traffic, charges as published",
            "load": LOAD,
            "real runs of each server until two were alike": [row.runs for row in rows[::2]],
            "two real runs with other requests differ by": {
                what: {"median": float(np.median(errors)), "most": max(errors)}
                for what, errors in twice.items()
            },
        },
        figure=_figure(rows),
    )


async def _measured(part: str, runs: Path, *, quick: bool) -> None:
    """Run a part's real servers and keep what they did."""
    console = Console(stderr=True)
    scenario, _threads = PARTS[part]
    with tempfile.TemporaryDirectory(prefix="lasagna-bench-") as made:
        folder, models = Path(made), LocalModels()
        for name in SCENARIOS[scenario]:
            models.add(name, folder)
        for policy in POLICIES:
            with console.status(f"{part}, {policy} ..."):
                kept, journal = await _two_alike(part, policy, models, folder, quick=quick)
            shutil.copy(journal, _journal(runs, part, policy))
            _kept(runs, part, policy).write_bytes(msgspec.json.encode(kept))


async def _two_alike(
    part: str, policy: str, models: LocalModels, folder: Path, *, quick: bool
) -> tuple[Kept, Path]:
    scenario, threads = PARTS[part]
    mix = SCENARIOS[scenario]
    seconds = 5.0 if quick else 10.0
    outstanding = OUTSTANDING.get(policy, FEW)

    async def once(seed: int) -> _Real:
        order = sequence(mix, ORDER, seed)
        journal = folder / f"journal-{seed}.jsonl"
        journal.unlink(missing_ok=True)
        async with serve(policy, mix, threads, EPC, models, folder, journal) as one:
            ask = asking(one)
            for name in mix:
                await one.infer(name, ANSWER_S)
            closed = await saturate(ask, order, outstanding, seconds, at_least=4 * FEW)
            rate = LOAD * closed.throughput
            arrivals = poisson(mix, rate, max(2 * seconds, min(60.0, 200 / rate)), seed)
            return _Real(journal, order, closed, arrivals, await play(ask, arrivals))

    ran = [await once(SEEDS[0])]
    differ: list[float] = []
    most = 2 if quick else len(SEEDS)
    while len(ran) < most and (not differ or differ[-1] > ALIKE):
        ran.append(await once(SEEDS[len(ran)]))
        differ.append(abs(ran[-2].closed.throughput / ran[-1].closed.throughput - 1))
    least = differ.index(min(differ))
    first, real = ran[least], ran[least + 1]
    kept = Kept(
        part,
        policy,
        _commit(),
        len(ran),
        _outside_s(first),
        outstanding,
        real.closed.answered,
        real.order,
        real.arrivals,
        _figures(real),
        _figures(first),
    )
    return kept, first.journal


def _simulated(runs: Path, part: str) -> list[Row]:
    """Rows of a part from the runs that were kept.

    Raises:
        UsageError: they are of another version.
    """
    rows = []
    for policy in POLICIES:
        journal, file = _journal(runs, part, policy), _kept(runs, part, policy)
        try:
            kept = msgspec.json.decode(file.read_bytes(), type=Kept)
        except msgspec.MsgspecError as error:
            raise UsageError(f"{file} is of another version: {error}; remove it") from None
        settings = Journal(journal).header.settings
        virtual = VirtualRun(calibrated(journal), settings, kept.outside_s)
        simulated = {
            SATURATED: virtual.saturated(kept.order, kept.outstanding, kept.answers),
            OPENED: virtual.opened(kept.arrivals),
        }
        rows += [
            Row(
                part,
                policy,
                load,
                kept.commit,
                _commit(),
                kept.runs,
                real,
                simulated[load],
                kept.before[load],
            )
            for load, real in kept.real.items()
        ]
    return rows


def _journal(runs: Path, part: str, policy: str) -> Path:
    return runs / f"{part}, {policy}.jsonl"


def _kept(runs: Path, part: str, policy: str) -> Path:
    return runs / f"{part}, {policy}.json"


def _commit() -> str:
    found = read_commit()
    return "" if found is None else found.id + "+" * found.dirty


@dataclass(frozen=True, slots=True)
class _Real:
    """A run of a real server: what was asked of it, and what became of that."""

    journal: Path
    order: Sequence[str]
    closed: Outcome
    arrivals: Sequence[tuple[float, str]]
    opened: Outcome


def _figures(real: _Real) -> dict[str, Figures]:
    return {
        load: Figures(one.throughput, one.percentile_s(0.5), one.percentile_s(0.99))
        for load, one in ((SATURATED, real.closed), (OPENED, real.opened))
    }


def _outside_s(real: _Real) -> float:
    """What a request takes beside the scheduler's part, of those of the Poisson load."""
    inside = calibrated(real.journal).latencies_s[-real.opened.answered :]
    return max(0.0, real.opened.percentile_s(0.5) - float(np.median(inside)))


def _figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (what, unit) in zip(
        figure.subplots(1, 3),
        (("throughput", "answers/s"), ("p50_s", "s"), ("p99_s", "s")),
        strict=True,
    ):
        for load, marker in (("saturated", "o"), ("at 70 %", "^")):
            those = [row for row in rows if row.load == load]
            axes.plot(
                [getattr(row.real, what) for row in those],
                [getattr(row.simulated, what) for row in those],
                marker,
                label=load,
                alpha=0.7,
            )
        ends = [v for row in rows for v in (getattr(row.real, what), getattr(row.simulated, what))]
        low, high = 0.8 * min(ends), 1.25 * max(ends)
        limit = LIMITS[what.removesuffix("_s")]
        axes.fill_between(
            [low, high],
            [low * (1 - limit), high * (1 - limit)],
            [low * (1 + limit), high * (1 + limit)],
            color="#2a6f97",
            alpha=0.15,
            label=f"within {100 * limit:.0f} %",
        )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set_xlabel(f"{what.removesuffix('_s')}, real server ({unit})")
        axes.set_ylabel("simulated")
        axes.legend()
    return figure
