"""The local scheduler against its baselines: one server, one enclave, an emulated EPC.

Every policy is alive at once and takes its turns in rounds that alternate: closed loops that keep
the server saturated, then the same Poisson arrivals for all at 70 % of what vanilla can take.
*Native* is plain ONNX Runtime with dynamic batching, unprotected, at its best batch size.

All of it takes more than an hour. So each row is kept in ``local-rows.json`` as soon as it is
there, with its commit; ``--only SCENARIO`` measures some anew and leaves the others as they are.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import onnxruntime as ort
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from lasagna.bench.load import Infer, Outcome, play, poisson, saturate, sequence
from lasagna.bench.local_report import (
    Load,
    Row,
    bars_of,
    figure_of,
    table_of,
    write_rows,
)
from lasagna.bench.machine import read_commit
from lasagna.bench.native_batch import NativeBatcher
from lasagna.bench.plain_session import native_session
from lasagna.bench.report import Result, read_rows
from lasagna.bench.served import SealedModel, Served
from lasagna.enclave.messages import Stats
from lasagna.errors import LasagnaError, UsageError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare, random_inputs
from lasagna.models.zoo.catalog import load
from lasagna.policy.baselines import POLICIES
from lasagna.server.lifecycle import HostConfig
from lasagna.tee.emulated import choose_backend
from lasagna.tee.epc import why_not
from lasagna.tee.epc_profiles import End, Profile, profile
from lasagna.units import Bytes, format_bytes

BESIDE_BYTES: Final = 10_000_000
"""EPC for what is not in a plan: interpreter, replies, hot code. Faults would show if it were too
little."""
BESIDE_EACH: Final = 1_700_000
"""The same for each model: its sessions. With seven models the hot footprint was 17.6 MB, with one
7.5 to 8.2 (docs/experiments/0006-where-two-threads-lost-time.md)."""
SCENARIOS: Final[dict[str, dict[str, float]]] = {
    "alexnet": {"alexnet": 1},
    "vgg19": {"vgg19": 1},
    "resnet50": {"resnet50": 1},
    "inception_v2": {"inception_v2": 1},
    "densenet121": {"densenet121": 1},
    "minilm": {"minilm": 1},
    "four small": {"squeezenet": 1, "shufflenet": 1, "efficientnet-lite0": 1, "inception_v1": 1},
    "vgg19 + resnet50": {"vgg19": 1, "resnet50": 1},
    "one hot, six cold": {
        "resnet50": 14,
        "squeezenet": 1,
        "alexnet": 1,
        "inception_v2": 1,
        "densenet121": 1,
        "vgg19": 1,
        "zfnet512": 1,
    },
}
QUICK: Final = ("alexnet", "resnet50", "four small")
OUTSTANDING: Final = {"lasagna": 96, "dynamic-batch": 96, "native": 96}
FEW: Final = 4
"""Requests that policies are kept busy with that gain nothing from more."""
SEED: Final = 11
LOAD_SHARE: Final = 0.7
OPEN_S: Final = 20.0
ANSWER_S: Final = 300.0
PROFILES: Final = ("sgx1-128", "sgx2-512")
_ENDS: Final[tuple[End, ...]] = ("typical", "low", "high")


@dataclass(slots=True)
class LocalModels:
    """Everything that is made once for a model."""

    sealed: dict[str, SealedModel] = field(default_factory=dict)
    sessions: dict[str, ort.InferenceSession] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, folder: Path) -> None:
        """Seal it, and open it in plain ONNX Runtime."""
        if name in self.sealed:
            return
        source = prepare(load(name, seed=1))
        path = folder / f"{name}.lsg"
        owner = Ed25519PrivateKey.generate()
        keys, report = seal(source, name, owner, path, SealOptions(portable=False))
        inputs = random_inputs(open_session(source), 1, np.random.default_rng(1))
        self.sealed[name] = SealedModel(name, path, keys, inputs)
        self.sessions[name] = native_session(source)
        self.weights[name] = report.manifest.variants[0].weight_bytes


def run(*, quick: bool, only: Sequence[str] = (), out: Path = Path("results")) -> Result:
    """Measure all scenarios; a few of them if it has to be quick, or only these.

    Args:
        quick: one short round of each.
        only: names of scenarios; the others' rows are taken from the run before.
        out: folder of the rows.

    Raises:
        UsageError: there is no such scenario.
    """
    for name in only:
        if name not in SCENARIOS:
            raise UsageError(f"there is no scenario {name!r}; choose {', '.join(SCENARIOS)}")
    reason = why_not()
    if reason is not None:
        raise LasagnaError(f"no emulator here: {reason}")
    file = out / ("local-rows-quick.json" if quick else "local-rows.json")
    rows = read_rows(file, Row) if only else []
    scenarios = only or (QUICK if quick else tuple(SCENARIOS))
    rows = asyncio.run(_run(scenarios, rows, file, quick=quick))
    table = out / file.with_suffix(".md").name
    table.write_text(table_of(rows))
    return Result(
        samples={
            f"{row.title}, {what}": values
            for row in rows
            for what, values in row.throughputs.items()
        },
        bars=bars_of(rows),
        extra={
            "unit": "answers a second, saturated",
            "emulated": "the EPC: real page traffic, charges as published",
            "rows": file.name,
        },
        figure=figure_of([row for row in rows if row.epc == PROFILES[0]]),
    )


async def _run(
    scenarios: Sequence[str], before: Sequence[Row], file: Path, *, quick: bool
) -> list[Row]:
    console = Console(stderr=True)
    rows = {(row.scenario, row.threads, row.epc): row for row in before}
    order = list(SCENARIOS)
    commit = read_commit()
    with tempfile.TemporaryDirectory(prefix="lasagna-bench-") as made:
        folder, models = Path(made), LocalModels()
        for name in scenarios:
            mix = SCENARIOS[name]
            with console.status(f"{name}: sealing ..."):
                for model in mix:
                    models.add(model, folder)
            for epc in PROFILES[: 1 if quick else 2]:
                for threads in (1, 2) if epc == PROFILES[0] else (2,):
                    with console.status(f"{name}, {threads} threads, {epc}: measuring ..."):
                        row = await _scenario(name, threads, epc, models, folder, quick=quick)
                    row.finished = datetime.now(UTC).isoformat(timespec="seconds")
                    row.commit = "" if commit is None else commit.id + "+" * commit.dirty
                    rows[name, threads, epc] = row
                    write_rows(file, _sorted(rows.values(), order))
                    console.print(row.line(), highlight=False)
    return _sorted(rows.values(), order)


def _sorted(rows: Iterable[Row], order: Sequence[str]) -> list[Row]:
    return sorted(rows, key=lambda one: (one.epc, order.index(one.scenario), one.threads))


async def _scenario(
    name: str, threads: int, epc_name: str, models: LocalModels, folder: Path, *, quick: bool
) -> Row:
    mix, epc = SCENARIOS[name], profile(epc_name)
    first = epc_name == PROFILES[0]
    seconds, rounds = (3.0, 1) if quick else (5.0, 3 if first else 1)
    weights = sum(models.weights[model] for model in mix)
    row = Row(name, threads, epc_name, weights, epc.costs().epc_bytes)
    native = NativeBatcher(
        {model: models.sessions[model] for model in mix},
        {model: models.sealed[model].inputs for model in mix},
        threads,
    )
    order = sequence(mix, 997, SEED)
    async with AsyncExitStack() as stack:
        served = {
            policy: await stack.enter_async_context(
                serve(policy, mix, threads, epc, models, folder)
            )
            for policy in POLICIES
        }
        for policy, one in served.items():
            row.lone_s[policy] = await _lone(one, mix)
        for number in range(rounds):
            names = list(served) if number % 2 == 0 else list(reversed(served))
            outcome = await saturate(native.infer, order, 96, seconds)
            await native.idle()  # it must not compute while others are measured
            row.throughputs.setdefault("native", []).append(outcome.throughput)
            for policy in names:
                for end in _ends(policy, first=first, last=number == rounds - 1):
                    await _turn(row, policy, end, served[policy], epc, order, seconds)
        if not first:
            return row
        row.rate = LOAD_SHARE * median(row.throughputs["vanilla typical"])
        arrivals = poisson(mix, row.rate, min(10.0 if quick else OPEN_S, 100 / row.rate), SEED)
        for policy, one in served.items():
            _charge(one, epc, "typical")
            row.open_loops[policy] = _summary(row, await play(asking(one), arrivals))
    return row


def _ends(policy: str, *, first: bool, last: bool) -> tuple[End, ...]:
    """Of the published costs: only vanilla pages, so to the others all ends are the same.

    The low end has a bar, so it is measured in every round; the high end in the last one.
    """
    if not first or policy != "vanilla":
        return _ENDS[:1]
    return _ENDS if last else _ENDS[:2]


def serve(
    policy: str,
    mix: Mapping[str, float],
    threads: int,
    epc: Profile,
    models: LocalModels,
    folder: Path,
    journal: Path | None = None,
) -> Served:
    """A server of these models, not started yet, whose plan leaves room for what is beside it."""
    costs = epc.costs()
    backend, reason = choose_backend(costs)
    assert reason is None
    sockets = folder / "sockets"
    sockets.mkdir(mode=0o700, exist_ok=True)
    config = HostConfig(
        budget=Bytes(costs.epc_bytes - BESIDE_BYTES - BESIDE_EACH * len(mix)),
        threads=threads,
        policy=policy,
        queue_limit=4096,
        answer_timeout_s=ANSWER_S,
        journal=journal,
    )
    return Served([models.sealed[name] for name in mix], config, backend, sockets)


async def _lone(one: Served, mix: Mapping[str, float]) -> float:
    """Seconds of a request that has the server to itself: the mix's mean."""
    total = 0.0
    for name, share in mix.items():
        await one.infer(name, ANSWER_S)
        begin = time.perf_counter()
        await one.infer(name, ANSWER_S)
        total += share * (time.perf_counter() - begin)
    return total / sum(mix.values())


async def _turn(
    row: Row, policy: str, end: End, one: Served, epc: Profile, order: list[str], seconds: float
) -> None:
    _charge(one, epc, end)
    model = next(iter(one.host.models.values()))
    file = one.epc
    assert file is not None
    before, faults = (await model.statistics(ANSWER_S)).counters, file.read().faults
    outcome = await saturate(
        asking(one), order, OUTSTANDING.get(policy, FEW), seconds, at_least=FEW
    )
    told = await model.statistics(ANSWER_S)
    row.throughputs.setdefault(f"{policy} {end}", []).append(outcome.throughput)
    if end == "typical":
        row.saturated[policy] = _summary(row, outcome)
        row.counts[policy] = _counts(before, told.counters, file.read().faults - faults)
        row.errors[policy] = told.prediction_errors
        row.plans[policy] = _plan_words(one)


def _counts(before: Stats, after: Stats, faults: int) -> dict[str, float]:
    def more(name: str) -> int:
        return int(getattr(after, name)) - int(getattr(before, name))

    rows, tasks = max(1, more("rows")), max(1, more("row_slices"))
    return {
        "loads a task": more("loads") / tasks,
        "MB loaded a request": more("loaded_bytes") / rows / 1e6,
        "entries a task": more("entries") / tasks,
        "entries a request": more("entries") / rows,
        "rows of a batch": more("row_slices") / max(1, more("slice_runs")),
        "faults a request": faults / rows,
    }


def _summary(row: Row, outcome: Outcome) -> Load:
    return Load.of(outcome, 3 * row.lone_s["lasagna"])


def _plan_words(one: Served) -> list[str]:
    found = []
    for name, model in one.host.models.items():
        plan = model.facts.plan
        assert plan is not None
        stages = ", ".join(f"{s.first}-{s.last}: {s.rows}" for s in plan.stages)
        found.append(
            f"{name}, {plan.form}: rows of slices {stages}; {len(plan.pinned_slices)} of "
            f"{plan.slices} slices pinned ({format_bytes(plan.pinned_bytes)}); ring of "
            f"{plan.ring_slots} x {format_bytes(plan.slot_bytes)}; "
            f"{format_bytes(plan.waiting_bytes)} at cuts, "
            f"{format_bytes(plan.activation_bytes)} activations"
        )
    plan_now = one.host.scheduler.plan
    assert plan_now is not None
    return [*found, f"{plan_now.lanes} lanes of {plan_now.width} threads"]


def _charge(one: Served, epc: Profile, end: End) -> None:
    file = one.epc
    assert file is not None
    file.set_charges(epc.costs(end))


def asking(one: Served) -> Infer:
    """What loads call."""

    async def infer(model: str) -> None:
        await one.infer(model, ANSWER_S)

    return infer
