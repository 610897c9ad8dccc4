"""Promise: host and enclave mean the same by a slice, a cut and a byte; and a processor gets a
variant that it can run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from lasagna.errors import PackageError
from lasagna.models.arrange import arrange, lifetimes
from lasagna.package.format import SliceFacts, Variant
from lasagna.package.forms import (
    Form,
    boundary,
    choose_variant,
    cut_bytes,
    extents,
    in_form,
    live_at_cut,
)


def facts(inputs: tuple[int, ...], outputs: tuple[int, ...], graph: int = 0) -> SliceFacts:
    return SliceFacts(graph, (0,), 1, inputs, outputs, 1, (10, 20, 40, 80), ())


def variant() -> Variant:
    """Tensor 0 comes in and is needed again at the end; 1 and 2 come of it, 3 of 1, 4 goes out."""
    slices = (facts((0,), (1, 2)), facts((1,), (3,)), facts((0, 2, 3), (4,)))
    places = arrange([100] * 5, lifetimes([0], [4], slices))
    whole = facts((0,), (4,), graph=7)
    return Variant("t", 8, 0, (100,) * 5, (0,), (4,), slices, places, whole, places, 9)


def test_tensors_that_cross_a_cut() -> None:
    assert [live_at_cut(variant(), cut) for cut in range(4)] == [
        (0,),
        (0, 1, 2),
        (0, 2, 3),
        (4,),
    ]
    assert [boundary(variant(), cut) for cut in (0, 1, 3)] == [(0,), (0, 1, 2), (4,)]
    assert cut_bytes(variant()) == (128, 384, 384, 128), "each begins at a cache line"


def test_a_slices_extent_covers_all_that_it_touches_and_all_that_waits_meanwhile() -> None:
    found, offsets = extents(variant()), variant().places.offsets
    for number, one in enumerate(variant().slices):
        near = {*one.inputs, *one.outputs}
        near |= {*live_at_cut(variant(), number), *live_at_cut(variant(), number + 1)}
        assert found[number] >= max(offsets[tensor] + 100 for tensor in near)


def test_an_input_that_no_slice_reads_has_its_place_among_the_others() -> None:
    """It is opened there like them."""
    slices = (facts((0,), (2,)), facts((2,), (3,)))
    places = arrange([100] * 4, lifetimes([0, 1], [3], slices))
    whole = facts((0,), (3,))
    unused = Variant("t", 8, 0, (100,) * 4, (0, 1), (3,), slices, places, whole, places, 9)
    assert extents(unused)[0] >= max(places.offsets[tensor] + 100 for tensor in (0, 1))


def test_the_whole_model_as_one_slice_goes_by_another_name() -> None:
    """Its slice 0 is not the slice 0 of the model in slices, and neither are their cuts."""
    assert in_form(variant(), Form.SLICED) == variant()
    for form, graph in ((Form.WHOLE, 7), (Form.FROZEN, 9), (Form.VANILLA, 9)):
        shaped = in_form(variant(), form)
        assert (shaped.name, len(shaped.slices)) == ("t/whole", 1)
        assert shaped.slices[0].graph == graph
        assert cut_bytes(shaped) == (128, 128)


def test_the_variant_of_this_processor_before_the_portable_one() -> None:
    native = variant()
    portable = replace(native, name="portable", block=0)
    other = replace(native, name="nchwc99", block=99)
    assert choose_variant([portable, other, native], 8) is native
    assert choose_variant([other, portable], 8) is portable
    with pytest.raises(PackageError, match="NCHWc block 8; the package has only nchwc99"):
        choose_variant([other], 8)
