"""Which visit is best now: urgent ones first, then the most efficient. Reads the state only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final

from lasagna.policy.predictions import Predictions
from lasagna.policy.stages import ROWS
from lasagna.policy.state import NEVER, ModelState, Request, Runs, StageState

TURNS: Final = 0.5
"""Share of the time that a request may take, for one pass: it waits for another one at worst."""
_OVERDUE, _URGENT, _EFFICIENT = 0.0, 1.0, 2.0
"""Why a visit goes first; the least does."""


class Choice:
    """Compares visits by what they are predicted to take. See ``policy.scheduler`` for the rule."""

    def __init__(
        self, predictions: Predictions, patience_s: float, *, in_order: bool = False
    ) -> None:
        """Nothing is planned.

        Args:
            predictions: of the times that runs take.
            patience_s: who has waited so long is urgent.
            in_order: who came first goes first, whatever that costs.
        """
        self._in_order = in_order
        self._predictions = predictions
        self._visit_s = predictions.visit_s
        self._lanes = predictions.machine.lanes
        self._patience_s = patience_s
        self._longest_s = 0.0

    def planned(self, models: Iterable[ModelState]) -> None:
        """Stages are new: how long may one visit keep others waiting?"""
        visits = [
            self._predictions.alone_s(model, stage, stage.plan.rows)
            for model in models
            for stage in model.stages
        ]
        self._lanes = self._predictions.machine.lanes
        self._longest_s = max(visits, default=0.0)

    def rests_s(self, model: ModelState) -> list[float]:
        """Seconds that a row takes of the server from each stage to the end, in full batches.

        A batch is full when it has as many rows as deadlines allow (``full``).
        """
        if model.rests_s is None:
            own_s = [
                self._visit_s(model, one, self.full(model, one)) / self.full(model, one)
                for one in model.stages
            ]
            model.rests_s = list(accumulate(reversed(own_s)))[::-1]
        return model.rests_s

    def backlog_s(self, models: Iterable[ModelState], running: Runs, now_s: float) -> float:
        """Work of all rows that wait or run, in seconds of the whole server.

        Args:
            models: that are served.
            running: runs; those that have a lane each do its share of the server's work.
            now_s: the time.
        """
        total = 0.0
        for model in models:
            rests_s = model.rests_s or self.rests_s(model)
            if not rests_s:
                continue
            total += model.outside.rows * rests_s[0]
            inside = 0.0
            for stage, rest_s in zip(model.stages, rests_s, strict=True):
                inside += stage.waiting_rows * rest_s
            total += inside
        for number, (_, model, index, rows) in running.items():
            rests_s = model.rests_s or self.rests_s(model)
            after_s = rests_s[index + 1] if index + 1 < len(rests_s) else 0.0
            done_s = max(0.0, now_s - running.began_s.get(number, now_s)) / self._lanes
            total += rows * after_s + max(0.0, rows * (rests_s[index] - after_s) - done_s)
        return total

    def _gather_s(self, model: ModelState, stage: StageState) -> float:
        """Seconds in which a full batch comes together, when the server does nothing else."""
        return self._lanes * self.full(model, stage) * self.row_s(model)

    def row_s(self, model: ModelState) -> float:
        """Seconds that a row takes of the server, when all batches are full."""
        if model.row_s is None:
            rests_s = self.rests_s(model)
            model.row_s = rests_s[0] if rests_s else 0.0
        return model.row_s

    def limit(self, model: ModelState, limit_s: float) -> None:
        """A request came in that may take so long.

        One that would be late even alone says nothing: no batch is small enough for it.
        """
        if limit_s > self.through_s(model, 0):
            model.limited(limit_s)

    def full(self, model: ModelState, stage: StageState) -> int:
        """Rows of a full batch at a stage: the plan's, or fewer so that deadlines can be met."""
        if model.limit_s == NEVER:
            return stage.plan.rows
        return min(stage.plan.rows, self._most(model)[0])

    def answer_s(self, model: ModelState, now_s: float, wait_s: float, *, idle: bool) -> float:
        """When a request that comes in now would be answered: in a full batch, if it has to wait.

        Args:
            model: that it is for.
            now_s: the time.
            wait_s: seconds of work before it.
            idle: whether nothing waits or runs; what runs longer than predicted has 0 s left.
        """
        turn_s = self.through_s(model, 0) if idle else self._most(model)[1]
        return now_s + wait_s + turn_s

    def _most(self, model: ModelState) -> tuple[int, float]:
        """The most rows that pass all stages together in their share of the time; and that pass."""
        if model.most is None:
            passes = ((rows, self._pass_s(model, rows)) for rows in reversed(ROWS))
            within = (one for one in passes if one[1] <= TURNS * model.limit_s)
            model.most = next(within, (1, self._pass_s(model, 1)))
        return model.most

    def _pass_s(self, model: ModelState, rows: int) -> float:
        """Seconds in which so many rows pass all stages together."""
        total = 0.0
        for stage in model.stages:
            each = min(rows, stage.plan.rows)
            total += -(-rows // each) * self._predictions.alone_s(model, stage, each)
        return total

    def through_s(self, model: ModelState, index: int) -> float:
        """Seconds that a row needs from this stage to the end, alone."""
        found = model.throughs_s.get(index)
        if found is None:
            found = sum(
                self._predictions.alone_s(model, stage, 1) for stage in model.stages[index:]
            )
            model.throughs_s[index] = found
        return found

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
        found: list[tuple[ModelState, int, int]] = []
        for model in models:
            for index, stage in enumerate(model.stages):
                rows = stage.waiting_rows
                if admit and not index:
                    rows += model.outside.rows
                if not rows:
                    continue
                rows = min(rows, self._lanes * self.full(model, stage))
                if index + 1 < len(model.stages):
                    following = model.stages[index + 1]
                    rows = min(rows, following.capacity - following.held)
                if rows > 0:
                    found.append((model, index, rows))
        if not found:
            return None
        if len(found) == 1 and found[0][0].limit_s == NEVER:
            return found[0]
        ranks = [self._rank(*one, requests, now_s) for one in found]
        least = min(ranks)
        model, index, rows = found[ranks.index(least)]
        if least[0] == _URGENT:
            rows = self._in_time(model, index, rows, least[1] - now_s)
        return model, index, rows

    def _in_time(self, model: ModelState, index: int, rows: int, left_s: float) -> int:
        """The most rows of these that leave the first one time to meet its deadline."""
        stage = model.stages[index]
        left_s -= self.through_s(model, index + 1)
        for fewer in sorted({rows, *(each * self._lanes for each in ROWS)}, reverse=True):
            each = -(-fewer // self._lanes)
            if fewer <= rows and self._predictions.alone_s(model, stage, each) <= left_s:
                return fewer
        return 1

    def efficiency(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Share of a visit's time that its rows would need in full batches."""
        full, each = self.full(model, stage), -(-rows // self._lanes)
        full_s, each_s = self._visit_s(model, stage, full), self._visit_s(model, stage, each)
        return round(rows / (self._lanes * full) * full_s / each_s, 6)

    def _rank(
        self,
        model: ModelState,
        index: int,
        rows: int,
        requests: Mapping[int, Request],
        now_s: float,
    ) -> tuple[float, ...]:
        stage = model.stages[index]
        since_s, deadline_s, behind = NEVER, NEVER, 0.0
        if stage.waiting:
            first = requests[stage.waiting[0].request]
            since_s, deadline_s = stage.waiting[0].since_s, first.deadline_s
            if self._in_order:
                since_s = first.facts.at_s
            waited_s = now_s - since_s
            overdue = waited_s >= self._patience_s and waited_s >= self._gather_s(model, stage)
        else:
            oldest = model.outside.oldest()
            assert oldest is not None
            since_s, deadline_s = oldest.since_s, oldest.deadline_s
            overdue = model.outside.overdue(now_s, self._patience_s)
            behind = 0.0 if overdue else model.outside.behind()
        if self._in_order or overdue:
            return (_OVERDUE, since_s)
        if deadline_s < NEVER:
            slack_s = deadline_s - now_s - self.through_s(model, index)
            if 0.0 <= slack_s <= self._longest_s:  # later is too late, and now is not
                return (_URGENT, deadline_s)
        efficiency = stage.efficiency.get(rows)
        if efficiency is None:
            efficiency = stage.efficiency[rows] = self.efficiency(model, stage, rows)
        return (_EFFICIENT, -efficiency, -index, behind, since_s)
