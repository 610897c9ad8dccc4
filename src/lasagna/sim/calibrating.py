"""What a machine takes beside the profiles, from the journal of a real run on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapreplace
from pathlib import Path
from statistics import median
from typing import Final

from lasagna.errors import UsageError
from lasagna.journal import Journal
from lasagna.policy.costs import Forms
from lasagna.policy.events import (
    Answer,
    Arrange,
    Arranged,
    Arrived,
    ModelAdded,
    Plan,
    Planned,
    Ran,
    Run,
)
from lasagna.policy.plan import MemoryPlan
from lasagna.policy.scheduler import Scheduler
from lasagna.policy.stages import SLICE_S, Machine, sealing_s
from lasagna.sim.calibration import Calibration
from lasagna.sim.runs import joining_share, reckon

LOADED: Final = 1_000_000
"""Bytes that a report of loading must have, to say how fast it was."""
SEVERAL: Final = 5
"""Runs alike that say what such runs take: fewer may have been disturbed."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was found.

    Attributes:
        machine: that the scheduler was made with.
        models: that were served.
        calibration: medians of what was measured over what the profiles say.
        ratios: of runs' times, over what is reckoned for them.
        runs: that it is from.
        latencies_s: of answered requests, from the scheduler's hearing of each to its answer, in
            order of arrival.
    """

    machine: Machine
    models: Mapping[str, Forms]
    calibration: Calibration
    ratios: Sequence[float]
    runs: int
    latencies_s: Sequence[float] = ()


@dataclass(slots=True)
class _Done:
    """One run that ended well."""

    run: Run
    rows: int
    plan: MemoryPlan
    sent_s: float
    ran: Ran
    begin_s: float = 0.0
    beside: int = 0
    gang: int = 1
    idle: int = 0


@dataclass(slots=True)
class _Seen:
    """What a journal shows."""

    models: dict[str, Forms] = field(default_factory=dict)
    done: list[_Done] = field(default_factory=list)
    asked_s: dict[int, float] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    arranging_s: list[float] = field(default_factory=list)
    planning_s: list[float] = field(default_factory=list)


def calibrated(path: Path) -> Calibrated:
    """Read a journal: how long runs computed, sealed, loaded, and what else they took.

    Raises:
        UsageError: it can't be read, or no run is in it.
    """
    journal = Journal(path)
    machine = journal.header.machine
    seen = _read(journal, Scheduler(machine, journal.header.settings))
    if not seen.done:
        raise UsageError(f"{path}: no run has ended, there is nothing to calibrate by")
    seen.done.sort(key=lambda one: one.run.run)  # the order in which they begin
    _begin(seen.done)
    batches, of_models = _compute_factors(seen.done, machine)
    found = Calibration(
        arrange_s=median(seen.arranging_s) if seen.arranging_s else 0.0,
        plan_s=median(seen.planning_s) if seen.planning_s else 0.0,
        load=_load_factor(seen.done, machine),
        seal=_seal_factor(seen.done),
        of_batches=batches,
        of_models=of_models,
    )
    rests = _rests(seen.done, machine, found)
    alike: dict[tuple[str, int, int, int], list[float]] = defaultdict(list)
    for one, took_s, reckoned_s in rests:
        for rows in (one.rows, 0):
            key = one.run.model, one.run.first, rows, one.beside
            alike[key].append(took_s - reckoned_s)
    rests_s = {key: median(own) for key, own in alike.items() if len(own) >= SEVERAL}
    entry_s = max(0.0, median(took_s - reckoned_s for _, took_s, reckoned_s in rests))
    found = replace(found, entry_s=entry_s, rests_s=rests_s)
    ratios = [
        took_s / expected_s
        for one, took_s, reckoned_s in rests
        if took_s > 0.0 and (expected_s := reckoned_s + _rest_s(one, found, machine)) > 0.0
    ]
    latencies_s = [seen.took_s[request] for request in seen.asked_s if request in seen.took_s]
    return Calibrated(machine, seen.models, found, ratios, len(seen.done), latencies_s)


def _read(journal: Journal, scheduler: Scheduler) -> _Seen:
    seen = _Seen()
    sent: dict[int, tuple[Run, float]] = {}
    arranging_s = planning_s = 0.0
    for entry in journal:
        event = entry.event
        if isinstance(event, Ran) and event.run in sent:
            run, sent_s = sent.pop(event.run)
            plan = scheduler.plan
            assert plan is not None
            rows = sum(part.count for part in run.batch)
            seen.done.append(_Done(run, rows, plan, sent_s, event))
        elif isinstance(event, ModelAdded):
            seen.models[event.model] = event.forms
        elif isinstance(event, Arrived):
            seen.asked_s[event.request] = event.at_s
        elif isinstance(event, Arranged):
            seen.arranging_s.append(event.at_s - arranging_s)
        elif isinstance(event, Planned):
            seen.planning_s.append(event.at_s - planning_s)
        scheduler.handle(event)
        for command in entry.commands:
            if isinstance(command, Run):
                sent[command.run] = command, event.at_s
            elif isinstance(command, Answer):
                seen.took_s[command.request] = event.at_s - seen.asked_s[command.request]
            elif isinstance(command, Arrange):
                arranging_s = event.at_s
            elif isinstance(command, Plan):
                planning_s = event.at_s
    return seen


def _rest_s(one: _Done, found: Calibration, machine: Machine) -> float:
    return found.rest_s(one.run.model, one.run.first, one.rows, one.beside, machine)


def _begin(done: Sequence[_Done]) -> None:
    """When each run began, and beside how many others: it takes the lane that is free first."""
    lanes = 0
    free_s: list[float] = []
    for one in done:
        if one.plan.lanes != lanes:
            lanes, free_s = one.plan.lanes, [0.0] * one.plan.lanes
        one.begin_s = max(free_s[0], one.sent_s)
        heapreplace(free_s, one.ran.at_s)
    turns = [(one.ran.at_s, 0, number) for number, one in enumerate(done)]
    turns += [(one.begin_s, 1, number) for number, one in enumerate(done)]
    running = 0
    for _, begins, number in sorted(turns):  # who ends makes room for who begins then
        if begins:
            done[number].beside = max(0, running)
        running += 1 if begins else -1
    gangs: dict[tuple[str, int], list[_Done]] = {}
    for one in sorted(done, key=lambda run: run.begin_s):
        gang = gangs.get((one.run.model, one.run.first))
        if gang is None or not _joins(gang[0], one):
            gang = gangs[one.run.model, one.run.first] = []
        gang.append(one)
        for others, mate in enumerate(gang):
            mate.gang = len(gang)
            mate.idle = max(0, one.plan.lanes - len(gang) - max(0, mate.beside - others))


def _joins(first: _Done, one: _Done) -> bool:
    """Whether a run began early enough in another one of its stage to join its gang."""
    took_s = first.ran.at_s - first.begin_s
    return one.begin_s - first.begin_s < joining_share(first.plan, first.run) * took_s


def _shape(plan: MemoryPlan, machine: Machine) -> Machine:
    return replace(machine, lanes=plan.lanes, width=plan.width)


def _compute_factors(
    done: Sequence[_Done], machine: Machine
) -> tuple[dict[tuple[str, int, int, int, bool], float], dict[str, float]]:
    """Of each batch size at each stage, beside so many runs, in step or not; and of each model."""
    batches: dict[tuple[str, int, int, int, bool], list[float]] = defaultdict(list)
    models: dict[str, list[float]] = defaultdict(list)
    for one in done:
        run, costs = one.run, one.plan.costs[one.run.model]
        profiled = _shape(one.plan, machine).batch_s(
            costs.compute_at(run.first, run.last, one.rows),
            costs.compute_at(run.first, run.last, 1),
        )
        measured = one.ran.compute_s - SLICE_S * (run.last - run.first)
        if profiled > 0.0 and measured > 0.0:
            key = run.model, run.first, one.rows, one.beside, one.gang > 1
            batches[key].append(measured / profiled)
            models[run.model].append(measured / profiled)
    of_models = {name: median(found) for name, found in models.items()}
    return {key: median(found) for key, found in batches.items()}, of_models


def _load_factor(done: Sequence[_Done], machine: Machine) -> float:
    found = [
        one.ran.load_s * machine.load_rate / one.ran.load_bytes
        for one in done
        if one.ran.load_bytes > LOADED and one.ran.load_s > 0.0
    ]
    return median(found) if found else 1.0


def _seal_factor(done: Sequence[_Done]) -> float:
    found = []
    for one in done:
        costs = one.plan.costs[one.run.model]
        profiled = sealing_s(costs, one.run.first, one.run.last, one.rows)
        if profiled > 0.0 and one.ran.seal_s > 0.0:
            found.append(one.ran.seal_s / profiled)
    return median(found) if found else 1.0


def _rests(
    done: Sequence[_Done], machine: Machine, found: Calibration
) -> list[tuple[_Done, float, float]]:
    """Of each run, seconds that it took, and that are reckoned for it."""
    rests = []
    for one in done:
        plan = one.plan
        took_s = one.ran.at_s - one.begin_s
        shape = replace(
            _shape(plan, machine), entry_s=0.0, load_rate=machine.load_rate / found.load
        )
        factor = found.compute_factor(
            one.run.model, one.run.first, one.rows, one.beside, in_step=one.gang > 1
        )
        takes = reckon(plan, shape, one.run, one.rows, factor, found.seal, one.gang, one.idle)
        rests.append((one, took_s, takes.total_s))
    return rests
