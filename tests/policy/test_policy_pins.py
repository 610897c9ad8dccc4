"""Promise: what is pinned fits its room and wastes none, and what is streamed hides behind
computing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lasagna.policy.pins import choose_pinned

sizes = st.integers(1, 5_000_000)


@given(
    st.lists(st.tuples(sizes, st.floats(0, 0.1)), min_size=1, max_size=30),
    st.integers(0, 50_000_000),
    st.integers(1, 20_000_000),
)
def test_pins_fit_their_room_and_waste_none_that_a_slice_would_fit(
    slices: list[tuple[int, float]], room: int, ring: int
) -> None:
    weights = [size for size, _ in slices]
    pinned = choose_pinned(weights, [seconds for _, seconds in slices], room, ring)
    used = sum(weights[n] for n in pinned)
    assert used <= room
    assert all(weights[n] > room - used for n in range(len(slices)) if n not in pinned)


def test_streamed_slices_are_spread_over_the_cycle() -> None:
    """Ten equal slices, room for five: a run of five streamed ones would wait for the loader."""
    pinned = choose_pinned([1_000_000] * 10, [0.01] * 10, 5_000_000, 2_000_000)
    streamed = sorted(set(range(10)) - pinned)
    assert len(streamed) == 5
    gaps = [b - a for a, b in zip(streamed, [*streamed[1:], streamed[0] + 10], strict=True)]
    assert max(gaps) <= 3


def test_slices_that_compute_long_are_streamed_rather_than_those_that_compute_short() -> None:
    times = [0.1] * 4 + [0.001] * 4
    pinned = choose_pinned([1_000_000] * 8, times, 4_000_000, 1_000_000)
    assert len(pinned & {4, 5, 6, 7}) >= 3


def test_a_slice_that_the_ring_does_not_hold_is_pinned_only_if_it_fits() -> None:
    assert choose_pinned([5, 100, 5], [1.0] * 3, 10, 10) == {0, 2}
    assert 1 in choose_pinned([5, 100, 5], [1.0] * 3, 105, 10)
