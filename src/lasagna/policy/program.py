"""A linear or mixed-integer program, built row by row and solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import highspy
import numpy as np

INFINITE: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Ends:
    """When the search for a solution ends at the latest, with the best one that was found.

    Attributes:
        after_s: by the clock.
        nodes: of the branch-and-bound tree: as many each time, whatever else the machine does.
    """

    after_s: float = 1e9
    nodes: int | None = None

    @classmethod
    def after(cls, seconds: float, nodes: int | None) -> Ends:
        """After so many nodes, if they are given, and else after so many seconds."""
        return cls(seconds) if nodes is None else cls(nodes=nodes)


NEVER: Final = Ends()


@dataclass(frozen=True, slots=True)
class Solved:
    """A solution.

    Attributes:
        objective: that it reaches.
        values: of the variables.
        reduced: cost of each variable at the optimum of a linear program: how much the objective
            would lose by one more of it; empty for integer ones.
    """

    objective: float
    values: Sequence[float]
    reduced: Sequence[float]


@dataclass(slots=True)
class Program:
    """Maximise a sum over variables within rows."""

    _costs: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integers: list[int] = field(default_factory=list)
    _rows: list[tuple[float, float]] = field(default_factory=list)
    _starts: list[int] = field(default_factory=lambda: [0])
    _indices: list[int] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)

    def variable(
        self,
        gain: float = 0.0,
        lower: float = 0.0,
        upper: float = INFINITE,
        *,
        integer: bool = False,
    ) -> int:
        """A new variable, with what one of it adds to the objective; its number."""
        if integer:
            self._integers.append(len(self._costs))
        self._costs.append(gain)
        self._lower.append(lower)
        self._upper.append(upper)
        return len(self._costs) - 1

    def row(self, terms: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        """The sum of these variables, each times its factor, is from lower to upper."""
        for index, value in terms:
            self._indices.append(index)
            self._values.append(value)
        self._starts.append(len(self._indices))
        self._rows.append((lower, upper))

    def solve(
        self,
        *,
        ends: Ends = NEVER,
        gap: float = 0.0,
        start: Mapping[int, float] | None = None,
    ) -> Solved | None:
        """The best solution that is found in the time; None if there is none.

        Args:
            ends: when HiGHS is to end at the latest.
            gap: share of the objective that the solution may fall short of the bound by.
            start: values of a solution to begin with, for integer programs; the others are 0.
        """
        highs = highspy.Highs()  # type: ignore[no-untyped-call] # its stub lacks the annotation
        highs.silent()
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("random_seed", 1)
        highs.setOptionValue("time_limit", ends.after_s)
        if ends.nodes is not None:
            highs.setOptionValue("mip_max_nodes", ends.nodes)
        highs.setOptionValue("mip_rel_gap", gap)
        highs.passModel(self._model())
        if start:
            given = highspy.HighsSolution()
            given.col_value = [start.get(index, 0.0) for index in range(len(self._costs))]
            highs.setSolution(given)
        highs.run()
        info, solution = highs.getInfo(), highs.getSolution()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        whole = not self._integers
        return Solved(
            info.objective_function_value,
            list(solution.col_value),
            list(solution.col_dual) if whole else [],
        )

    def _model(self) -> highspy.HighsLp:
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self._costs), len(self._rows)
        model.sense_ = highspy.ObjSense.kMaximize
        model.col_cost_ = np.array(self._costs)
        model.col_lower_, model.col_upper_ = np.array(self._lower), np.array(self._upper)
        bounds = np.array(self._rows).reshape(-1, 2)
        model.row_lower_, model.row_upper_ = bounds[:, 0].copy(), bounds[:, 1].copy()
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self._starts)
        model.a_matrix_.index_ = np.array(self._indices)
        model.a_matrix_.value_ = np.array(self._values)
        if self._integers:
            kinds = [highspy.HighsVarType.kContinuous] * len(self._costs)
            for index in self._integers:
                kinds[index] = highspy.HighsVarType.kInteger
            model.integrality_ = kinds
        return model
