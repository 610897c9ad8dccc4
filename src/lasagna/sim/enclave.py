"""An enclave made of numbers: it carries out one scheduler's commands in virtual seconds.

Runs begin in the order of their numbers, as many at once as the plan has lanes, and take what
``sim.runs`` reckons. Runs of one stage that begin nearly together are a gang, and share what is
loaded: as long as what the first of them has used is still in the ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias, assert_never

from lasagna.policy.costs import Forms, ModelCosts
from lasagna.policy.events import (
    Answer,
    Arrange,
    Arranged,
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
    Unpin,
)
from lasagna.policy.paging import Paging
from lasagna.policy.plan import MemoryPlan
from lasagna.policy.scheduler import Scheduler
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings
from lasagna.sim.calibration import Calibration, Resident
from lasagna.sim.clock import Clock
from lasagna.sim.planner import Planner
from lasagna.sim.runs import Gang, Span, Takes, joining_share, reckon

End: TypeAlias = Answer | Refuse | GiveUp
"""How a request leaves a server."""
Heard: TypeAlias = Callable[[Event, Sequence[Command]], None]
"""Is shown every event that a scheduler was told, and the commands that it led to."""


@dataclass(slots=True)
class Counters:
    """What an enclave has done.

    Attributes:
        runs: that began.
        tasks: slices of rows in them.
        busy_s: seconds in which runs had its lanes, by their number.
        loads: slices that were decrypted, pinned ones too; loaded_bytes: of them.
        pages: that the kernel loaded.
    """

    runs: int = 0
    tasks: int = 0
    busy_s: float = 0.0
    loads: int = 0
    loaded_bytes: int = 0
    pages: int = 0


class VirtualEnclave:
    """A scheduler and the enclave that it schedules.

    Attributes:
        scheduler: decides; only ``tell`` may change it.
        counters: of what was done.
    """

    def __init__(
        self,
        clock: Clock,
        machine: Machine,
        settings: Settings,
        planner: Planner,
        ended: Callable[[End], None],
        *,
        calibration: Calibration | None = None,
        noise: Iterator[float] | None = None,
        paging: Paging | None = None,
        heard: Heard | None = None,
        opened: Callable[[], None] | None = None,
    ) -> None:
        """No enclave runs, and there is no model.

        Args:
            clock: of everything that is simulated.
            machine: what the enclave has.
            settings: of its scheduler.
            planner: works out plans.
            ended: is told how each request left; must not call ``tell`` at once.
            calibration: what was measured; without it times are the profile's.
            noise: factors of runs' times, one for each.
            paging: where no budget is kept and the kernel pages.
            heard: is shown all events and commands.
            opened: is called whenever runs are possible from now on.
        """
        self._clock = clock
        self._machine = machine
        self._planner = planner
        self._ended = ended
        self._calibration = calibration or Calibration()
        self._noise = noise
        self._paging = paging
        self._resident = None if paging is None else Resident(paging)
        self._heard = heard
        self._opened = opened
        self.scheduler = Scheduler(machine, settings)
        self.counters = Counters()
        self._slow = 1.0
        self._shape = machine
        self._costs: Mapping[str, ModelCosts] = {}
        self._life = 0
        self._closed = False
        self._prepared = False
        self._queue: deque[Run] = deque()
        self._gangs: dict[tuple[str, int], Gang] = {}
        self._running = 0
        self._under_way: dict[tuple[str, int], list[Span]] = {}
        self._shares: dict[tuple[str, int], float] = {}
        self._takes: dict[tuple[str, int, int, int, tuple[int, int], bool], Takes] = {}

    def start(self, models: Mapping[str, Forms], *, prepared: bool = False) -> None:
        """Add models, and let an enclave be ready for them.

        Args:
            models: by name.
            prepared: the first arrangement takes no time: it was made before.

        Raises:
            BudgetError: they don't fit.
        """
        self._prepared = prepared
        for name, forms in models.items():
            self.tell(ModelAdded(self._clock.now_s, name, forms))
        self.tell(EnclaveReady(self._clock.now_s))

    def tell(self, event: Event) -> None:
        """Hand an event to the scheduler, and begin what it commands."""
        commands = self.scheduler.handle(event)
        if self._heard is not None:
            self._heard(event, commands)
        if commands:
            self._carry_out(commands)
        if self._queue:
            self._begin()

    def die(self, restart_s: float) -> None:
        """The enclave is lost with everything in it; after so many seconds there is another."""
        self._stop()
        self.tell(EnclaveLost(self._clock.now_s))
        self._clock.at(self._clock.now_s + restart_s, self._ready, self._life)

    def close(self) -> None:
        """It ends for good, with its scheduler, which is told nothing any more."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        """Nothing that is under way comes to an end."""
        self._life += 1
        self._queue.clear()
        self._gangs.clear()
        self._running = 0
        self._under_way.clear()
        if self._resident is not None:
            self._resident.clear()

    def slow(self, factor: float) -> None:
        """From now on runs compute so many times as long as they did at first."""
        self._slow = factor
        self._reckon_anew()

    def _ready(self, life: int) -> None:
        if life == self._life:
            self.tell(EnclaveReady(self._clock.now_s))

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Run():
                    self._queue.append(command)
                case Answer() | Refuse() | GiveUp():
                    self._ended(command)
                case Plan():
                    due_s = self._clock.now_s + self._calibration.plan_s
                    planned = self._planner.plan(command, due_s)
                    self._clock.at(due_s, self._planned, planned)
                case Arrange(plan):
                    self._arrange(plan)
                case Pin() | Unpin():
                    self._move(command)
                case Forget():
                    pass  # what the enclave holds takes no time to free
                case _:
                    assert_never(command)

    # Memory.

    def _planned(self, planned: Planned) -> None:
        """A host works on plans, so the death of its enclave doesn't stop it."""
        if not self._closed:
            self.tell(planned)

    def _arrange(self, plan: MemoryPlan | None) -> None:
        assert not self._queue
        assert not self._running
        takes_s = 0.0
        self._reckon_anew()
        if plan is None:
            self._costs = {}
        else:
            assert plan.total_bytes <= self._machine.budget, "more memory than there is"
            self._costs = plan.costs
            self._shape = replace(
                self._machine,
                lanes=plan.lanes,
                width=plan.width,
                load_rate=self._machine.load_rate / self._calibration.load,
            )
            if self._paging is None:
                sizes = [
                    plan.costs[name].slices[n].weight_bytes
                    for name, numbers in plan.pinned.items()
                    for n in sorted(numbers)
                ]
                self.counters.loads += len(sizes)
                self.counters.loaded_bytes += sum(sizes)
                takes_s = sum(sizes) / self._shape.load_rate
        takes_s += self._calibration.arrange_s
        if self._prepared:
            takes_s, self._prepared = 0.0, False
        self._clock.at(self._clock.now_s + takes_s, self._arranged, self._life)

    def _arranged(self, life: int) -> None:
        if life == self._life:
            self.tell(Arranged(self._clock.now_s))
            if self._opened is not None:
                self._opened()

    def _move(self, command: Pin | Unpin) -> None:
        takes_s = 0.0
        if isinstance(command, Pin):
            size = self._costs[command.model].slices[command.slice].weight_bytes
            takes_s = size / self._shape.load_rate
            self.counters.loads += 1
            self.counters.loaded_bytes += size
        self._clock.at(self._clock.now_s + takes_s, self._moved, self._life)

    def _moved(self, life: int) -> None:
        if life == self._life:
            self._reckon_anew()
            self.tell(Moved(self._clock.now_s))
            plan = self.scheduler.plan
            assert plan is not None
            assert plan.total_bytes <= self._machine.budget, "more memory than there is"

    # Runs.

    def _begin(self) -> None:
        """Begin runs on free lanes."""
        clock, queue, counters = self._clock, self._queue, self.counters
        lanes, now_s = self._shape.lanes, self._clock.now_s
        while queue and self._running < lanes:
            run = queue.popleft()
            rows = 0
            for part in run.batch:
                rows += part.count
            stage = run.model, run.first
            gang = self._gangs.get(stage)
            joins = gang is not None and now_s < gang.until_s
            mates, idle = self._company(stage, joins=joins)
            share = self._joining_share(run)
            in_step = mates > 1 or self._in_step(stage, share)
            company = max(mates, 1 + in_step), idle
            key = (*stage, rows, self._running, company, in_step)
            takes = self._takes.get(key)
            if takes is None:
                takes = self._takes[key] = self._reckon(run, rows, *company, in_step=in_step)
            total_s, compute_s, seal_s, loads, load_bytes, load_s = takes
            drawn = None
            if self._noise is not None:
                factor = self._leading(stage, share)
                if factor is None:
                    factor = drawn = next(self._noise)
                more_s = (factor - 1.0) * total_s
                compute_s = max(0.0, compute_s + more_s)
                total_s += more_s
            if self._resident is not None:
                paging_s = self._paging_s(run, total_s)
                compute_s += paging_s
                total_s += paging_s
            elif loads:
                if joins:
                    load_bytes, load_s = 0, 0.0
                else:
                    self._gangs[stage] = Gang(now_s, total_s, 0.0, share)
                    counters.loads += loads
                    counters.loaded_bytes += load_bytes
            self._running += 1
            counters.runs += 1
            counters.tasks += rows * (run.last - run.first)
            counters.busy_s += total_s / lanes
            end_s = now_s + total_s
            span = Span(now_s, end_s, drawn)
            self._under_way.setdefault(stage, []).append(span)
            ran = Ran(end_s, run.run, compute_s, load_bytes, load_s, seal_s)
            clock.at(end_s, self._end, (self._life, stage, span, ran))

    def _reckon_anew(self) -> None:
        """What runs take may have changed."""
        self._takes.clear()
        self._shares.clear()

    def _joining_share(self, run: Run) -> float:
        share = self._shares.get((run.model, run.first))
        if share is None:
            assert self.scheduler.plan is not None
            share = joining_share(self.scheduler.plan, run)
            self._shares[run.model, run.first] = share
        return share

    def _company(self, stage: tuple[str, int], *, joins: bool) -> tuple[int, int]:
        """Runs that share a run's loads, it included, and lanes that stay idle."""
        mates = 1 + (len(self._under_way.get(stage, ())) if joins else 0)
        idle = self._shape.lanes - self._running - 1
        for one in islice(self._queue, idle):
            mates += (one.model, one.first) == stage
            idle -= 1
        return mates, idle

    def _in_step(self, stage: tuple[str, int], share: float) -> bool:
        """Whether another run of the stage has just begun, or is about to be followed by one."""
        if not self._calibration.of_batches:
            return False
        now_s, queue = self._clock.now_s, self._queue
        follows = bool(queue) and (queue[0].model, queue[0].first) == stage
        return any(
            one.has_just_begun(now_s, share) or (follows and one.ends_soon(now_s, share))
            for one in self._under_way.get(stage, ())
        )

    def _leading(self, stage: tuple[str, int], share: float) -> float | None:
        """The factor of the run that one is in step with that begins now: they wait for the same.

        Only one that has drawn its own: factors are not handed on from gang to gang.
        """
        now_s = self._clock.now_s
        for one in self._under_way.get(stage, ()):
            if one.factor is not None and one.has_just_begun(now_s, share):
                return one.factor
        return None

    def _paging_s(self, run: Run, alone_s: float) -> float:
        """Seconds in which the kernel loads pages for a pass.

        Who begins later finds the pages that the other has loaded, until both are in step.
        """
        assert self._resident is not None
        assert self._paging is not None
        key, now_s = (run.model, run.first), self._clock.now_s
        gang = self._gangs.get(key)
        if gang is not None and now_s < gang.until_s:
            return gang.paging_s * (1.0 - (now_s - gang.begin_s) / gang.total_s)
        pages, share = self._resident.pass_pages(run.model, self._costs[run.model])
        self.counters.pages += pages
        paging_s = pages * self._paging.page_s
        self._gangs[key] = Gang(now_s, alone_s + paging_s, paging_s, share)
        return paging_s

    def _end(self, facts: tuple[int, tuple[str, int], Span, Ran]) -> None:
        life, stage, span, ran = facts
        if life == self._life:
            self._running -= 1
            self._under_way[stage].remove(span)
            self.tell(ran)

    def _reckon(self, run: Run, rows: int, gang: int, idle: int, *, in_step: bool) -> Takes:
        plan = self.scheduler.plan
        assert plan is not None
        known = self._calibration
        factor = self._slow * known.compute_factor(
            run.model, run.first, rows, self._running, in_step=in_step
        )
        rest_s = known.rest_s(run.model, run.first, rows, self._running, self._machine)
        shape = replace(self._shape, entry_s=rest_s)
        return reckon(plan, shape, run, rows, factor, known.seal, gang, idle)
