from __future__ import annotations

from pathlib import Path

import pytest

from lasagna.errors import UsageError
from lasagna.models.draw import (
    SEALED,
    SlicePicture,
    crossing_bytes,
    draw_slices,
    main_op,
    slice_picture,
)
from lasagna.package.format import Layer, Places, SliceDetails, SliceFacts, Variant


def facts(inputs: tuple[int, ...], outputs: tuple[int, ...], times: bool = True) -> SliceFacts:
    compute_s = (0.1, 0.2, 0.4, 0.8) if times else ()
    return SliceFacts(0, (1,), 100, inputs, outputs, 1, (1, 1, 1, 1), compute_s)


def variant(*slices: SliceFacts, outputs: tuple[int, ...]) -> Variant:
    sizes = (1, 10, 100, 1000, 10_000)
    places = Places((0,) * len(sizes), 10_000)
    whole = facts((0,), outputs)
    return Variant("portable", 0, 0, sizes, (0,), outputs, slices, places, whole, places, 0)


def details(*layers: tuple[str, int]) -> SliceDetails:
    return SliceDetails(tuple(Layer("name", op, "", size) for op, size in layers), (), (), ())


BRANCHED = variant(facts((0,), (1, 2)), facts((1,), (3,)), facts((2, 3), (4,)), outputs=(4, 1))
"""Tensor 1 is an output as well as an input of the second slice; 2 passes the second by."""


def test_crossing_bytes_are_what_is_made_before_and_needed_behind() -> None:
    assert crossing_bytes(BRANCHED) == (1, 110, 1110, 10_010)


@pytest.mark.parametrize(
    ("layers", "op"),
    [
        ([("Conv", 10), ("Gemm", 30), ("Conv", 25)], "Conv"),
        ([("FusedConv", 10), ("Gemm", 15), ("Conv", 10)], "Conv"),
        ([("Relu", 0), ("Relu", 0), ("Concat", 0)], "Relu"),
        ([], SEALED),
    ],
)
def test_main_op_has_most_of_the_weights(layers: list[tuple[str, int]], op: str) -> None:
    assert main_op(details(*layers)) == op


def test_kinds_need_the_details() -> None:
    inner = [details((op, 1)) for op in ("Conv", "Gemm", "Mystery")]

    assert slice_picture(BRANCHED, None).kinds == (SEALED,) * 3
    assert slice_picture(BRANCHED, inner).kinds == ("Conv", "Gemm", "Mystery")


def test_times_are_drawn_if_all_are_known() -> None:
    some = variant(facts((0,), (1,)), facts((1,), (2,), times=False), outputs=(2,))

    assert slice_picture(BRANCHED, None).compute_s is not None
    assert slice_picture(some, None).compute_s is None


@pytest.mark.parametrize(("count", "timed"), [(1, False), (3, True), (25, True)])
def test_any_number_of_slices_is_drawn(tmp_path: Path, count: int, timed: bool) -> None:
    picture = SlicePicture(
        kinds=("Conv", "Gemm", "Mystery", SEALED) * count,
        weight_bytes=tuple(range(0, 4_000_000 * count, 1_000_000)),
        crossing_bytes=tuple(range(4 * count + 1)),
        compute_s=((0.1, 0.2, 0.4, 0.8),) * 4 * count if timed else None,
    )
    draw_slices(tmp_path / "picture.png", "A title", picture)

    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["none/picture.png", "picture.unknown"])
def test_picture_that_can_not_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="can't draw"):
        draw_slices(tmp_path / name, "A title", slice_picture(BRANCHED, None))
