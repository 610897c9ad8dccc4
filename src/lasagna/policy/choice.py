"""Which visit is best now: urgent ones first, then the most efficient. Reads the state only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from lasagna.policy.costs import Correction
from lasagna.policy.stages import Machine, alone_s, visit_s
from lasagna.policy.state import NEVER, ModelState, Request, StageState

ERRORS_KEPT: Final = 1000
"""Of the last predictions."""


class Choice:
    """Predicts visits and compares them. See ``policy.scheduler`` for the rule."""

    def __init__(self, machine: Machine, patience_s: float, *, in_order: bool = False) -> None:
        """Nothing is planned.

        Args:
            machine: that it is for.
            patience_s: who has waited so long is urgent.
            in_order: who came first goes first, whatever that costs.
        """
        self._in_order = in_order
        self._machine = machine
        self.loading = Correction()
        self.errors: deque[float] = deque(maxlen=ERRORS_KEPT)
        self._patience_s = patience_s
        self._longest_s = 0.0

    def planned(self, models: Iterable[ModelState], machine: Machine) -> None:
        """Stages and shape are new: how long may one visit keep others waiting?"""
        self._machine = machine
        visits = [
            self._alone_s(model, stage, stage.plan.rows)
            for model in models
            for stage in model.stages
        ]
        self._longest_s = max(visits, default=0.0)

    def profile_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of computing on one lane that the profile says."""
        found = stage.profile_s.get(rows)
        if found is None:
            first, last = stage.plan.first, stage.plan.last
            found = self._machine.batch_s(
                model.costs.compute_at(first, last, rows), model.costs.compute_at(first, last, 1)
            )
            stage.profile_s[rows] = found
        return found

    def compute_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of computing, as far as is known: by batches of this size, else by all."""
        known = stage.by_rows.get(rows, stage.correction)
        return known.factor * self.profile_s(model, stage, rows)

    def note(self, model: ModelState, stage: StageState, rows: int, measured_s: float) -> None:
        """A run has taken so long on its thread."""
        profile_s = self.profile_s(model, stage, rows)
        if profile_s <= 0.0 or measured_s <= 0.0:
            return
        if stage.correction.measured:
            self.errors.append(abs(self.compute_s(model, stage, rows) / measured_s - 1.0))
        own = stage.by_rows.setdefault(rows, Correction(stage.correction.factor))
        own.note(profile_s, measured_s)
        stage.correction.note(profile_s, measured_s)

    def _alone_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds from the start of a run to its end."""
        load_s = self.loading.factor * stage.load_s
        return alone_s(self.compute_s(model, stage, rows), load_s, self._machine)

    def _visit_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of the server for one run of a gang."""
        load_s = self.loading.factor * stage.load_s
        return visit_s(self.compute_s(model, stage, rows), load_s, self._machine)

    def row_s(self, model: ModelState) -> float:
        """Seconds that a row takes of the server, when all batches are full."""
        return sum(
            self._visit_s(model, stage, stage.plan.rows) / stage.plan.rows for stage in model.stages
        )

    def through_s(self, model: ModelState, index: int) -> float:
        """Seconds that a row needs from this stage to the end, alone."""
        return sum(self._alone_s(model, stage, 1) for stage in model.stages[index:])

    def best(
        self,
        models: Iterable[ModelState],
        requests: Mapping[int, Request],
        now_s: float,
        *,
        admit: bool,
    ) -> tuple[ModelState, int, int] | None:
        """The visit to start now: its model, the number of its stage, rows; None if there is none.

        Args:
            models: that are served.
            requests: by id.
            now_s: the time.
            admit: whether rows may come in from outside.
        """
        found: tuple[ModelState, int, int] | None = None
        least: tuple[float, ...] = ()
        for model in models:
            for index, stage in enumerate(model.stages):
                outside = model.outside.rows if admit and not index else 0
                rows = min(stage.waiting_rows + outside, self._machine.lanes * stage.plan.rows)
                if index + 1 < len(model.stages):
                    following = model.stages[index + 1]
                    rows = min(rows, following.capacity - following.held)
                if rows <= 0:
                    continue
                rank = self._rank(model, index, rows, requests, now_s)
                if found is None or rank < least:
                    found, least = (model, index, rows), rank
        return found

    def _rank(
        self,
        model: ModelState,
        index: int,
        rows: int,
        requests: Mapping[int, Request],
        now_s: float,
    ) -> tuple[float, ...]:
        stage = model.stages[index]
        since_s, deadline_s = NEVER, NEVER
        if stage.waiting:
            first = requests[stage.waiting[0].request]
            since_s, deadline_s = first.facts.at_s, first.deadline_s
        elif (oldest := model.outside.oldest()) is not None:
            since_s, deadline_s = oldest.since_s, oldest.deadline_s
        if self._in_order or now_s - since_s >= self._patience_s:
            return (0.0, since_s)
        if deadline_s < NEVER:
            slack_s = deadline_s - now_s - self.through_s(model, index)
            if 0.0 <= slack_s <= self._longest_s:  # later is too late, and now is not
                return (1.0, deadline_s)
        full, each = stage.plan.rows, -(-rows // self._machine.lanes)
        share = rows / (self._machine.lanes * full)
        efficiency = share * self._visit_s(model, stage, full) / self._visit_s(model, stage, each)
        return (2.0, -round(efficiency, 6), -index, since_s)
