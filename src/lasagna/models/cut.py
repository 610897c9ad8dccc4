"""Where to cut a graph into slices.

Positions 0..n are the places before, between and after the nodes; a slice is the run of nodes
between two cuts. A dynamic program picks the cuts of least total cost, under three limits: bytes
of weights a slice, memory a slice needs while it runs, and no cut through a tensor whose rows
can't be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from lasagna.errors import ModelError
from lasagna.models.graph import Graph, addend, uses
from lasagna.models.shapes import TensorInfo

CUT_COST_BYTES: Final = 150_000
"""What a cut costs beside its crossing bytes, in bytes. Calling a slice takes about 45 us more
than going on in the same one, in which AES-GCM at 3.4 GB/s seals this much."""
LONGEST_SLICE: Final = 256
"""Nodes a slice may have at most; keeps the dynamic program linear in the graph's length."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """A graph cut into slices.

    Attributes:
        positions: 0, the cuts in between, and the number of nodes.
        crossing_bytes: bytes a row of the tensors that cross each inner cut.
    """

    positions: tuple[int, ...]
    crossing_bytes: tuple[int, ...]


def cut_graph(
    graph: Graph, tensors: Mapping[str, TensorInfo], weight_limit: int, memory_limit: int
) -> Cuts:
    """Cut at the cheapest places.

    Args:
        graph: the graph, tiled already.
        tensors: shapes of its tensors.
        weight_limit: bytes of weights a slice should not exceed; one node alone may.
        memory_limit: bytes of intermediate results that a slice of several nodes may hold at
            batch 1. Its inputs and outputs are not counted: they exist as long as it runs, and
            slices are chosen so that these never exceed what the neediest node holds.

    Raises:
        ModelError: there is no way to cut, even with slices of one node.
    """
    count = len(graph.nodes)
    weights = np.array(
        [
            sum(graph.weights[name].nbytes for name in uses(node) if name in graph.weights)
            for node in graph.nodes
        ],
        dtype=np.int64,
    )
    summed = np.concatenate([[0], np.cumsum(weights)])
    crossing, allowed = _crossings(graph, tensors)
    made, last_use, sizes = _lifetimes(graph, tensors)
    added = _added(graph, made, last_use)
    floor = needed_memory(graph, tensors, in_place=True)
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    origin = np.zeros(count + 1, dtype=np.int64)
    for stop in range(1, count + 1):
        if not allowed[stop]:
            continue
        cost_here = 0.0 if stop == count else float(crossing[stop] + CUT_COST_BYTES)
        for start in range(stop - 1, max(-1, stop - LONGEST_SLICE - 1), -1):
            whole = summed[stop] - summed[start]
            forced = not allowed[start + 1 : stop].any()  # nothing smaller ends here
            if whole > weight_limit and not forced:
                break
            if not allowed[start] or best[start] + cost_here >= best[stop]:
                continue
            if not forced and _held(start, stop, made, last_use, sizes) > memory_limit:
                break  # a longer slice holds no less
            around = _around(start, stop, made, last_use, sizes)
            around -= _in_place(start, stop, added, made, last_use, sizes)
            if not forced and around > floor:
                continue
            cost = best[start] + cost_here + _copied(start, stop, added, made, last_use, sizes)
            if cost < best[stop]:
                best[stop], origin[stop] = cost, start
    if not np.isfinite(best[count]):
        raise ModelError(
            f"the graph has a stretch of over {LONGEST_SLICE} nodes in which every cut crosses a "
            "tensor whose rows can't be told apart"
        )
    positions = [count]
    while positions[-1]:
        positions.append(int(origin[positions[-1]]))
    positions.reverse()
    return Cuts(tuple(positions), tuple(int(crossing[p]) for p in positions[1:-1]))


def needed_memory(
    graph: Graph, tensors: Mapping[str, TensorInfo], *, in_place: bool = False
) -> int:
    """Bytes at batch 1 that the neediest node holds: its inputs, its outputs and what waits.

    No choice of cuts gets below this.

    Args:
        graph: the graph.
        tensors: shapes of its tensors.
        in_place: a node that adds a tensor to its result, which nobody needs after it, puts the
            result in its place (``slices.in_place_pairs``).
    """
    made, last_use, sizes = _lifetimes(graph, tensors)
    alive = np.zeros(len(graph.nodes) + 2, dtype=np.int64)
    np.add.at(alive, np.maximum(made, 0), sizes)
    for _, after in _added(graph, made, last_use) if in_place else ():
        alive[made[after]] -= sizes[after]
        alive[made[after] + 1] += sizes[after]
    np.add.at(alive, np.minimum(last_use, len(graph.nodes) - 1) + 1, -sizes)
    return int(np.cumsum(alive).max())


def segments(cuts: Cuts) -> Sequence[tuple[int, int]]:
    """First and one-past-last node of every slice."""
    return list(pairwise(cuts.positions))


def held_bytes(graph: Graph, tensors: Mapping[str, TensorInfo], cuts: Cuts) -> list[int]:
    """Bytes at batch 1 of intermediate results alive at once inside each slice."""
    lifetimes = _lifetimes(graph, tensors)
    return [_held(start, stop, *lifetimes) for start, stop in segments(cuts)]


def _lifetimes(
    graph: Graph, tensors: Mapping[str, TensorInfo]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every tensor: the node that makes it (-1: an input), its last user (n: an output)."""
    made = dict.fromkeys(graph.inputs, -1)
    last = dict.fromkeys(graph.inputs, -1)
    for index, node in enumerate(graph.nodes):
        for name in uses(node):
            if name in made:
                last[name] = index
        for name in node.output:
            if name:
                made[name] = last[name] = index
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    sizes = [tensors[name].spec.row_bytes for name in made]
    return np.array(list(made.values())), np.array([last[n] for n in made]), np.array(sizes)


def _crossings(graph: Graph, tensors: Mapping[str, TensorInfo]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes a row that cross each position, and whether a cut is allowed there."""
    count = len(graph.nodes)
    made, last, sizes = _lifetimes(graph, tensors)
    names = [*graph.inputs, *(n for node in graph.nodes for n in node.output if n)]
    separable = np.array([tensors[name].separable for name in names])
    crossing = np.zeros(count + 2, dtype=np.int64)
    blocked = np.zeros(count + 2, dtype=np.int64)
    for begin, end, size, free in zip(made, last, sizes, separable, strict=True):
        if end > begin:  # crosses positions begin + 1 .. end
            crossing[begin + 1] += size
            crossing[end + 1 if end < count else count + 1] -= size
            if not free and begin >= 0 and end < count:
                blocked[begin + 1] += 1
                blocked[end + 1] -= 1
    allowed = np.cumsum(blocked)[: count + 1] == 0
    allowed[0] = allowed[count] = True
    return np.cumsum(crossing)[: count + 1], allowed


def _around(start: int, stop: int, made: np.ndarray, last: np.ndarray, sizes: np.ndarray) -> int:
    """Bytes that exist all the while a slice runs: its inputs and outputs and what passes by."""
    before = (made < start) & (last >= start)
    after = (made >= start) & (made < stop) & (last >= stop)
    return int(sizes[before | after].sum())


def _added(graph: Graph, made: np.ndarray, last: np.ndarray) -> list[tuple[int, int]]:
    """Tensors that a node adds to its result and nobody needs after it, and the results."""
    names = [*graph.inputs, *(n for node in graph.nodes for n in node.output if n)]
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    pairs = []
    for index, node in enumerate(graph.nodes):
        before = number.get(addend(node) or "")
        if before is not None and made[before] >= 0 and last[before] == index:
            pairs.append((before, number[node.output[0]]))
    return pairs


def _in_place(
    start: int,
    stop: int,
    added: Sequence[tuple[int, int]],
    made: np.ndarray,
    last: np.ndarray,
    sizes: np.ndarray,
) -> int:
    """Bytes of a slice's outputs that take the place of inputs."""
    return sum(
        int(sizes[after])
        for before, after in added
        if made[before] < start <= made[after] < stop <= last[after]
    )


def _copied(
    start: int,
    stop: int,
    added: Sequence[tuple[int, int]],
    made: np.ndarray,
    last: np.ndarray,
    sizes: np.ndarray,
) -> int:
    """Bytes that a slice copies because only one of a sum and what it is added to lies inside.

    Inside a slice ONNX Runtime adds in place, and so do we where both cross its ends.
    """
    return sum(
        int(sizes[after])
        for before, after in added
        if start <= made[after] < stop and (made[before] < start) != (last[after] >= stop)
    )


def _held(start: int, stop: int, made: np.ndarray, last: np.ndarray, sizes: np.ndarray) -> int:
    """Most bytes of intermediate results alive at once inside a slice."""
    inner = (made >= start) & (last < stop) & (last > made)
    if not inner.any():
        return 0
    alive = np.zeros(stop - start + 1, dtype=np.int64)
    np.add.at(alive, made[inner] - start, sizes[inner])
    np.add.at(alive, last[inner] - start + 1, -sizes[inner])
    return int(np.cumsum(alive).max())
