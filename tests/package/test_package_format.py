"""The public and the secret part: what is written is read, and nothing else but PackageError."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.errors import PackageError
from lasagna.package.format import (
    CHUNK_BYTES,
    HEADER,
    MAGIC,
    PROFILE_BATCHES,
    TAG_BYTES,
    VERSION,
    Details,
    Layer,
    Manifest,
    Places,
    SliceDetails,
    SliceFacts,
    TensorSpec,
    Variant,
    WeightSpec,
    chunk_associated_data,
    chunk_count,
    chunk_nonce,
    encode,
    sealed_size,
)
from lasagna.package.parse import parse_details, parse_manifest, split_header

Record = TypeVar("Record", bound=msgspec.Struct)
BODY = 1000


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A chain of slices: tensor k goes into slice k, tensor k + 1 comes out."""
    count = draw(st.integers(1, 4))
    shapes = [
        tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))) for _ in range(count + 1)
    ]
    specs = [TensorSpec(f"t{k}", "float32", shape) for k, shape in enumerate(shapes)]
    tensor_bytes = tuple(spec.row_bytes for spec in specs)
    sections = [*draw(st.lists(st.integers(0, 3 * CHUNK_BYTES), min_size=3, max_size=6))]
    some = st.integers(0, len(sections) - 1)
    times = draw(st.sampled_from([(), (0.001, 0.002, 0.004, 0.008)]))
    workspace = (10**6,) * len(PROFILE_BATCHES)

    def facts(first: int, last: int, weights: tuple[int, ...]) -> SliceFacts:
        size = sum(sections[number] for number in weights)
        return SliceFacts(0, weights, size, (first,), (last,), 3, workspace, times)

    weights = [draw(some) for _ in range(count)]
    places = Places((0,) * (count + 1), max(tensor_bytes))
    variant = Variant(
        name=draw(st.sampled_from(["portable", "nchwc8"])),
        block=8,
        details=draw(some),
        tensor_bytes=tensor_bytes,
        inputs=(0,),
        outputs=(count,),
        slices=tuple(facts(k, k + 1, (weights[k],)) for k in range(count)),
        places=places,
        whole=facts(0, count, tuple(weights)),
        whole_places=places,
        frozen=draw(some),
    )
    return Manifest(
        package_id=draw(st.binary(min_size=32, max_size=32)),
        name=draw(st.text(min_size=1, max_size=20)),
        owner=bytes(32),
        batchable=draw(st.booleans()),
        batch_note=draw(st.text(max_size=20)),
        inputs=(specs[0],),
        outputs=(specs[-1],),
        variants=(variant,),
        sections=tuple(sections),
    )


def example_manifest() -> Manifest:
    """Two slices; what the tables of malformed manifests change."""
    facts = SliceFacts(0, (1,), 100, (0,), (1,), 3, (1, 2, 3, 4), ())
    variant = Variant(
        name="portable",
        block=0,
        details=2,
        tensor_bytes=(8, 16, 24),
        inputs=(0,),
        outputs=(2,),
        slices=(facts, replace(facts, inputs=(1,), outputs=(2,))),
        places=Places((0, 64, 0), 128),
        whole=replace(facts, weights=(1, 1), weight_bytes=200, outputs=(2,)),
        whole_places=Places((0, 0, 64), 128),
        frozen=0,
    )
    return Manifest(
        package_id=bytes(32),
        name="model",
        owner=bytes(32),
        batchable=True,
        batch_note="",
        inputs=(TensorSpec("x", "float32", (1, 2)),),
        outputs=(TensorSpec("y", "float32", (1, 6)),),
        variants=(variant,),
        sections=(10, 100, 30),
    )


def example_details() -> Details:
    specs = tuple(TensorSpec(f"t{k}", "float32", (1, 2 * k + 2)) for k in range(3))
    weights = (
        WeightSpec("w0", "float32", (3, 2), 0),
        WeightSpec("w1", "int8", (36,), 64),
    )
    one = SliceDetails((Layer("conv1", "Conv", "1/2", 60),), weights, ("i0",), ("o0",))
    return Details(specs, (one, one), one)


def replace(record: Record, **changes: Any) -> Record:
    return msgspec.structs.replace(record, **changes)


def parse(manifest: Manifest) -> Manifest:
    return parse_manifest(encode(manifest), BODY, manifest.section_offsets(BODY)[-1])


@given(manifests())
def test_manifest_round_trip(manifest: Manifest) -> None:
    assert parse(manifest) == manifest


def test_details_round_trip() -> None:
    variant = example_manifest().variants[0]

    assert parse_details(encode(example_details()), variant) == example_details()


def test_encoding_is_canonical() -> None:
    encoded = encode(example_manifest())

    assert encode(parse(example_manifest())) == encoded


@given(st.integers(0, 10 * CHUNK_BYTES))
def test_sealed_size_is_that_of_the_chunks(size: int) -> None:
    starts = range(0, max(size, 1), CHUNK_BYTES)

    assert len(starts) == chunk_count(size)
    assert sealed_size(size) == sum(min(CHUNK_BYTES, size - s) + TAG_BYTES for s in starts)


@given(manifests(), st.integers(0, 10**6))
def test_sections_follow_each_other(manifest: Manifest, body: int) -> None:
    offsets = manifest.section_offsets(body)

    assert offsets[0] == body
    for (start, stop), size in zip(itertools.pairwise(offsets), manifest.sections, strict=True):
        assert stop - start == sealed_size(size)


chunks = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))


@given(chunks, chunks)
def test_nonces_of_two_chunks_differ(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert len(chunk_nonce(*one)) == 12
    assert (chunk_nonce(*one) == chunk_nonce(*other)) == (one == other)


def test_associated_data_names_the_place() -> None:
    places = [
        (bytes([package]) * 32, section, size, chunk)
        for package, section, size, chunk in itertools.product((1, 2), (3, 4), (5, 6), (7, 8))
    ]

    assert len({chunk_associated_data(*place) for place in places}) == len(places)


def test_shape_grows_along_its_leading_dimension() -> None:
    assert TensorSpec("t", "float32", (4, 3)).shape(5) == (20, 3)


@pytest.mark.parametrize(
    ("head", "file_size", "message"),
    [
        (b"", 0, "at least 16 bytes"),
        (HEADER.pack(b"PK\3\4", VERSION, 0), 1000, "not a Lasagna package"),
        (HEADER.pack(MAGIC, 2, 0), 1000, "package format 2; this Lasagna reads format 1"),
        (HEADER.pack(MAGIC, VERSION, 2**24 + 1), 2**30, "the limit is"),
        (HEADER.pack(MAGIC, VERSION, 921), 1000, "truncated: the header needs 1001 bytes"),
    ],
)
def test_malformed_header_is_explained(head: bytes, file_size: int, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        split_header(head, file_size)


def first_variant(**changes: Any) -> Manifest:
    manifest = example_manifest()
    return replace(manifest, variants=(replace(manifest.variants[0], **changes),))


def first_slice(**changes: Any) -> Manifest:
    facts = example_manifest().variants[0].slices
    return first_variant(slices=(replace(facts[0], **changes), facts[1]))


def whole(**changes: Any) -> Manifest:
    return first_variant(whole=replace(example_manifest().variants[0].whole, **changes))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (replace(example_manifest(), variants=()), "at least one variant"),
        (replace(example_manifest(), variants=example_manifest().variants * 2), "have one name"),
        (replace(example_manifest(), name=""), "malformed manifest"),
        (replace(example_manifest(), package_id=bytes(31)), "malformed manifest"),
        (replace(example_manifest(), owner=bytes(33)), "malformed manifest"),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "str", (1,)),)),
            "'str' is not an element type",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", ()),)),
            "no leading dimension",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", (2**40, 2)),)),
            "input 'x' can't be sealed in records: .* is not the shape of a row",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x" * 257, "int8", (8,)),)),
            "a tensor's name has at most 256 bytes",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("", "int8", (8,)),)),
            "a tensor has a name",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", (1,) * 9),)),
            "at most 8 positive sizes",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", (1, 0)),)),
            "at most 8 positive sizes",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", (2, 2**30)),)),
            "a row of 2147483648 bytes is too large",
        ),
        (
            replace(example_manifest(), inputs=(TensorSpec("x", "int8", (8,)),) * 2),
            "two inputs have one name",
        ),
        (replace(example_manifest(), inputs=()), "inputs or outputs differ"),
        (first_variant(slices=()), "has no slices"),
        (first_variant(details=3), "no section 3"),
        (first_variant(frozen=4), "no section 4"),
        (first_variant(inputs=(3,)), "tensor 3 is not 'x'"),
        (first_variant(outputs=(1,)), "tensor 1 is not 'y'"),
        (first_variant(block=65), "malformed manifest"),
        (first_variant(places=Places((0, 64), 128)), "not every tensor has a place"),
        (first_variant(places=Places((0, 64, 104), 127)), "place of tensor 2 is outside"),
        (first_variant(places=Places((0, 0, 0), 23)), "place of tensor 2 is outside"),
        (first_variant(whole_places=Places((0, 0, 0), 23)), "place of tensor 2 is outside"),
        (first_slice(graph=3), "a section it names does not exist"),
        (first_slice(weights=(3,)), "a section it names does not exist"),
        (first_slice(weights=()), "malformed manifest"),
        (first_slice(weight_bytes=99), "weights are not of the size"),
        (first_slice(workspace=(1, 2, 3)), "needs 4 workspace sizes"),
        (first_slice(compute_s=(1.0,)), "needs 4 compute times or none"),
        (first_slice(compute_s=(float("nan"),) * 4), "malformed manifest"),
        (first_slice(inputs=(2,)), "before a slice has made it"),
        (first_slice(outputs=(1, 1)), "exists already"),
        (first_slice(outputs=(0,)), "exists already"),
        (first_slice(outputs=(1, 3)), "the variant does not have"),
        (whole(outputs=(1,)), "does not make the model's outputs"),
        (whole(inputs=(1,)), "whole uses a tensor before"),
    ],
)
def test_manifest_at_odds_with_itself_is_refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        parse(manifest)


def test_sections_must_end_with_the_file() -> None:
    manifest = example_manifest()
    end = manifest.section_offsets(BODY)[-1]

    for size in (end - 1, end + 1, 0):
        with pytest.raises(PackageError, match=f"end at byte {end}, the file at {size}"):
            parse_manifest(encode(manifest), BODY, size)


def weights(*specs: WeightSpec) -> Details:
    details = example_details()
    one = replace(details.slices[0], weights=specs)
    return replace(details, slices=(details.slices[0], one))


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (replace(example_details(), slices=example_details().slices[:1]), "slice count differs"),
        (replace(example_details(), tensors=example_details().tensors[:2]), "tensor sizes differ"),
        (
            replace(example_details(), tensors=(TensorSpec("t", "float32", (1, 2)),) * 3),
            "two tensors have one name",
        ),
        (weights(WeightSpec("w", "complex64", (1,), 0)), "weight 0 has an unknown element type"),
        (weights(WeightSpec("w", "int8", (1,), 32)), "weight 0 is misplaced"),
        (
            weights(WeightSpec("v", "int8", (65,), 0), WeightSpec("w", "int8", (1,), 64)),
            "weight 1 is misplaced",
        ),
        (weights(WeightSpec("w", "int8", (101,), 0)), "its weights exceed 100 bytes"),
        (weights(WeightSpec("w", "int8", (2**48, 2**48), 0)), "its weights exceed 100 bytes"),
        (
            replace(example_details(), whole=replace(example_details().whole, inputs=())),
            "whole: its tensors differ",
        ),
    ],
)
def test_details_at_odds_with_the_manifest_are_refused(details: Details, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        parse_details(encode(details), example_manifest().variants[0])


def tensors(**changes: Any) -> Details:
    first, second, third = example_details().tensors
    return replace(example_details(), tensors=(first, replace(second, **changes), third))


@pytest.mark.parametrize(
    "details",
    [
        tensors(name="hush" * 65),
        tensors(name="hush", row_shape=(1,) * 9),
        tensors(name="hush", row_shape=(1, 0)),
        tensors(name="hush", dtype="complex64"),
        tensors(name="hush", row_shape=()),
        weights(WeightSpec("hush", "complex64", (1,), 0)),
        weights(WeightSpec("hush", "int8", (1,), 32)),
    ],
)
def test_no_secret_name_is_in_a_refusal_of_details(details: Details) -> None:
    """The enclave's host reads it."""
    with pytest.raises(PackageError, match=r"(tensor 1|slice 1: weight 0) \w+") as caught:
        parse_details(encode(details), example_manifest().variants[0])
    assert "hush" not in str(caught.value)
