"""Local search in large clusters: one server gets other columns, wherever prices say that it pays.

The linear program of what a choice carries is kept and solved again from where it was, so that a
change costs about a millisecond. Its prices say what a request is worth at each cut of each model,
and what a second of each server is: a column whose requests are worth more than the server's time
is tried there. To make room others become leaner, or go.

The sustainable load is the least of all models' loads. Improving one of several poor models doesn't
raise it, so what is maximised here is a concave sum: each step of load that a model gains counts
half as much as the one below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import highspy
import numpy as np
from numpy.typing import NDArray

from lasagna.policy.cluster import Cluster, sliced
from lasagna.policy.columns import Column, room_on
from lasagna.policy.flow import Choice, memory_of

STEPS: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of the bound at which another unit of load is worth half as much."""
WORTH: Final = 0.5
TRIED: Final = 24
"""Columns that are tried first, and then twice as many, as long as none helps."""
EACH: Final = 3
"""Of these, for one server."""
LOSSES: Final = (0.2, float("inf"))
"""Share of a server's time that was used by columns that go for another one: only where nothing
helps that costs no more than the first, what costs more is tried. Of exchanges that throw out two
or more columns, all of a server's work, one in a thousand helps; of those that cost a fifth of its
time at most one in six (experiment 7)."""
GAIN: Final = 1e-6
"""Of the sum that counts as better."""

Array = NDArray[Any]


def exchanged(
    cluster: Cluster,
    choice: Choice,
    columns: Mapping[int, Sequence[Column]],
    bound: float,
    left: Callable[[], bool],
) -> Choice:
    """Change columns one server at a time, as long as that helps.

    Args:
        cluster: servers, models and load; limits of latency are not looked at.
        choice: to begin with.
        columns: of each server, by number, that it may have.
        bound: on the scale.
        left: whether there is time for another attempt.
    """
    return _Exchange(cluster, choice, columns, bound).run(left)


def best_exchanged(
    cluster: Cluster,
    begins: Sequence[Choice],
    columns: Mapping[int, Sequence[Column]],
    bound: float,
    value: Callable[[Choice], float],
    *,
    clock: Callable[[], float],
    until_s: float,
) -> tuple[float, Choice]:
    """The best choice after exchanges from each of several beginnings, which share the time alike.

    Which one is the best shows late: to leave out those that are behind at half-time lost the best.

    Args:
        cluster: as of ``exchanged``, like the next three.
        begins: one or more.
        columns: of each server.
        bound: on the scale.
        value: of a choice; the largest is the best.
        clock: seconds of a steady clock.
        until_s: when to stop, on it.

    Returns:
        Its value, and the choice.
    """

    def before(ends_s: float) -> Callable[[], bool]:
        return lambda: clock() < ends_s

    found: list[tuple[float, Choice]] = []
    for number, begin in enumerate(begins):
        ends_s = clock() + (until_s - clock()) / (len(begins) - number)
        choice = exchanged(cluster, begin, columns, bound, before(ends_s))
        found.append((value(choice), choice))
    return max(found, key=lambda one: one[0])


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns that servers of one kind may have, as arrays."""

    columns: Sequence[Column]
    work_s: Array
    begins: Array
    ends: Array
    firsts: Array
    in_bytes: Array
    out_bytes: Array
    ways: Mapping[tuple[str, int, int], Sequence[Column]]


@dataclass(frozen=True, slots=True)
class _Rank:
    """Columns of a server's table, by their places in it, and what each would gain: most first."""

    places: Array
    gains: Array


class _Exchange:
    def __init__(
        self,
        cluster: Cluster,
        choice: Choice,
        columns: Mapping[int, Sequence[Column]],
        bound: float,
    ) -> None:
        self._cluster = cluster
        self._program = program = _Program(cluster, bound)
        self._here = [list(own) for own in choice.columns]
        self._rooms = [room_on(server) for server in cluster.servers]
        tables: dict[int, _Table] = {}
        self._tables = []
        for number in range(len(cluster.servers)):
            own = columns[number]
            table = tables.get(id(own))
            if table is None:
                ways: dict[tuple[str, int, int], list[Column]] = {}
                for column in sorted(own, key=lambda c: c.work_s):
                    ways.setdefault(_part(column), []).append(column)
                table = tables[id(own)] = _Table(
                    own,
                    np.array([c.work_s for c in own], float),
                    np.array([program.row_of(c.model, c.first) for c in own], int),
                    np.array([program.row_of(c.model, c.last) for c in own], int),
                    np.array([c.first == 0 for c in own], bool),
                    np.array([c.in_bytes for c in own], float),
                    np.array([c.out_bytes for c in own], float),
                    ways,
                )
            self._tables.append(table)
        for number, own_columns in enumerate(self._here):
            for column in own_columns:
                program.put(number, column)
        self._value = program.solve()
        program.keep()

    def run(self, left: Callable[[], bool]) -> Choice:
        ranks, costs = self._ranks(), list(itertools.pairwise((-1.0, *LOSSES)))
        level = 0
        while level < len(costs) and left():
            promising = itertools.takewhile(lambda _: left(), self._promising(ranks))
            if any(self._try(number, column, *costs[level]) for number, column in promising):
                ranks, level = self._ranks(), 0
            else:
                level += 1
        return Choice(tuple(map(tuple, self._here)))

    def _promising(self, ranks: Sequence[_Rank]) -> Iterator[tuple[int, Column]]:
        """Servers with columns that gain most for a second of their time: few of each, then more.

        Args:
            ranks: of each server.
        """
        seen: set[tuple[int, int]] = set()
        every, wide = sum(len(rank.places) for rank in ranks), 1
        while len(seen) < every:
            few = [rank.gains[: EACH * wide] for rank in ranks]
            numbers = np.repeat(np.arange(len(few)), [len(gains) for gains in few])
            places = np.concatenate([rank.places[: EACH * wide] for rank in ranks])
            best = np.argsort(-np.concatenate(few), kind="stable")[: TRIED * wide]
            for one in zip(numbers[best].tolist(), places[best].tolist(), strict=True):
                if one not in seen:
                    seen.add(one)
                    number, place = one
                    column = self._tables[number].columns[place]
                    if column not in self._here[number]:
                        yield number, column
            wide *= 2

    def _ranks(self) -> list[_Rank]:
        """Of each server, by the prices of now."""
        prices = self._program.prices()
        into, out = self._joints()
        tables = {id(table): table for table in self._tables}
        joined = {key: np.flatnonzero(into[t.begins] & out[t.ends]) for key, t in tables.items()}
        worth = {key: self._worth(tables[key], prices)[places] for key, places in joined.items()}
        found = []
        for number, server in enumerate(self._cluster.servers):
            table = self._tables[number]
            places = joined[id(table)]
            time, come, leave = self._program.rows_of(number)
            carried = prices[come] * table.in_bytes[places]
            carried += prices[leave] * table.out_bytes[places]
            gains = (worth[id(table)] - carried / server.bandwidth) / table.work_s[places]
            gains -= prices[time]
            some = np.flatnonzero(gains > GAIN)
            best = some[np.argsort(-gains[some], kind="stable")]
            found.append(_Rank(places[best], gains[best]))
        return found

    def _joints(self) -> tuple[Array, Array]:
        """Of each row, whether requests come to its cut, and whether they go on from there."""
        row_of = self._program.row_of
        into, out = np.zeros((2, self._program.rows + 1), bool)
        out[-1] = True  # row -1: requests that are answered
        for column in {c for here in self._here for c in here}:
            into[row_of(column.model, column.last)] = out[row_of(column.model, column.first)] = True
        into[[row_of(model, 0) for model in self._cluster.wanted]] = True
        return into, out

    def _worth(self, table: _Table, prices: Array) -> Array:
        """Of a request through each column: what it is worth behind it less what it is before."""
        padded = np.append(prices, 0.0)  # row -1: requests that are answered
        before: Array = np.where(table.firsts, padded[table.begins], -padded[table.begins])
        worth: Array = -before - padded[table.ends]
        return worth

    def _try(self, number: int, column: Column, low: float, high: float) -> bool:
        before = self._here[number]
        for cost, after in self._ways(number, column):
            if cost <= low:
                continue
            if cost > high:
                break
            self._swap(number, before, after)
            value = self._program.solve()
            if value > self._value * (1 + GAIN):
                self._value, self._here[number] = value, after
                self._program.keep()
                return True
            self._swap(number, after, before)
        return False

    def _swap(self, number: int, before: Sequence[Column], after: Sequence[Column]) -> None:
        for column in before:
            if column not in after:
                self._program.take(number, column)
        for column in after:
            if column not in before:
                self._program.put(number, column)

    def _ways(self, number: int, column: Column) -> Iterator[tuple[float, list[Column]]]:
        """Sets of columns for a server, with this one among them, and what each costs: least first.

        None is a part of one before it, which could carry no more.

        Args:
            number: of the server.
            column: that it gets.

        Returns:
            Shares of the server's time that those used which go, with those that it has then.
        """
        others = [c for c in self._here[number] if _part(c) != _part(column)]
        if memory_of([*others, column]) <= self._rooms[number]:
            yield 0.0, [*others, column]
            return
        tried = []
        leaner = self._leaner(number, others, column)
        if leaner is not None:
            tried.append(set(leaner))
            yield 0.0, leaner
        busy = {c: self._program.rate(number, c) * c.work_s for c in others}
        used = [c for c in others if busy[c] > 1e-9]
        idlest = sorted(others, key=busy.__getitem__)
        for kept in (used, *([c for c in others if c is not gone] for gone in idlest), []):
            part = any(known.issuperset(kept) for known in tried)
            if not part and memory_of([*kept, column]) <= self._rooms[number]:
                tried.append(set(kept))
                yield sum(busy[c] for c in others if c not in kept), [*kept, column]

    def _leaner(self, number: int, others: Sequence[Column], column: Column) -> list[Column] | None:
        """All of them, in ways that take less memory where they must."""
        here = list(others)
        for index, other in enumerate(others):
            for way in self._tables[number].ways[_part(other)]:
                if way.alone_bytes >= here[index].alone_bytes:
                    continue
                here[index] = way
                if memory_of([*here, column]) <= self._rooms[number]:
                    return [*here, column]
        return None


class _Program:
    """The linear program of all columns that were ever tried; those that are out carry nothing."""

    def __init__(self, cluster: Cluster, bound: float) -> None:
        self._cluster = cluster
        self._highs = highspy.Highs()  # type: ignore[no-untyped-call] # its stub lacks it
        self._highs.silent()
        self._highs.setOptionValue("threads", 1)
        self._highs.changeObjectiveSense(highspy.ObjSense.kMaximize)
        self._slices = {name: len(sliced(cluster.models[name]).slices) for name in cluster.wanted}
        self._rows: dict[tuple[str, int], int] = {}
        self._known: dict[tuple[int, Column], int] = {}
        self._values: Sequence[float] = []
        self._prices: Array = np.array([])
        none = np.array([], np.int32)
        for _ in range(3 * len(cluster.servers)):
            self._highs.addRow(-highspy.kHighsInf, 1.0, 0, none, none.astype(float))
        self.rows = 3 * len(cluster.servers)
        edges = [0.0, *STEPS]
        for model in cluster.wanted:
            source = self.row_of(model, 0)
            for step, (low, high) in enumerate(itertools.pairwise(edges)):
                self._column(WORTH**step, bound * (high - low), [source], [-cluster.demand[model]])
            self._column(WORTH ** len(STEPS), highspy.kHighsInf, [source], [-cluster.demand[model]])

    def rows_of(self, number: int) -> tuple[int, int, int]:
        """Of a server's time, and its link in both directions."""
        return 3 * number, 3 * number + 1, 3 * number + 2

    def row_of(self, model: str, cut: int) -> int:
        """Of requests at a cut; -1 where they are answered."""
        if cut == self._slices[model]:
            return -1
        row = self._rows.get((model, cut))
        if row is None:
            none = np.array([], np.int32)
            self._highs.addRow(0.0, 0.0, 0, none, none.astype(float))
            row = self._rows[model, cut] = self.rows
            self.rows += 1
        return row

    def put(self, number: int, column: Column) -> None:
        """A server has a column."""
        index = self._known.get((number, column))
        if index is None:
            server = self._cluster.servers[number]
            time, come, leave = self.rows_of(number)
            rows = [time, come, leave, self.row_of(column.model, column.first)]
            values = [
                column.work_s,
                column.in_bytes / server.bandwidth,
                column.out_bytes / server.bandwidth,
                -1.0 if column.first else 1.0,
            ]
            end = self.row_of(column.model, column.last)
            if end >= 0:
                rows.append(end)
                values.append(1.0)
            self._known[number, column] = self._column(0.0, highspy.kHighsInf, rows, values)
        else:
            self._highs.changeColBounds(index, 0.0, highspy.kHighsInf)

    def take(self, number: int, column: Column) -> None:
        """A server has it no more."""
        self._highs.changeColBounds(self._known[number, column], 0.0, 0.0)

    def rate(self, number: int, column: Column) -> float:
        """Requests a second through a column, of the solution that was kept."""
        return self._values[self._known[number, column]]

    def solve(self) -> float:
        """The sum that is maximised; minus infinity if the solver doesn't find its optimum."""
        self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return -float("inf")
        return float(self._highs.getInfo().objective_function_value)

    def keep(self) -> None:
        """The last solution is the one to go on from: others are only tried."""
        solution = self._highs.getSolution()
        self._values, self._prices = list(solution.col_value), np.array(solution.row_dual)

    def prices(self) -> Array:
        """Of each row, in the solution that was kept: what one more of it would be worth."""
        return self._prices

    def _column(
        self, gain: float, most: float, rows: Sequence[int], values: Sequence[float]
    ) -> int:
        indices = np.array(rows, np.int32)
        self._highs.addCol(gain, 0.0, most, len(rows), indices, np.array(values, float))
        return int(self._highs.getNumCol()) - 1


def _part(column: Column) -> tuple[str, int, int]:
    return column.model, column.first, column.last
