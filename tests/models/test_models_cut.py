"""Cutting: against brute force on small graphs, and the limits on any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from lasagna.errors import ModelError
from lasagna.models.cut import (
    CUT_COST_BYTES,
    LONGEST_SLICE,
    cut_graph,
    held_bytes,
    needed_memory,
    segments,
)
from lasagna.models.graph import Graph, uses
from lasagna.models.shapes import TensorInfo
from lasagna.package.format import TensorSpec

SCALE = 50_000
"""Sizes are multiples of this, so that they weigh as much as the cost of a cut."""


@dataclass(frozen=True)
class Tensor:
    """A computed tensor: node numbers from -1 (an input) to the node count (an output)."""

    made: int
    last: int
    size: int
    separable: bool


@dataclass(frozen=True)
class Case:
    graph: Graph
    tensors: dict[str, TensorInfo]
    weight_limit: int
    memory_limit: int

    @property
    def count(self) -> int:
        return len(self.graph.nodes)

    @cached_property
    def computed(self) -> list[Tensor]:
        """Life spans, found the slow way."""
        found = []
        for name in [*self.graph.inputs, *(node.output[0] for node in self.graph.nodes)]:
            made = next((k for k, n in enumerate(self.graph.nodes) if name in n.output), -1)
            used = [k for k, node in enumerate(self.graph.nodes) if name in uses(node)]
            last = self.count if name in self.graph.outputs else max(used, default=made)
            info = self.tensors[name]
            found.append(Tensor(made, last, info.spec.row_bytes, info.separable))
        return found

    def allowed(self, place: int) -> bool:
        return not any(
            t.made < place <= t.last and not t.separable and t.made >= 0 and t.last < self.count
            for t in self.computed
            if 0 < place < self.count
        )

    def crossing(self, place: int) -> int:
        return sum(t.size for t in self.computed if t.made < place <= t.last)

    def held(self, start: int, stop: int) -> int:
        inner = [t for t in self.computed if start <= t.made < t.last < stop]
        at_once = [sum(t.size for t in inner if t.made <= k <= t.last) for k in range(start, stop)]
        return max(at_once)

    def around(self, start: int, stop: int) -> int:
        return sum(
            t.size
            for t in self.computed
            if (t.made < start <= t.last) or (start <= t.made < stop <= t.last)
        )

    def weight(self, start: int, stop: int) -> int:
        return sum(
            self.graph.weights[name].nbytes
            for node in self.graph.nodes[start:stop]
            for name in uses(node)
            if name in self.graph.weights
        )

    def fits(self, start: int, stop: int) -> bool:
        if not any(map(self.allowed, range(start + 1, stop))):
            return True  # nothing smaller could be cut off
        return (
            self.weight(start, stop) <= self.weight_limit
            and self.held(start, stop) <= self.memory_limit
            and self.around(start, stop) <= needed_memory(self.graph, self.tensors)
        )

    def cost(self, places: tuple[int, ...]) -> int:
        return sum(self.crossing(place) + CUT_COST_BYTES for place in places)


@st.composite
def cases(draw: st.DrawFn, largest: int = 8, separable: bool | None = None) -> Case:
    """A random graph whose node k computes ``t<k>`` from earlier tensors and maybe a weight."""
    count = draw(st.integers(1, largest))
    names, nodes = ["x"], []
    weights: dict[str, np.ndarray] = {}
    for number in range(count):
        read = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        if size := draw(st.integers(0, 4)):
            weights[f"w{number}"] = np.empty(size * SCALE, np.uint8)
            read.append(f"w{number}")
        nodes.append(helper.make_node("Op", read, [f"t{number}"]))
        names.append(f"t{number}")
    outputs = {names[-1], *draw(st.lists(st.sampled_from(names[1:]), max_size=1))}
    tensors = {}
    for name in names:
        free = draw(st.booleans() | st.just(True)) if separable is None else separable
        free = free or name in outputs or name == "x"
        spec = TensorSpec(name, "uint8", (draw(st.integers(1, 5)) * SCALE,))
        tensors[name] = TensorInfo(spec, free)
    graph = Graph(tuple(nodes), weights, {}, ("x",), tuple(sorted(outputs)), ())
    limits = st.integers(0, 12)
    return Case(graph, tensors, draw(limits) * SCALE, draw(limits) * SCALE)


def ways(case: Case) -> Iterator[tuple[int, ...]]:
    """Every way to cut that keeps the limits."""
    places = [place for place in range(1, case.count) if case.allowed(place)]
    for number in range(len(places) + 1):
        for chosen in itertools.combinations(places, number):
            if all(case.fits(*pair) for pair in itertools.pairwise((0, *chosen, case.count))):
                yield chosen


def cut(case: Case) -> tuple[int, ...]:
    """The inner cuts that were chosen; checks what holds for any."""
    cuts = cut_graph(case.graph, case.tensors, case.weight_limit, case.memory_limit)
    inner = cuts.positions[1:-1]

    assert cuts.positions[0] == 0
    assert cuts.positions[-1] == case.count
    assert list(segments(cuts)) == list(itertools.pairwise(cuts.positions))
    assert all(case.allowed(place) for place in inner)
    assert all(case.fits(*pair) for pair in segments(cuts))
    assert cuts.crossing_bytes == tuple(case.crossing(place) for place in inner)
    assert held_bytes(case.graph, case.tensors, cuts) == [case.held(*p) for p in segments(cuts)]
    return inner


@given(cases())
@settings(max_examples=80, deadline=None)
def test_cuts_are_the_cheapest_there_are(case: Case) -> None:
    assert case.cost(cut(case)) == min(map(case.cost, ways(case)))


@given(cases(largest=30))
@settings(max_examples=25, deadline=None)
def test_cuts_of_larger_graphs_keep_the_limits(case: Case) -> None:
    cut(case)


@given(cases(separable=False))
@settings(max_examples=25, deadline=None)
def test_a_tensor_whose_rows_are_mixed_is_never_cut(case: Case) -> None:
    for place in cut(case):
        for tensor in case.computed:
            crosses = tensor.made < place <= tensor.last
            assert not crosses or tensor.separable or tensor.last == case.count


@given(cases())
@settings(max_examples=25, deadline=None)
def test_needed_memory_is_that_of_the_neediest_node(case: Case) -> None:
    at_once = [
        sum(t.size for t in case.computed if t.made <= k <= t.last) for k in range(case.count)
    ]

    # An input is there from the start, used or not.
    assert needed_memory(case.graph, case.tensors) == max(at_once)


def chain(count: int, *, separable: bool, weight: int = 0) -> Case:
    nodes = [helper.make_node("Op", ["x", "w"], ["t0"])]
    nodes += [helper.make_node("Op", [f"t{k - 1}", "w"], [f"t{k}"]) for k in range(1, count)]
    names = ["x", *(f"t{k}" for k in range(count))]
    tensors = {
        name: TensorInfo(TensorSpec(name, "uint8", (8,)), separable or name == names[-1])
        for name in names
    }
    weights = {"w": np.empty(weight, np.uint8)}
    return Case(Graph(tuple(nodes), weights, {}, ("x",), (names[-1],), ()), tensors, 100, 10**6)


def test_one_slice_if_all_fits() -> None:
    assert cut(chain(20, separable=True, weight=5)) == ()


def test_slices_are_filled_to_the_limit() -> None:
    assert cut(chain(20, separable=True, weight=20)) == (5, 10, 15)


def test_a_node_alone_may_exceed_the_limit() -> None:
    assert cut(chain(3, separable=True, weight=1000)) == (1, 2)


def test_nodes_that_can_not_be_parted_may_exceed_the_limit() -> None:
    assert cut(chain(20, separable=False, weight=1000)) == ()


def test_a_long_graph_is_cut_before_the_longest_slice() -> None:
    case = chain(2 * LONGEST_SLICE + 1, separable=True)
    cuts = cut_graph(case.graph, case.tensors, case.weight_limit, case.memory_limit)

    assert len(cuts.positions) == 4
    assert max(stop - start for start, stop in segments(cuts)) <= LONGEST_SLICE


def test_a_long_stretch_without_a_cut_is_refused() -> None:
    fits, too_long = (chain(LONGEST_SLICE + more, separable=False) for more in (0, 1))

    assert cut_graph(fits.graph, fits.tensors, 100, 100).positions == (0, LONGEST_SLICE)
    with pytest.raises(ModelError, match=f"over {LONGEST_SLICE} nodes in which every cut"):
        cut_graph(too_long.graph, too_long.tensors, 100, 100)


def test_weights_of_a_subgraph_count() -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["w"], ["r"])], "branch", [], [])
    branch = helper.make_node("If", ["x"], ["t0"], then_branch=inner)
    nodes = (branch, helper.make_node("Op", ["t0", "v"], ["t1"]))
    tensors = {
        n: TensorInfo(TensorSpec(n, "uint8", (8,)), separable=True) for n in ("x", "t0", "t1")
    }
    weights = {"w": np.empty(60, np.uint8), "v": np.empty(60, np.uint8)}
    case = Case(Graph(nodes, weights, {}, ("x",), ("t1",), ()), tensors, 100, 10**6)

    assert cut(case) == (1,)


def _residual() -> Graph:
    """Two blocks: a convolution, and one whose result is added to what the block began with."""
    nodes = []
    for number in range(2):
        x, inner, out = f"x{number}", f"t{number}", f"x{number + 1}"
        nodes.append(helper.make_node("Conv", [x, f"a{number}"], [inner]))
        nodes.append(helper.make_node("Conv", [inner, f"b{number}", "", x], [out]))
    first = helper.make_node("Conv", ["image", "w"], ["x0"])
    weights = {name: np.zeros(25_000, np.float32) for name in ("w", "a0", "b0", "a1", "b1")}
    return Graph((first, *nodes), weights, {}, ("image",), ("x2",), ())


def test_a_sum_leaves_the_slice_that_what_it_is_added_to_enters() -> None:
    """Then it is made in place: nothing is copied, and its memory is needed once."""
    graph = _residual()
    names = ["image", *(name for node in graph.nodes for name in node.output)]
    tensors = {name: TensorInfo(TensorSpec(name, "float32", (1, 250_000)), True) for name in names}
    positions = cut_graph(graph, tensors, 2 * 100_000, 10**9).positions
    assert positions == (0, 1, 3, 5)
    assert needed_memory(graph, tensors) == 3_000_000
    assert needed_memory(graph, tensors, in_place=True) == 2_000_000
