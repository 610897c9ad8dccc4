"""The local task scheduler: what runs next in one enclave. Pure: events in, commands out.

The theory. A model is a chain of *stages* (``policy.memory``): runs of slices with a largest batch
each. A request's rows go from stage to stage; between two of them they wait at a *cut*, in enclave
memory. A *visit* takes rows that wait at one cut through their stage, in one entry. What a visit
costs grows slowly with its rows where loading weights is most of it, so it pays to gather; but
gathering takes memory and time.

So whenever a place is free, the visit is chosen

1. that is *urgent*: the one that has waited longest, or whose first request's deadline is nearest,
   if waiting for one more visit might be too much; it takes no more rows than leave it time;
2. else the most *efficient*: the share of its time that its rows would need in full batches;
   where two are alike the later stage, which frees memory, then whose tenant is further behind,
   then the one that has waited longer.

Nothing waits for a batch to fill while the enclave is idle: an inefficient visit is better than
none. A stage may bring no more rows to a cut than the plan has memory for. Requests wait for the
first stage outside the enclave; which of them are taken is decided by priority and then by
start-time fair queueing over tenants (``policy.fair``), so at saturation each tenant gets its
share. Nobody starves: who has waited for longer than the patience goes before all others, at each
cut (inside, if a full batch could have come together meanwhile; outside, every sixteenth request at
most, or shares would mean nothing at saturation). So a request waits for the patience or a batch,
and for those before it, once at each of its stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, assert_never

from lasagna.policy.arranging import Arranger
from lasagna.policy.choice import Choice
from lasagna.policy.costs import Forms
from lasagna.policy.events import (
    Answer,
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
    ModelRemoved,
    Moved,
    Planned,
    Ran,
    Refuse,
    Rows,
    Run,
    RunFailed,
)
from lasagna.policy.fair import FairQueue, Shares, Waiting
from lasagna.policy.memory import require_fits
from lasagna.policy.plan import MemoryPlan
from lasagna.policy.predictions import PredictionErrors, Predictions
from lasagna.policy.stages import Machine
from lasagna.policy.state import ModelState, Phase, Request, Runs, Settings, Step
from lasagna.policy.story import Stories

DEATHS: Final = 2
"""So many enclaves may die with a request in a run before it is given up."""


class Scheduler:
    """One enclave's scheduler. ``handle`` is the only thing that changes it."""

    def __init__(self, machine: Machine, settings: Settings) -> None:
        """No enclave runs, and no model is known.

        Args:
            machine: memory, threads and rates, with a lane for each thread.
            settings: what the operator chose.
        """
        self._machine = machine
        self._settings = settings
        self._shares = Shares(settings.weights)
        self._models: dict[str, ModelState] = {}
        self._forms: dict[str, Forms] = {}
        self._requests: dict[int, Request] = {}
        self._running = Runs()
        self._runs = self._deaths = 0
        self._arranger = Arranger(machine, settings.style)
        self._predictions = Predictions(machine)
        self._choice = Choice(self._predictions, settings.patience_s, in_order=settings.in_order)
        self.stories = Stories(settings.stories)

    @property
    def plan(self) -> MemoryPlan | None:
        """How the memory is divided now."""
        return self._arranger.present

    @property
    def prediction_errors(self) -> PredictionErrors:
        """How far predictions of runs' times were off of late."""
        return self._predictions.errors

    @property
    def slowness(self) -> float:
        """Measured over predicted seconds of computing of late."""
        return self._predictions.slowness

    @property
    def waiting_rows(self) -> int:
        """Rows outside the enclave."""
        return sum(model.outside.rows for model in self._models.values())

    def require_fits(self, models: Mapping[str, Forms]) -> None:
        """Check that these models fit together, in a shape that the enclave has or may take.

        Raises:
            BudgetError: they don't.
        """
        require_fits(models, self._arranger.shapes[-1], self._settings.style)

    def handle(self, event: Event) -> list[Command]:
        """Take note of a fact.

        Returns:
            What has to be done now, in this order.

        Raises:
            BudgetError: an added model doesn't fit; nothing has changed.
        """
        commands: list[Command] = []
        match event:
            case Arrived():
                self._arrived(event, commands)
            case Ran():
                self._ran(event, commands)
            case Cancelled():
                self._leave(event.request, Step.CANCEL, commands)
            case RunFailed():
                self._failed(event, commands)
            case ModelAdded():
                self._added(event)
            case ModelRemoved():
                self._removed(event, commands)
            case Moved():
                self._moved(event)
            case EnclaveLost():
                self._lost(commands)
            case EnclaveReady():
                self._arranger.enclave_ready()
            case Planned():
                self._arranger.planned(event)
            case Arranged():
                self._arranger.arranged(event.at_s, failed=event.failed)
            case _:
                assert_never(event)
        self._dispatch(event.at_s, commands)
        self.stories.record(event, commands)
        return commands

    # Requests.

    def _arrived(self, event: Arrived, out: list[Command]) -> None:
        model = self._models.get(event.model)
        assert event.request not in self._requests
        assert event.rows >= 1
        if model is None:
            out.append(GiveUp(event.request, f"no model {event.model!r} is served here"))
            return
        request = Request(event, event.rows, event.rows)
        if self.waiting_rows + event.rows > self._settings.queue_rows:
            reason = f"{self.waiting_rows} rows wait, the limit is {self._settings.queue_rows}"
            self._refuse(request, self.backlog_s(event.at_s), reason, out)
            return
        deadline_s = request.deadline_s
        self._choice.limit(model, deadline_s - event.at_s)
        if event.deadline_s is not None:
            wait_s = self.backlog_s(event.at_s)
            idle = not self._running and not self._requests
            if self._choice.answer_s(model, event.at_s, wait_s, idle=idle) > deadline_s:
                reason = f"it would be answered after its deadline: {wait_s:.3g} s of work wait"
                self._refuse(request, wait_s, reason, out)
                return
        self._requests[event.request] = request
        self._arranger.arrived(event.model, event.rows, event.at_s)
        waiting = Waiting(
            event.request, event.tenant, event.priority, event.at_s, deadline_s, 0, event.rows
        )
        model.outside.push(waiting)

    def _refuse(self, request: Request, wait_s: float, reason: str, out: list[Command]) -> None:
        request.move(Step.REFUSE)
        out.append(Refuse(request.facts.request, wait_s, reason))

    def _leave(self, request: int, step: Step, out: list[Command]) -> None:
        """The request is no longer waited for, whatever has become of it."""
        if (gone := self._requests.pop(request, None)) is None:
            return
        known = gone.inside
        gone.move(step)
        model = self._models[gone.facts.model]
        model.outside.remove(request)
        for stage in model.stages:
            stage.drop(request)
        if known:
            out.append(Forget(request))

    def _give_up(self, request: int, reason: str, out: list[Command]) -> None:
        self._leave(request, Step.GIVE_UP, out)
        out.append(GiveUp(request, reason))

    # Runs.

    def _ran(self, event: Ran, out: list[Command]) -> None:
        run, model, index, rows = self._running.end(event.run, event.at_s)
        stage = model.stages[index]
        if self._predictions.note(model, stage, rows, event):
            for one in self._models.values():
                one.learn(one.stages)
        stage.held -= rows
        following = model.stages[index + 1] if index + 1 < len(model.stages) else None
        for part in run.batch:
            request = self._requests.get(part.request)
            if following is not None and request is not None:
                moved = Rows(part.request, part.first, part.count, event.at_s)
                following.waiting.append(moved)
                following.waiting_rows += part.count
            elif following is not None:
                following.held -= part.count
            elif request is not None:
                request.left -= part.count
                if not request.left:
                    request.move(Step.ANSWER)
                    del self._requests[part.request]
                    out.append(Answer(part.request))

    def _failed(self, event: RunFailed, out: list[Command]) -> None:
        run, model, index, rows = self._running.end(event.run, event.at_s)
        stage = model.stages[index]
        if index + 1 < len(model.stages):
            model.stages[index + 1].held -= rows
        alone = len({part.request for part in run.batch}) == 1
        for part in reversed(run.batch):
            request = self._requests.get(part.request)
            if request is None:
                stage.held -= part.count
                continue
            request.alone = True
            if not index:
                request.put_back(part.count)
            stage.waiting.appendleft(part)
            stage.waiting_rows += part.count
        if alone and run.batch[0].request in self._requests:
            self._give_up(run.batch[0].request, "the enclave can't run it", out)

    def _lost(self, out: list[Command]) -> None:
        """Rows in the enclave begin anew, in the order of their requests, and alone if suspect."""
        suspects = {part.request for run, *_ in self._running.values() for part in run.batch}
        self._running.clear()
        self._deaths += 1
        self._arranger.enclave_lost()
        for model in self._models.values():
            for stage in model.stages:
                stage.clear()
        for number in sorted(self._requests):
            request = self._requests[number]
            request.deaths += number in suspects
            request.alone |= number in suspects
            request.move(Step.LOSE)
            if request.deaths >= DEATHS:
                self._give_up(number, "the enclave died twice with this request in it", out)
            elif request.phase is Phase.AGAIN:
                self._begin_anew(request)

    def _begin_anew(self, request: Request) -> None:
        model = self._models[request.facts.model]
        model.outside.remove(request.facts.request)
        request.left = request.untaken = request.facts.rows
        first = model.stages[0]
        facts = request.facts
        first.waiting.append(Rows(facts.request, 0, request.left, facts.at_s))
        first.waiting_rows += request.left
        first.held += request.left

    # Models and memory.

    def _added(self, event: ModelAdded) -> None:
        assert event.model not in self._models
        forms = {**self._forms, event.model: event.forms}
        self.require_fits(forms)
        self._forms = forms
        outside = FairQueue(self._shares)
        self._models[event.model] = ModelState(event.model, event.forms[0], outside)
        self._arranger.models_changed()

    def _removed(self, event: ModelRemoved, out: list[Command]) -> None:
        for number in [n for n, r in self._requests.items() if r.facts.model == event.model]:
            self._give_up(number, f"model {event.model!r} is no longer served", out)
        del self._models[event.model]
        self._forms = {name: forms for name, forms in self._forms.items() if name != event.model}
        self._arranger.models_changed()

    def _moved(self, event: Moved) -> None:
        changed = self._arranger.moved(failed=event.failed)
        if changed is not None and changed in self._models:
            self._models[changed].weigh(self._arranger.present, self._machine.load_rate)

    def _new_stages(self) -> None:
        """The memory is divided anew; nothing is in the enclave."""
        for model in self._models.values():
            model.divide(self._arranger.present, self._machine.load_rate)
        self._predictions.machine = self._arranger.machine
        self._running.lanes = self._arranger.machine.lanes
        self._choice.planned(self._models.values())

    # What runs next.

    def _dispatch(self, now_s: float, out: list[Command]) -> None:
        """Fill the enclave's places: a gang that runs, and one more, to be loaded ahead for.

        A gang is a run on each lane of the same stage, so that one load of weights serves all.
        """
        if self._arranger.step(self._forms, now_s, self._inside, out):
            self._new_stages()
        lanes, most = self._arranger.machine.lanes, self._arranger.machine.most_runs
        while self._arranger.open and len(self._running) + lanes <= most:
            if self._deaths and any(
                self._exclusive(run.batch[0].request) for run, *_ in self._running.values()
            ):
                return
            visit = self._choice.best(
                self._models.values(), self._requests, now_s, admit=self._arranger.admits
            )
            if visit is None:
                return
            model, index, rows = visit
            if self._deaths and self._running and self._exclusive(self._head(model, index, now_s)):
                return
            for lane in range(lanes):
                share = min(model.stages[index].plan.rows, -(-rows // (lanes - lane)))
                if share:
                    out.append(run := self._start(model, index, share, now_s))
                    rows -= self._running[run.run][3]
                    if self._deaths and self._exclusive(run.batch[0].request):
                        return

    def _inside(self) -> bool:
        """Whether the enclave has rows. Those that begin anew wait outside of it."""
        stages = (stage for model in self._models.values() for stage in model.stages[1:])
        return bool(self._running) or any(stage.held for stage in stages)

    def _exclusive(self, number: int) -> bool:
        """Whether nothing may run beside this request: an enclave died with it before."""
        request = self._requests.get(number)
        return request is not None and request.deaths > 0

    def _head(self, model: ModelState, index: int, now_s: float) -> int:
        stage = model.stages[index]
        if stage.waiting:
            return stage.waiting[0].request
        head = model.outside.head(now_s, self._settings.patience_s)
        assert head is not None
        return head.request

    def _start(self, model: ModelState, index: int, rows: int, now_s: float) -> Run:
        """Take rows from the cut, and from outside if that is the first one, into a run."""
        stage = model.stages[index]
        batch: list[Rows] = []
        left, alone = rows, False
        while left and not alone:
            if not stage.waiting and (index or not model.outside.rows):
                break
            alone = self._requests[self._head(model, index, now_s)].alone
            if alone and batch:
                break
            batch.append(self._take(model, index, left, now_s))
            left -= batch[-1].count
        if index + 1 < len(model.stages):
            model.stages[index + 1].held += rows - left
        self._runs += 1
        run = Run(self._runs, model.name, stage.plan.first, stage.plan.last, tuple(batch))
        self._running.begin((run, model, index, rows - left), now_s)
        return run

    def _take(self, model: ModelState, index: int, limit: int, now_s: float) -> Rows:
        stage = model.stages[index]
        if stage.waiting:
            part = stage.take(limit)
            if not index:
                self._requests[part.request].take(part.count)
            return part
        head = model.outside.head(now_s, self._settings.patience_s)
        assert head is not None
        count = min(head.rows, limit)
        part = Rows(head.request, head.first, count, head.since_s)
        model.outside.take(head, count, count * self._choice.row_s(model))
        stage.held += count
        self._requests[part.request].take(count)
        return part

    def backlog_s(self, now_s: float) -> float:
        """Work of all rows that wait or run, in seconds of the whole server from then on."""
        return self._choice.backlog_s(self._models.values(), self._running, now_s)
