"""Giving the tensors that cross cuts their places in memory, once, when a model is sealed.

Two tensors may share bytes unless they are alive together. No arrangement is smaller than the most
bytes alive at once, and for a network's chain of tensors one of that size mostly exists: what a
layer reads lies at one end, what it makes at the other. A depth-first search finds it: tensors in
the order they are made, each at the low or the high end of what is free, one step back where
nothing fits. Where it gives up, the size allowed grows a little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lasagna.package.format import WEIGHT_ALIGNMENT, Places, SliceFacts

STEPS: Final = 50_000
"""Placements tried before more room is given: about half a second."""
GROWTH: Final = 1.02

Span = tuple[int, int]


def lifetimes(
    inputs: Sequence[int], outputs: Sequence[int], slices: Sequence[SliceFacts]
) -> dict[int, Span]:
    """For every tensor the slice that makes it (-1: an input) and the last that needs it."""
    spans: dict[int, Span] = dict.fromkeys(inputs, (-1, -1))
    for number, facts in enumerate(slices):
        for tensor in facts.outputs:
            spans[tensor] = (number, number)
        for tensor in facts.inputs:
            spans[tensor] = (spans[tensor][0], number)
    for tensor in outputs:
        spans[tensor] = (spans[tensor][0], len(slices))
    return spans


def arrange(
    tensor_bytes: Sequence[int],
    spans: Mapping[int, Span],
    in_place: Sequence[tuple[int, int]] = (),
) -> Places:
    """Choose offsets, for one row; they are multiplied by the batch.

    Args:
        tensor_bytes: bytes a row of every tensor.
        spans: when those that need a place are alive.
        in_place: pairs of equal size of which the second takes the first one's place, in the slice
            that needs the first one last.

    Returns:
        Offsets, 0 for tensors without a place, and the bytes they span.
    """
    place_of = {t: t for t in spans}
    lives = dict(spans)
    for before, after in in_place:
        assert tensor_bytes[before] == tensor_bytes[after]
        assert spans[before][1] == spans[after][0]
        first = place_of[after] = place_of[before]
        lives[first] = (lives[first][0], lives.pop(after)[1])
    found = _places(tensor_bytes, lives)
    offsets = tuple(found[0].get(place_of.get(t, t), 0) for t in range(len(tensor_bytes)))
    return Places(offsets, found[1])


def _places(tensor_bytes: Sequence[int], spans: Mapping[int, Span]) -> tuple[dict[int, int], int]:
    """Offsets of those that are alive at all, and the bytes they span."""
    sizes = {t: max(1, -(-tensor_bytes[t] // WEIGHT_ALIGNMENT)) for t in spans}
    order = sorted(spans, key=lambda t: (spans[t][0], -sizes[t], t))
    room = most_alive(spans, sizes)
    while (found := _search(order, spans, sizes, room)) is None:
        room = int(room * GROWTH) + 1
    return {t: at * WEIGHT_ALIGNMENT for t, at in found.items()}, room * WEIGHT_ALIGNMENT


def most_alive(spans: Mapping[int, Span], sizes: Mapping[int, int]) -> int:
    """The largest sum of sizes of tensors that are alive together."""
    changes: dict[int, int] = {}
    for tensor, (begin, end) in spans.items():
        changes[begin] = changes.get(begin, 0) + sizes[tensor]
        changes[end + 1] = changes.get(end + 1, 0) - sizes[tensor]
    alive = most = 0
    for _, change in sorted(changes.items()):
        alive += change
        most = max(most, alive)
    return most


def _search(
    order: Sequence[int], spans: Mapping[int, Span], sizes: Mapping[int, int], room: int
) -> dict[int, int] | None:
    """Offsets within ``room``, or None when there are none or the search takes too long."""
    neighbours = _earlier_neighbours(order, spans)
    offsets: dict[int, int] = {}
    choices: list[Iterator[int]] = []
    for _ in range(STEPS + 2 * len(order)):
        depth = len(choices)
        if depth == len(order):
            return offsets
        tensor = order[depth]
        taken = sorted((offsets[t], offsets[t] + sizes[t]) for t in neighbours[tensor])
        choices.append(_ends(taken, sizes[tensor], room))
        while choices:
            place = next(choices[-1], None)
            if place is not None:
                offsets[order[len(choices) - 1]] = place
                break
            choices.pop()
        if not choices:
            return None
    return None


def _earlier_neighbours(
    order: Sequence[int], spans: Mapping[int, Span]
) -> dict[int, tuple[int, ...]]:
    """For every tensor those made before it that are still alive when it is made."""
    alive: list[int] = []
    found = {}
    for tensor in order:
        alive = [t for t in alive if spans[t][1] >= spans[tensor][0]]
        found[tensor] = tuple(alive)
        alive.append(tensor)
    return found


def _ends(taken: Sequence[tuple[int, int]], size: int, room: int) -> Iterator[int]:
    """The ends of the gaps that hold ``size``: the tightest gap first."""
    gaps, low = [], 0
    for begin, end in (*taken, (room, room)):
        if begin - low >= size:
            gaps.append((begin - low, low, begin - size))
        low = max(low, end)
    places = dict.fromkeys(place for _, *ends in sorted(gaps) for place in ends)
    return iter(places)
