"""An enclave made of numbers: it takes a scheduler's runs and tells when they end.

It checks what a real one relies on: rows come in at slice 0 and go on where they stand, once.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from lasagna.policy.costs import ModelCosts, SliceCosts
from lasagna.policy.events import (
    Answer,
    Arrange,
    Arranged,
    Arrived,
    Cancelled,
    Command,
    EnclaveLost,
    EnclaveReady,
    Event,
    Forget,
    GiveUp,
    ModelAdded,
    Moved,
    Pin,
    Plan,
    Planned,
    Ran,
    Refuse,
    Run,
    RunFailed,
    Unpin,
)
from lasagna.policy.memory import divide_best, repin
from lasagna.policy.scheduler import Scheduler
from lasagna.policy.stages import Machine, sealing_s
from lasagna.policy.state import Phase, Settings
from lasagna.units import whole_pages

MB = 1_000_000
MACHINE = Machine(budget=60 * MB, lanes=1, cores=2, load_rate=3.4e9, entry_s=0.0002)


def linear(
    weights: list[int], row_bytes: list[int], row_s: list[float], max_rows: int = 32
) -> ModelCosts:
    """A chain whose slices take so much a row, and nothing else."""
    slices = tuple(
        SliceCosts(weight, tuple(s * b for b in (1, 2, 4, 8)), (1000, 2000, 4000, 8000))
        for weight, s in zip(weights, row_s, strict=True)
    )
    cuts = [*row_bytes, 4000]
    running = tuple(a + b for a, b in pairwise(cuts))
    return ModelCosts(slices, tuple(cuts), running, max_rows)


def check(scheduler: Scheduler) -> None:
    """What holds between any two events."""
    running = list(scheduler._running.values())
    for model in scheduler._models.values():
        for index, stage in enumerate(model.stages):
            assert stage.waiting_rows == sum(part.count for part in stage.waiting)
            started = [
                (at, sum(part.count for part in run.batch))
                for run, of, at, _ in running
                if of is model
            ]
            there = sum(rows for at, rows in started if at in (index, index - 1))
            assert stage.held == stage.waiting_rows + there
            assert not index or stage.held <= stage.capacity
    inside, begins, runs = Counter[int](), Counter[int](), set[int]()
    for model in scheduler._models.values():
        for index, stage in enumerate(model.stages):
            for part in stage.waiting:
                inside[part.request] += part.count
                if not index:
                    begins[part.request] += part.count
    for part in (part for run, *_ in running for part in run.batch):
        inside[part.request] += part.count
        runs.add(part.request)
    for number, request in scheduler._requests.items():
        model = scheduler._models[request.facts.model]
        outside = model.outside.left(number)
        assert outside + inside[number] == request.left
        assert request.left > 0
        untaken = outside + begins[number]
        assert request.untaken == untaken
        assert (request.phase is Phase.INSIDE) == (untaken == 0)
        if request.phase in (Phase.WAITING, Phase.AGAIN):
            assert untaken == request.facts.rows
            assert number not in runs
    lanes = scheduler._arranger.machine.lanes
    assert len(running) <= scheduler._arranger.machine.most_runs
    assert set(scheduler._running.began_s) == set(list(scheduler._running)[:lanes])
    for model in scheduler._models.values():
        for stage in model.stages:
            for rows, kept in stage.efficiency.items():
                assert kept == scheduler._choice.efficiency(model, stage, rows)


@dataclass
class Enclave:
    """Runs at most so many at once, each for as long as the model says, times ``factor``."""

    scheduler: Scheduler
    models: dict[str, ModelCosts]
    machine: Machine
    factor: float = 1.0
    now_s: float = 0.0
    runs: list[tuple[float, Run]] = field(default_factory=list)
    answered: dict[int, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    refused: dict[int, Refuse] = field(default_factory=dict)
    given_up: dict[int, str] = field(default_factory=dict)
    pinned: set[tuple[str, int]] = field(default_factory=set)
    fails: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)
    known: dict[int, int] = field(default_factory=dict)
    """Requests that a real enclave would hold keys of, and how many of their rows have left it."""
    rows: dict[int, int] = field(default_factory=dict)
    arranged: int = 0
    moves: int = 0
    _queue: list[Run] = field(default_factory=list)
    _ends: list[tuple[float, int, Run]] = field(default_factory=list)
    _at: dict[tuple[int, int], int] = field(default_factory=dict)

    def tell(self, event: Event) -> None:
        """Hand an event to the scheduler, and carry out its commands."""
        self.now_s = max(self.now_s, event.at_s)
        commands = self.scheduler.handle(event)
        check(self.scheduler)
        self.carry_out(commands)

    def carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Run():
                    self._check(command)
                    self.runs.append((self.now_s, command))
                    self._queue.append(command)
                case Answer(request):
                    assert request not in self.answered
                    self.answered[request] = self.now_s
                    self.order.append(request)
                case Refuse(request):
                    self.refused[request] = command
                case GiveUp(request, reason):
                    assert request not in self.given_up
                    self.given_up[request] = reason
                case Plan():
                    kept = None
                    if command.present is not None:
                        kept = repin(command.present, command.demand, command.machines[0])
                        assert kept.total_bytes <= command.machines[0].budget
                    best = divide_best(
                        command.models, command.demand, command.machines, command.style
                    )
                    self.tell(Planned(self.now_s, best, kept))
                case Arrange(plan):
                    assert not self._queue
                    assert not self._ends
                    assert not self._at
                    self.arranged += 1
                    self.pinned = (
                        set()
                        if plan is None
                        else {(name, n) for name in plan.pinned for n in plan.pinned[name]}
                    )
                    self.tell(Arranged(self.now_s))
                case Pin(model, number):
                    assert (model, number) not in self.pinned
                    self.pinned.add((model, number))
                    self.moves += 1
                    self._check_room()
                    self.tell(Moved(self.now_s))
                case Unpin(model, number):
                    self.pinned.remove((model, number))
                    self.moves += 1
                    self.tell(Moved(self.now_s))
                case Forget(request):
                    self.forgotten.add(request)
                    del self.known[request]
                    running = {
                        (part.request, row)
                        for run in (*self._queue, *(r for *_, r in self._ends))
                        for part in run.batch
                        for row in range(part.first, part.first + part.count)
                    }
                    for key in [k for k in self._at if k[0] == request and k not in running]:
                        del self._at[key]
                case _:
                    raise AssertionError(command)
        self._begin()

    def _check_room(self) -> None:
        plan = self.scheduler.plan
        assert plan is not None
        held = sum(whole_pages(plan.costs[name].slices[n].weight_bytes) for name, n in self.pinned)
        assert plan.total_bytes - plan.pinned_bytes + held <= self.machine.budget

    def _check(self, run: Run) -> None:
        plan = self.scheduler.plan
        assert plan is not None
        (stage,) = [s for s in plan.stages[run.model] if s.first == run.first]
        assert stage.last == run.last
        assert 1 <= sum(part.count for part in run.batch) <= stage.rows
        for part in run.batch:
            self.known.setdefault(part.request, 0)
            for row in range(part.first, part.first + part.count):
                assert self._at.get((part.request, row), 0) == run.first
                self._at[part.request, row] = -1  # in a run

    def _begin(self) -> None:
        plan = self.scheduler.plan
        while self._queue and plan is not None and len(self._ends) < plan.lanes:
            run = self._queue.pop(0)
            busy_s = self._compute_s(run) + self._seal_s(run)
            takes = max(busy_s, self._load_s(run)) + self.machine.entry_s
            heapq.heappush(self._ends, (self.now_s + takes, run.run, run))

    @property
    def next_end_s(self) -> float:
        """When the next run ends."""
        return self._ends[0][0] if self._ends else float("inf")

    def end_one(self) -> None:
        """The next run ends."""
        self.now_s, _, run = heapq.heappop(self._ends)
        failed = any(part.request in self.fails for part in run.batch)
        last = run.last == len(self.models[run.model].slices)
        for part in run.batch:
            for row in range(part.first, part.first + part.count):
                self._at[part.request, row] = run.first if failed else run.last
                if (last and not failed) or part.request in self.forgotten:
                    del self._at[part.request, row]
            if last and not failed and part.request in self.known:
                self.known[part.request] += part.count
                if self.known[part.request] == self.rows[part.request]:
                    del self.known[part.request]
        compute_s, seal_s = self._compute_s(run), self._seal_s(run)
        load, load_s = self._load_bytes(run), self._load_s(run)
        ran = Ran(self.now_s, run.run, compute_s, load, load_s, seal_s)
        self.tell(RunFailed(self.now_s, run.run) if failed else ran)

    def _load_bytes(self, run: Run) -> int:
        slices = self.models[run.model].slices
        return sum(
            slices[n].weight_bytes
            for n in range(run.first, run.last)
            if (run.model, n) not in self.pinned
        )

    def _load_s(self, run: Run) -> float:
        return self.factor * self._load_bytes(run) / self.machine.load_rate

    def _seal_s(self, run: Run) -> float:
        rows = sum(part.count for part in run.batch)
        return self.factor * sealing_s(self.models[run.model], run.first, run.last, rows)

    def _compute_s(self, run: Run) -> float:
        plan, costs = self.scheduler.plan, self.models[run.model]
        assert plan is not None
        rows = sum(part.count for part in run.batch)
        alone_s = costs.compute_at(run.first, run.last, rows)
        row_s = costs.compute_at(run.first, run.last, 1)
        (machine,) = [m for m in self.machine.shapes() if m.lanes == plan.lanes]
        return self.factor * machine.batch_s(alone_s, row_s)

    def until(self, time_s: float) -> None:
        """Let runs end up to a time."""
        while self.next_end_s <= time_s:
            self.end_one()
        self.now_s = max(self.now_s, time_s)

    def drain(self) -> None:
        """Let all runs end."""
        while self._ends:
            self.end_one()

    def lose(self) -> None:
        """The enclave is lost."""
        self._queue.clear()
        self._ends.clear()
        self._at.clear()
        self.pinned.clear()
        self.known.clear()
        self.tell(EnclaveLost(self.now_s))

    def die(self) -> None:
        """The enclave is lost, and another one comes."""
        self.lose()
        self.tell(EnclaveReady(self.now_s))

    def arrive(self, request: int, model: str, rows: int = 1, **facts: object) -> None:
        self.rows[request] = rows
        self.tell(Arrived(self.now_s, request, model, rows, **facts))  # type: ignore[arg-type]

    def cancel(self, request: int) -> None:
        self.tell(Cancelled(self.now_s, request))


def enclave(
    models: dict[str, ModelCosts],
    machine: Machine = MACHINE,
    settings: Settings | None = None,
    factor: float = 1.0,
) -> Enclave:
    """A scheduler with these models and an enclave that is ready."""
    scheduler = Scheduler(machine, settings or Settings())
    made = Enclave(scheduler, models, machine, factor)
    for name, costs in models.items():
        made.tell(ModelAdded(0.0, name, (costs,)))
    made.tell(EnclaveReady(0.0))
    return made
