"""What a scheduler remembers: requests, models, and the rows at every cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Final, TypeAlias

from lasagna.policy.costs import Correction, ModelCosts
from lasagna.policy.events import Arrived, Rows, Run
from lasagna.policy.fair import FairQueue
from lasagna.policy.plan import MemoryPlan, Style
from lasagna.policy.stages import Stage, waiting_rows

NEVER: Final = float("inf")
"""A time that does not come."""
RELAXED: Final = 1.05
"""By which a model's limit grows with each request that may take longer."""


Running: TypeAlias = "tuple[Run, ModelState, int, int]"
"""A run that is not over: its model, the number of its stage, its rows."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator chooses.

    Attributes:
        queue_rows: that may wait outside the enclave; more are refused.
        patience_s: who has waited so long outside goes before all priorities and shares.
        weights: of tenants; those that are not named have 1.
        style: what the division of the memory may make use of.
        in_order: who came first is served first, whatever that costs.
        stories: of the last so many requests are kept, to be asked why.
    """

    queue_rows: int = 256
    patience_s: float = 10.0
    weights: Mapping[str, float] = field(default_factory=dict)
    style: Style = field(default_factory=Style)
    in_order: bool = False
    stories: int = 1000


class Phase(Enum):
    """Where a request is. The last four are ends; then nothing is kept of it but its story.

    ``PARTLY``: the enclave knows it, and a first run has yet to take rows of it. ``AGAIN``: the
    enclave that had rows of it died, and all of them wait to begin anew.
    """

    WAITING = auto()
    PARTLY = auto()
    INSIDE = auto()
    AGAIN = auto()
    ANSWERED = auto()
    REFUSED = auto()
    CANCELLED = auto()
    GIVEN_UP = auto()


class Step(Enum):
    """What moves a request from one phase to another."""

    TAKE_SOME = auto()
    TAKE_LAST = auto()
    PUT_BACK = auto()
    LOSE = auto()
    ANSWER = auto()
    REFUSE = auto()
    CANCEL = auto()
    GIVE_UP = auto()


NEXT_PHASE: Final[Mapping[tuple[Phase, Step], Phase]] = {
    (Phase.WAITING, Step.TAKE_SOME): Phase.PARTLY,
    (Phase.WAITING, Step.TAKE_LAST): Phase.INSIDE,
    (Phase.WAITING, Step.LOSE): Phase.WAITING,
    (Phase.WAITING, Step.REFUSE): Phase.REFUSED,
    (Phase.PARTLY, Step.TAKE_SOME): Phase.PARTLY,
    (Phase.PARTLY, Step.TAKE_LAST): Phase.INSIDE,
    (Phase.PARTLY, Step.PUT_BACK): Phase.PARTLY,
    (Phase.PARTLY, Step.LOSE): Phase.AGAIN,
    (Phase.INSIDE, Step.PUT_BACK): Phase.PARTLY,
    (Phase.INSIDE, Step.LOSE): Phase.AGAIN,
    (Phase.INSIDE, Step.ANSWER): Phase.ANSWERED,
    (Phase.AGAIN, Step.TAKE_SOME): Phase.PARTLY,
    (Phase.AGAIN, Step.TAKE_LAST): Phase.INSIDE,
    (Phase.AGAIN, Step.LOSE): Phase.AGAIN,
    **{
        (phase, step): end
        for phase in (Phase.WAITING, Phase.PARTLY, Phase.INSIDE, Phase.AGAIN)
        for step, end in ((Step.CANCEL, Phase.CANCELLED), (Step.GIVE_UP, Phase.GIVEN_UP))
    },
}
"""What a request becomes. Whatever is not here can't happen."""


@dataclass(slots=True, eq=False)
class Request:
    """A request that somebody waits for.

    Attributes:
        facts: how it came in.
        left: rows that have not reached the model's end.
        untaken: rows that no run has taken.
        phase: where it is; changed by ``move`` only.
        deaths: enclaves that died while it was in a run.
        alone: it runs in batches of its own, since one that it was in came to nothing.
    """

    facts: Arrived
    left: int
    untaken: int
    phase: Phase = Phase.WAITING
    deaths: int = 0
    alone: bool = False

    def move(self, step: Step) -> None:
        """Go to the next phase."""
        self.phase = NEXT_PHASE[self.phase, step]

    def take(self, rows: int) -> None:
        """A run takes so many rows that none has taken."""
        self.untaken -= rows
        self.move(Step.TAKE_SOME if self.untaken else Step.TAKE_LAST)

    def put_back(self, rows: int) -> None:
        """A run through the first stage came to nothing: so many rows have to be taken again."""
        self.untaken += rows
        self.move(Step.PUT_BACK)

    @property
    def inside(self) -> bool:
        """Whether the enclave knows it."""
        return self.phase in (Phase.PARTLY, Phase.INSIDE)

    @property
    def deadline_s(self) -> float:
        """When its answer is worth nothing any more."""
        return NEVER if self.facts.deadline_s is None else self.facts.deadline_s


@dataclass(slots=True, eq=False)
class StageState:
    """A stage, and the rows that wait at the cut before it.

    Attributes:
        plan: its slices and largest batch.
        load_s: profile's seconds of decrypting what is not pinned of it.
        capacity: rows that there is memory for at the cut before it.
        held: rows that take memory there: on their way to it, waiting at it, or in a run from it.
        waiting: rows at the cut, first come first.
        waiting_rows: how many they are.
        pinned: its slices that need not be loaded.
        profile_s: seconds of computing by rows; exposed_s: of loading that it does not hide;
            sealing_s: of opening and sealing at the model's ends.
        visit_s: what is predicted of visits, by rows; alone_s: of runs; efficiency: of visits, over
            that of full batches (``ModelState.learn``).
        correction: of those; by_rows: of batches of one size, where some have been measured.
        sealing: correction of opening what comes in here, and sealing what leaves.
    """

    plan: Stage
    load_s: float
    capacity: int
    held: int = 0
    waiting: deque[Rows] = field(default_factory=deque)
    waiting_rows: int = 0
    pinned: frozenset[int] = frozenset()
    profile_s: dict[int, float] = field(default_factory=dict)
    exposed_s: dict[int, float] = field(default_factory=dict)
    sealing_s: dict[int, float] = field(default_factory=dict)
    visit_s: dict[int, float] = field(default_factory=dict)
    alone_s: dict[int, float] = field(default_factory=dict)
    efficiency: dict[int, float] = field(default_factory=dict)
    correction: Correction = field(default_factory=Correction)
    by_rows: dict[int, Correction] = field(default_factory=dict)
    sealing: Correction = field(default_factory=Correction)

    def take(self, limit: int) -> Rows:
        """The first request's rows, or so many of them; the others are first now."""
        part = self.waiting.popleft()
        if part.count > limit:
            first, left = part.first + limit, part.count - limit
            self.waiting.appendleft(Rows(part.request, first, left, part.since_s))
            part = Rows(part.request, part.first, limit, part.since_s)
        self.waiting_rows -= part.count
        return part

    def drop(self, request: int) -> None:
        """Its rows do not wait here any more."""
        self.waiting = deque(part for part in self.waiting if part.request != request)
        rows = sum(part.count for part in self.waiting)
        self.held -= self.waiting_rows - rows
        self.waiting_rows = rows

    def clear(self) -> None:
        """The enclave is lost, and with it all rows."""
        self.waiting.clear()
        self.waiting_rows = self.held = 0


@dataclass(slots=True, eq=False)
class ModelState:
    """A model that is served, and its requests outside the enclave.

    ``costs`` are those of the form in which it runs. There are no stages before there is a plan.
    ``limit_s`` is how long its requests may take, the shortest of late; infinite without deadlines.
    ``most``, ``row_s``, ``rests_s`` and ``throughs_s`` are what ``policy.choice`` has reckoned.
    """

    name: str
    costs: ModelCosts
    outside: FairQueue
    stages: list[StageState] = field(default_factory=list)
    limit_s: float = NEVER
    most: tuple[int, float] | None = None
    row_s: float | None = None
    rests_s: list[float] | None = None
    throughs_s: dict[int, float] = field(default_factory=dict)

    def learn(self, stages: Iterable[StageState]) -> None:
        """What was predicted of these stages of it is out of date."""
        for stage in stages:
            stage.visit_s.clear()
            stage.alone_s.clear()
        self._compare_anew()
        self.throughs_s.clear()

    def limited(self, limit_s: float) -> None:
        """A request came in that may take so long; who may take longer relaxes the limit slowly."""
        limit_s = min(limit_s, RELAXED * self.limit_s)
        if limit_s != self.limit_s:
            self.limit_s = limit_s
            self._compare_anew()

    def _compare_anew(self) -> None:
        """Full batches may be others, and with them all that is reckoned against them."""
        self.most = self.row_s = self.rests_s = None
        for stage in self.stages:
            stage.efficiency.clear()

    def divide(self, plan: MemoryPlan | None, load_rate: float) -> None:
        """Take the stages of a plan; only rows that wait to begin anew are carried over."""
        first = self.stages[0] if self.stages else None
        self.stages = []
        self.learn(())
        if plan is None or self.name not in plan.costs:
            return
        self.costs = plan.costs[self.name]
        before: Stage | None = None
        for one in plan.stages[self.name]:
            room = waiting_rows(before, one, plan.lanes) if before else 0
            self.stages.append(StageState(one, 0.0, room))
            before = one
        if first is not None:
            begins = self.stages[0]
            begins.waiting = first.waiting
            begins.waiting_rows = begins.held = first.waiting_rows
        self.weigh(plan, load_rate)

    def weigh(self, plan: MemoryPlan | None, load_rate: float) -> None:
        """What each stage has to load, after pins have moved."""
        assert plan is not None
        pinned = plan.pinned[self.name]
        for stage in self.stages:
            streamed = sum(
                self.costs.slices[n].weight_bytes
                for n in range(stage.plan.first, stage.plan.last)
                if n not in pinned
            )
            stage.load_s = streamed / load_rate
            stage.pinned = pinned
            stage.exposed_s.clear()
        self.learn(self.stages)


class Runs(dict[int, Running]):
    """Runs that have not ended, by number. They begin in that order, as many at once as lanes.

    Attributes:
        lanes: of the plan in force.
        began_s: when those began that have a lane.
    """

    def __init__(self) -> None:
        """None."""
        super().__init__()
        self.lanes = 1
        self.began_s: dict[int, float] = {}

    def begin(self, running: Running, now_s: float) -> None:
        """Another one, which begins now if a lane is free."""
        self[running[0].run] = running
        self._take_lanes(now_s)

    def end(self, number: int, now_s: float) -> Running:
        """One is over, and the first that has no lane begins."""
        ended = self.pop(number)
        self.began_s.pop(number, None)
        self._take_lanes(now_s)
        return ended

    def clear(self) -> None:
        """All are over."""
        super().clear()
        self.began_s.clear()

    def _take_lanes(self, now_s: float) -> None:
        for number in islice(self, self.lanes):
            self.began_s.setdefault(number, now_s)
