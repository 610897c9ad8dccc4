"""The property of every parser: any bytes are accepted or refused with ``PackageError``.

Whatever else is raised, or accepted although later code could not rely on it, fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasagna.errors import PackageError
from lasagna.package.format import (
    HEADER,
    MAGIC,
    MAX_MANIFEST_BYTES,
    PROFILE_BATCHES,
    SIGNATURE_BYTES,
    Details,
    Manifest,
    Places,
    SliceFacts,
    Variant,
    encode,
    sealed_size,
)
from lasagna.package.parse import parse_details, parse_manifest, split_header
from lasagna.package.reader import OpenPackage, Package

if TYPE_CHECKING:
    from tests.package.conftest import Sealed

BODY = 1000
# One temporary folder and one package for all examples is what is wanted.
many = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Parser:
    """A parser, and valid bytes for it to begin with."""

    parse: Callable[[bytes], object]
    valid: bytes

    def accepts(self, data: bytes) -> bool:
        try:
            self.parse(data)
        except PackageError:
            return False
        return True


@pytest.fixture(scope="module", params=["manifest", "details"])
def parser(request: pytest.FixtureRequest, three_layers: Sealed) -> Parser:
    with Package(three_layers.path) as package:
        opened = OpenPackage(package, three_layers.keys.content_key.reveal())
        variant = package.manifest.variants[0]
        if request.param == "manifest":
            return Parser(manifest_that_can_be_used, encode(package.manifest))
        valid = opened.read_section(variant.details)
    return Parser(lambda data: details_that_can_be_used(data, variant), valid)


def manifest_that_can_be_used(data: bytes) -> None:
    """Parse, as of a file that is as long as the manifest wants it, and try what users do."""
    try:
        end = BODY + sum(map(sealed_size, msgspec.msgpack.decode(data)[-1]))
    except Exception:  # whatever is not a manifest
        end = BODY
    manifest = parse_manifest(data, BODY, end)
    for variant in manifest.variants:
        check_variant(manifest, variant)


def check_variant(manifest: Manifest, variant: Variant) -> None:
    made = set(variant.inputs)
    for facts in variant.slices:
        check_slice(manifest, facts)
        assert made.issuperset(facts.inputs)
        assert made.isdisjoint(facts.outputs)
        made.update(facts.outputs)
    check_slice(manifest, variant.whole)
    check_places(variant, variant.places, made)
    check_places(variant, variant.whole_places, {*variant.inputs, *variant.whole.outputs})
    assert variant.details < len(manifest.sections)
    for numbers, specs in ((variant.inputs, manifest.inputs), (variant.outputs, manifest.outputs)):
        assert made.issuperset(numbers)
        for number, spec in zip(numbers, specs, strict=True):
            assert variant.tensor_bytes[number] == spec.row_bytes


def check_slice(manifest: Manifest, facts: SliceFacts) -> None:
    assert sum(manifest.sections[number] for number in facts.weights) == facts.weight_bytes
    assert manifest.sections[facts.graph] >= 0
    assert len(facts.workspace) == len(PROFILE_BATCHES)
    assert all(seconds >= 0 for seconds in facts.compute_s)


def check_places(variant: Variant, places: Places, tensors: set[int]) -> None:
    for tensor in tensors:
        assert places.offsets[tensor] + variant.tensor_bytes[tensor] <= places.size


def details_that_can_be_used(data: bytes, variant: Variant) -> Details:
    details = parse_details(data, variant)
    pairs = [*zip(details.slices, variant.slices, strict=True), (details.whole, variant.whole)]
    for inner, facts in pairs:
        assert len(inner.inputs) == len(facts.inputs)
        assert len(inner.outputs) == len(facts.outputs)
        for weight in inner.weights:
            assert weight.offset + weight.size <= facts.weight_bytes
    for spec, size in zip(details.tensors, variant.tensor_bytes, strict=True):
        assert spec.row_bytes == size
    return details


@given(st.binary(max_size=64), st.integers(0, 2**40))
def test_any_header_is_accepted_or_refused(head: bytes, file_size: int) -> None:
    try:
        length, body = split_header(head, file_size)
    except PackageError:
        return
    assert body == HEADER.size + length + SIGNATURE_BYTES <= file_size


@given(
    st.sampled_from([MAGIC, b"", b"LASAGNE\0"]),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32),
)
def test_any_fields_of_a_header_are_accepted_or_refused(
    magic: bytes, version: int, length: int, file_size: int
) -> None:
    try:
        split_header(HEADER.pack(magic, version, length), file_size)
    except PackageError:
        return
    assert (magic, version) == (MAGIC, 1)
    assert length <= min(MAX_MANIFEST_BYTES, file_size)


def test_valid_bytes_are_accepted(parser: Parser) -> None:
    parser.parse(parser.valid)


@many
@given(data=st.binary(max_size=300))
def test_random_bytes_are_accepted_or_refused(parser: Parser, data: bytes) -> None:
    parser.accepts(data)


@many
@given(data=st.data())
def test_changed_bytes_are_accepted_or_refused(parser: Parser, data: st.DataObject) -> None:
    changed = bytearray(parser.valid)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 4)))
        changed[start:stop] = data.draw(st.binary(max_size=6))
    parser.accepts(bytes(changed))


@many
@given(data=st.data())
def test_every_prefix_is_refused(parser: Parser, data: st.DataObject) -> None:
    assert not parser.accepts(parser.valid[: data.draw(st.integers(0, len(parser.valid) - 1))])


# Deeper than bytes get by chance: any part of the tree replaced by any other value.
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 300),
    st.floats(),
    st.binary(max_size=40),
    st.text(max_size=40),
    st.sampled_from(["float32", "int8", "complex64", "x", "y"]),
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4), max_leaves=6)


@many
@given(data=st.data())
def test_changed_fields_are_accepted_or_refused(parser: Parser, data: st.DataObject) -> None:
    tree: Any = msgspec.msgpack.decode(parser.valid)
    for _ in range(data.draw(st.integers(1, 2))):
        node = tree
        while True:
            index = data.draw(st.integers(0, len(node) - 1))
            if isinstance(node[index], list) and node[index] and data.draw(st.integers(0, 3)):
                node = node[index]
                continue
            node[index] = data.draw(values)
            break
    parser.accepts(msgspec.msgpack.encode(tree))


@pytest.mark.parametrize("depth", [10, 10_000, 1_000_000])
def test_deep_nesting_is_refused(parser: Parser, depth: int) -> None:
    assert not parser.accepts(b"\x91" * depth)


@pytest.mark.parametrize("claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb" * 5])
def test_a_length_without_its_data_is_refused(parser: Parser, claim: bytes) -> None:
    # In no time: nothing is allocated for what was only announced.
    assert not parser.accepts(claim)
    assert not parser.accepts(parser.valid[:1] + claim)


@many
@given(data=st.binary(max_size=200))
def test_any_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.lsg"
    path.write_bytes(data)

    with pytest.raises(PackageError):
        Package(path)


@many
@given(data=st.data())
def test_a_file_with_changed_bytes_is_accepted_or_refused(
    three_layers: Sealed, tmp_path: Path, data: st.DataObject
) -> None:
    changed = bytearray(three_layers.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 6000))
        changed[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path = tmp_path / "changed.lsg"
    path.write_bytes(changed)
    try:
        package = Package(path)
    except PackageError:
        return
    with package:  # only the signature could tell, and reading is safe without it
        opened = OpenPackage(package, three_layers.keys.content_key.reveal())
        for number in range(len(package.manifest.sections)):
            try:
                opened.read_section(number)
            except PackageError:
                continue
