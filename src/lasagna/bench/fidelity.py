"""How true the simulator is: real servers against simulated ones under the same load.

Every server runs twice. The first run's journal says what this machine takes beside the models'
profiles (``sim.calibrating``), and what client, broker and host add to a request's time beside the
scheduler's: a constant. The second is compared: a closed loop that keeps the server saturated, and
Poisson arrivals at 70 % of what that gave. Where the two differ too much in what they answer when
saturated, the machine was another one in the meantime: it runs again, and the two in a row that
differ least are taken. Latencies are the client's. The EPC is emulated; for vanilla, what paging
takes is in its computing times.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lasagna.bench.load import Outcome, play, poisson, rate_of, saturate, sequence
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
from lasagna.errors import LasagnaError, UsageError
from lasagna.journal import Journal
from lasagna.policy.baselines import POLICIES
from lasagna.policy.events import Arrived
from lasagna.sim.calibrating import Calibrated, calibrated
from lasagna.sim.calibration import drawn
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import End, VirtualEnclave
from lasagna.sim.planner import Planner
from lasagna.tee.epc import why_not
from lasagna.tee.epc_profiles import profile

PARTS: Final = {
    f"{scenario}, {threads} thread{'s' * (threads > 1)}": (scenario, threads)
    for scenario in ("alexnet", "resnet50", "inception_v2", "four small")
    for threads in (1, 2)
}
QUICK: Final = ("alexnet, 2 threads",)
LOAD: Final = 0.7
EPC: Final = profile("sgx1-128")
SEEDS: Final = (11, 12, 13, 14)
"""Of the requests of each run, as many as there may be."""
LIMITS: Final = {"throughput": 0.08, "p50": 0.08, "p99": 0.15}
ALIKE: Final = LIMITS["throughput"] / 2
"""By how much two real runs may differ in throughput, to judge a simulation."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a run, real or simulated. Seconds."""

    throughput: float
    p50_s: float
    p99_s: float

    def errors(self, other: Figures) -> dict[str, float]:
        """By how much another's differ, as shares of these."""
        return {
            "throughput": abs(other.throughput / self.throughput - 1),
            "p50": abs(other.p50_s / self.p50_s - 1),
            "p99": abs(other.p99_s / self.p99_s - 1),
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A server under a load.

    Attributes:
        part: of ``PARTS``.
        policy: that the server has.
        load: in words.
        commit: of the code.
        real: what was measured; simulated: what the simulator says.
        before: what the calibrating run measured, with other requests, and 70 % of its own answers.
        runs: real ones until two in a row were alike, or there were as many as may be.
    """

    part: str
    policy: str
    load: str
    commit: str
    real: Figures
    simulated: Figures
    before: Figures
    runs: int


def run(*, quick: bool, only: Sequence[str] = (), out: Path = Path("results")) -> Result:
    """Run and simulate all of them.

    Args:
        quick: one part, in short.
        only: of the parts; the others' rows are taken from the run before.
        out: folder of the rows.

    Raises:
        UsageError: there is no such part, or the rows are of another version.
    """
    for part in only:
        if part not in PARTS:
            raise UsageError(f"there is no part {part!r}; choose {'; '.join(PARTS)}")
    reason = why_not()
    if reason is not None:
        raise LasagnaError(f"no emulator here: {reason}")
    file = out / ("fidelity-rows-quick.json" if quick else "fidelity-rows.json")
    rows = read_rows(file, Row) if only else []
    for part in only or (QUICK if quick else tuple(PARTS)):
        measured = asyncio.run(_part(part, quick=quick))
        rows = [row for row in rows if row.part != part] + measured
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


async def _part(part: str, *, quick: bool) -> list[Row]:
    console = Console(stderr=True)
    scenario, _threads = PARTS[part]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lasagna-bench-") as made:
        folder, models = Path(made), LocalModels()
        for name in SCENARIOS[scenario]:
            models.add(name, folder)
        for policy in POLICIES:
            with console.status(f"{part}, {policy} ..."):
                rows += await _compare(part, policy, models, folder, quick=quick)
    return rows


async def _compare(
    part: str, policy: str, models: LocalModels, folder: Path, *, quick: bool
) -> list[Row]:
    scenario, threads = PARTS[part]
    mix = SCENARIOS[scenario]
    seconds = 5.0 if quick else 10.0
    outstanding = OUTSTANDING.get(policy, FEW)

    async def once(seed: int) -> _Real:
        order = sequence(mix, 997, seed)
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
    while len(ran) < len(SEEDS) and (not differ or differ[-1] > ALIKE):
        ran.append(await once(SEEDS[len(ran)]))
        differ.append(abs(ran[-2].closed.throughput / ran[-1].closed.throughput - 1))
    least = differ.index(min(differ))
    first, real = ran[least], ran[least + 1]
    journal = first.journal
    known = calibrated(journal)
    outside_s = _outside_s(first, known)
    closed = _closed(known, journal, outside_s, real.order, outstanding, real.closed.answered)
    opened = _opened(known, journal, outside_s, real.arrivals)
    found = read_commit()
    commit = "" if found is None else found.id + "+" * found.dirty
    return [
        Row(part, policy, load, commit, _figures(one), simulated, _figures(before), len(ran))
        for load, one, simulated, before in (
            ("saturated", real.closed, closed, first.closed),
            ("at 70 %", real.opened, opened, first.opened),
        )
    ]


@dataclass(frozen=True, slots=True)
class _Real:
    """A run of a real server: what was asked of it, and what became of that."""

    journal: Path
    order: Sequence[str]
    closed: Outcome
    arrivals: Sequence[tuple[float, str]]
    opened: Outcome


def _figures(one: Outcome) -> Figures:
    return Figures(one.throughput, one.percentile_s(0.5), one.percentile_s(0.99))


def _outside_s(real: _Real, known: Calibrated) -> float:
    """What a request takes beside the scheduler's part, of those of the Poisson load."""
    inside = known.latencies_s[-real.opened.answered :]
    return max(0.0, real.opened.percentile_s(0.5) - float(np.median(inside)))


class _Simulated:
    """A calibrated server in virtual time, and when its requests were asked and answered."""

    def __init__(self, known: Calibrated, journal: Path, outside_s: float) -> None:
        self.outside_s = outside_s
        self.clock = Clock()
        self.asked_s: dict[int, float] = {}
        self.took_s: list[float] = []
        self.ends_s: list[float] = []
        rng = np.random.default_rng(SEEDS[0])
        self.enclave = VirtualEnclave(
            self.clock,
            known.machine,
            Journal(journal).header.settings,
            Planner(),
            self._ended,
            calibration=known.calibration,
            noise=drawn(rng, known.ratios),
        )
        self.enclave.start(known.models, prepared=True)

    def ask(self, model: str) -> None:
        number = len(self.asked_s) + 1
        self.asked_s[number] = self.clock.now_s
        self.enclave.tell(Arrived(self.clock.now_s, number, model))

    def _ended(self, end: End) -> None:
        ends_s = self.clock.now_s + self.outside_s
        self.took_s.append(ends_s - self.asked_s[end.request])
        self.ends_s.append(ends_s)
        self.answered()

    def answered(self) -> None:
        """A request has ended; must not ask at once."""


class _Closed(_Simulated):
    """Asks for another one for each that was answered."""

    def __init__(
        self, known: Calibrated, journal: Path, outside_s: float, order: Sequence[str]
    ) -> None:
        super().__init__(known, journal, outside_s)
        self._order = cycle(order)

    def more(self, _: None) -> None:
        """Ask for the next one."""
        self.ask(next(self._order))

    def answered(self) -> None:
        self.clock.at(self.clock.now_s + self.outside_s, self.more)


def _closed(
    known: Calibrated,
    journal: Path,
    outside_s: float,
    order: Sequence[str],
    outstanding: int,
    answers: int,
) -> Figures:
    one = _Closed(known, journal, outside_s, order)
    for _ in range(outstanding):
        one.clock.at(0.0, one.more)
    while len(one.ends_s) < outstanding + answers:
        one.clock.run(until_s=one.clock.now_s + 1.0)
    took = one.took_s[outstanding : outstanding + answers]
    p50, p99 = np.quantile(took, (0.5, 0.99))
    ends = one.ends_s[outstanding : outstanding + answers]
    return Figures(rate_of(ends), float(p50), float(p99))


def _opened(
    known: Calibrated, journal: Path, outside_s: float, arrivals: Sequence[tuple[float, str]]
) -> Figures:
    one = _Simulated(known, journal, outside_s)
    for at_s, model in arrivals:
        one.clock.at(1.0 + at_s, one.ask, model)
    one.clock.run()
    p50, p99 = np.quantile(one.took_s, (0.5, 0.99))
    return Figures(len(one.took_s) / (one.ends_s[-1] - 1.0), float(p50), float(p99))


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
