"""Promise: two tensors that are needed together never share a byte, unless one takes the other's
place in the slice that needs it last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from lasagna.models.arrange import Span, arrange
from lasagna.models.slices import in_place_pairs


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[int], dict[int, Span], list[tuple[int, int]]]:
    """Tensors of some sizes and spans, some of which take the place of one that ends there."""
    count = draw(st.integers(1, 12))
    sizes = list[int]()
    spans = dict[int, Span]()
    pairs = list[tuple[int, int]]()
    for tensor in range(count):
        begin = draw(st.integers(-1, 10))
        spans[tensor] = (begin, begin + draw(st.integers(0, 6)))
        sizes.append(draw(st.integers(1, 1000)))
        taken = {before for before, _ in pairs}
        ending = [t for t in range(tensor) if spans[t][1] == begin and t not in taken]
        before = draw(st.sampled_from([None, *ending]))
        if before is not None:
            sizes[tensor] = sizes[before]
            pairs.append((before, tensor))
    return sizes, spans, pairs


@given(lives())
def test_tensors_that_are_alive_together_lie_apart(
    case: tuple[list[int], dict[int, Span], list[tuple[int, int]]],
) -> None:
    sizes, spans, pairs = case
    places = arrange(sizes, spans, pairs)
    for a in spans:
        assert places.offsets[a] + sizes[a] <= places.size
        for b in range(a):
            together = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
            if (b, a) in pairs:
                assert places.offsets[a] == places.offsets[b]
            elif together:
                apart = places.offsets[a] + sizes[a] <= places.offsets[b]
                assert apart or places.offsets[b] + sizes[b] <= places.offsets[a]


def conv(inputs: list[str], output: str) -> object:
    return helper.make_node("Conv", inputs, [output], domain="com.microsoft.nchwc")


def test_a_sum_takes_the_place_of_what_it_is_added_to_when_all_others_have_read_it() -> None:
    first, last = conv(["x", "w0"], "t"), conv(["t", "w1", "", "x"], "y")
    assert in_place_pairs([first, last], {"x"}) == [("x", "y")]  # type: ignore[list-item]
    assert in_place_pairs([first, last], set()) == []  # type: ignore[list-item]
    # The order of a session's nodes is ONNX Runtime's: who does not need the sum's result, and is
    # not needed for it, may run after it.
    aside = conv(["x", "w2"], "z")
    assert in_place_pairs([first, aside, last], {"x"}) == []  # type: ignore[list-item]
    view = helper.make_node("Reshape", ["x", "shape"], ["v"])
    reader = conv(["v", "w2", "", "t"], "t2")
    assert in_place_pairs([view, first, reader, last], {"x"}) == []  # type: ignore[list-item]
    twice = conv(["x", "w1", "", "x"], "y")
    assert in_place_pairs([twice], {"x"}) == []  # type: ignore[list-item]
