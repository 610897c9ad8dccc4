"""Attacks on real sealed packages: every byte counts, and every piece has one place."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lasagna.errors import PackageError
from lasagna.package.format import (
    CHUNK_BYTES,
    HEADER,
    SIGNATURE_BYTES,
    TAG_BYTES,
    chunk_count,
    chunk_nonce,
    encode,
)
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.signing import sign_manifest

if TYPE_CHECKING:
    from tests.package.conftest import Sealed

# Files are written into one temporary folder for all examples, which is what is wanted.
many = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_all(path: Path, keys: ModelKeys) -> list[bytes]:
    """All that a careful reader does; raises PackageError if anything is not as sealed."""
    with Package(path) as package:
        package.verify_signature(keys.owner_public_key)
        opened = OpenPackage(package, keys.content_key.reveal())
        for variant in package.manifest.variants:
            opened.details(variant)
        return [opened.read_section(number) for number in range(len(package.manifest.sections))]


def chunks(package: Package) -> Iterator[tuple[int, int]]:
    for section, size in enumerate(package.manifest.sections):
        for chunk in range(chunk_count(size)):
            yield section, chunk


def extent(package: Package, section: int, chunk: int) -> tuple[int, int]:
    """Where a chunk's ciphertext lies in the file."""
    body = HEADER.size + len(encode(package.manifest)) + SIGNATURE_BYTES
    start = package.manifest.section_offsets(body)[section] + chunk * (CHUNK_BYTES + TAG_BYTES)
    return start, start + len(package.ciphertext(section, chunk))


def resigned(sealed: Sealed, folder: Path, signer: Ed25519PrivateKey, **changes: Any) -> Path:
    """The package with a changed manifest, signed anew."""
    with Package(sealed.path) as package:
        body = extent(package, 0, 0)[0]
        manifest = encode(msgspec.structs.replace(package.manifest, **changes))
    data = sealed.path.read_bytes()
    head = data[:12] + struct.pack("<I", len(manifest))
    path = folder / "resigned.lsg"
    path.write_bytes(head + manifest + sign_manifest(signer, manifest) + data[body:])
    return path


def test_package_opens_as_sealed(three_layers: Sealed, one_gemm: Sealed) -> None:
    assert len(read_all(three_layers.path, three_layers.keys)) > 15
    largest = max(read_all(one_gemm.path, one_gemm.keys), key=len)

    assert largest == one_gemm.weights[0]
    assert chunk_count(len(largest)) == 3


def test_every_byte_of_the_file_is_accounted_for(three_layers: Sealed) -> None:
    with Package(three_layers.path) as package:
        extents = [extent(package, *place) for place in chunks(package)]

    ends = [extents[0][0], *(stop for _, stop in extents)]
    assert [start for start, _ in extents] == ends[:-1]
    assert ends[-1] == three_layers.path.stat().st_size


def test_digest_is_that_of_manifest_and_signature(three_layers: Sealed, one_gemm: Sealed) -> None:
    with Package(three_layers.path) as one, Package(one_gemm.path) as other:
        assert len(one.model_digest) == 32
        assert one.model_digest != other.model_digest


# A flipped bit, anywhere.


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@many
@given(place=st.floats(0, 1, exclude_max=True))
@example(place=0.0)
@example(place=1 - 1e-12)
def test_a_flipped_bit_anywhere_is_found(
    three_layers: Sealed, tmp_path: Path, place: float
) -> None:
    data = three_layers.path.read_bytes()
    path = tmp_path / "flipped.lsg"
    path.write_bytes(flipped(data, int(place * 8 * len(data))))

    with pytest.raises(PackageError):
        read_all(path, three_layers.keys)


def test_a_flipped_bit_in_every_byte_before_the_sections_is_found(
    three_layers: Sealed, tmp_path: Path
) -> None:
    data, path = three_layers.path.read_bytes(), tmp_path / "flipped.lsg"
    with Package(three_layers.path) as package:
        body = extent(package, 0, 0)[0]
    for place in range(body):
        path.write_bytes(flipped(data, 8 * place + place % 8))
        with pytest.raises(PackageError), Package(path) as package:
            package.verify_signature(three_layers.keys.owner_public_key)


@many
@given(data=st.data())
def test_a_change_of_any_chunk_is_found_in_that_chunk(
    three_layers: Sealed, tmp_path: Path, data: st.DataObject
) -> None:
    with Package(three_layers.path) as package:
        section, chunk = data.draw(st.sampled_from(list(chunks(package))))
        start, stop = extent(package, section, chunk)
    bit = data.draw(st.integers(8 * start, 8 * stop - 1))
    path = tmp_path / "changed.lsg"
    path.write_bytes(flipped(three_layers.path.read_bytes(), bit))

    with Package(path) as package:
        package.verify_signature(three_layers.keys.owner_public_key)
        opened = OpenPackage(package, three_layers.keys.content_key.reveal())
        with pytest.raises(PackageError, match=f"section {section}, chunk {chunk} does not open"):
            opened.read_section(section)


# Bytes too few, too many, or other files altogether.


@many
@given(place=st.floats(0, 1, exclude_max=True))
@example(place=0.0)
def test_a_truncated_file_is_refused(three_layers: Sealed, tmp_path: Path, place: float) -> None:
    data, path = three_layers.path.read_bytes(), tmp_path / "short.lsg"
    path.write_bytes(data[: int(place * len(data))])

    with pytest.raises(PackageError):
        Package(path)


@pytest.mark.parametrize("more", [b"\0", bytes(16), bytes(CHUNK_BYTES)])
def test_an_extended_file_is_refused(three_layers: Sealed, tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "long.lsg"
    path.write_bytes(three_layers.path.read_bytes() + more)

    with pytest.raises(PackageError, match="the sections end at byte"):
        Package(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.lsg", tmp_path):
        with pytest.raises(PackageError, match=f"can't read package {path}: "):
            Package(path)


# Pieces of one package in another, or elsewhere in the same one.


def test_swapped_chunks_of_a_section_do_not_open(one_gemm: Sealed, tmp_path: Path) -> None:
    data = bytearray(one_gemm.path.read_bytes())
    with Package(one_gemm.path) as package:
        section = max(chunks(package), key=lambda place: place[1])[0]
        (a, b), (c, d) = extent(package, section, 0), extent(package, section, 1)
    data[a:b], data[c:d] = data[c:d], data[a:b]
    path = tmp_path / "swapped.lsg"
    path.write_bytes(data)

    with pytest.raises(PackageError, match=f"section {section}, chunk 0 does not open"):
        read_all(path, one_gemm.keys)


def test_swapped_sections_do_not_open(three_layers: Sealed, tmp_path: Path) -> None:
    data = bytearray(three_layers.path.read_bytes())
    with Package(three_layers.path) as package:
        sizes = package.manifest.sections
        one, other = next(
            (i, j)
            for i, size in enumerate(sizes)
            for j in range(i + 1, len(sizes))
            if sizes[j] == size
        )
        (a, b), (c, d) = extent(package, one, 0), extent(package, other, 0)
    data[a:b], data[c:d] = data[c:d], data[a:b]
    path = tmp_path / "swapped.lsg"
    path.write_bytes(data)

    with pytest.raises(PackageError, match=f"section {one}, chunk 0 does not open"):
        read_all(path, three_layers.keys)


def test_sealing_twice_shares_nothing(three_layers: Sealed, sealed_again: Sealed) -> None:
    assert three_layers.keys.package_id != sealed_again.keys.package_id
    assert three_layers.keys.content_key != sealed_again.keys.content_key
    with Package(three_layers.path) as one, Package(sealed_again.path) as other:
        assert one.manifest.sections == other.manifest.sections
        for place in chunks(one):
            assert one.ciphertext(*place) != other.ciphertext(*place)


def test_a_chunk_of_another_package_does_not_open(
    three_layers: Sealed, sealed_again: Sealed, tmp_path: Path
) -> None:
    original, other = three_layers.path.read_bytes(), sealed_again.path.read_bytes()
    with Package(three_layers.path) as package, Package(sealed_again.path) as twin:
        places = [
            (place, extent(package, *place), extent(twin, *place)) for place in chunks(package)
        ]
    path = tmp_path / "mixed.lsg"
    for (section, chunk), (a, b), (c, d) in places:
        path.write_bytes(original[:a] + other[c:d] + original[b:])
        with pytest.raises(PackageError, match=f"section {section}, chunk {chunk} does not open"):
            read_all(path, three_layers.keys)


def test_another_packages_manifest_does_not_fit(
    three_layers: Sealed, sealed_again: Sealed, tmp_path: Path
) -> None:
    # Signed by the same owner, so the signature is right; the sections are another package's.
    with Package(three_layers.path) as one, Package(sealed_again.path) as other:
        start, stop = extent(one, 0, 0)[0], extent(other, 0, 0)[0]
    path = tmp_path / "mixed.lsg"
    path.write_bytes(sealed_again.path.read_bytes()[:stop] + three_layers.path.read_bytes()[start:])

    for keys in (three_layers.keys, sealed_again.keys):
        with pytest.raises(PackageError, match=r"section .* chunk 0 does not open"):
            read_all(path, keys)


def test_sections_under_another_packages_id_do_not_open(
    three_layers: Sealed, tmp_path: Path
) -> None:
    # Even by the owner, with the right content key: the id is in every tag.
    path = resigned(three_layers, tmp_path, three_layers.owner, package_id=bytes(32))

    with pytest.raises(PackageError, match=r"section .* does not open"):
        read_all(path, three_layers.keys)


def test_another_owners_signature_is_refused(three_layers: Sealed, tmp_path: Path) -> None:
    thief = Ed25519PrivateKey.generate()
    public = thief.public_key().public_bytes_raw()
    path = resigned(three_layers, tmp_path, thief, owner=public)

    with pytest.raises(PackageError, match="not signed by the owner's key"):
        read_all(path, three_layers.keys)
    with Package(path) as package:  # the manifest names the thief, and that counts for nothing
        assert package.manifest.owner == public


def test_another_name_needs_another_signature(three_layers: Sealed, tmp_path: Path) -> None:
    data = three_layers.path.read_bytes().replace(b"three layers", b"tree lawyers", 1)
    path = tmp_path / "renamed.lsg"
    path.write_bytes(data)

    with pytest.raises(PackageError, match="not signed by the owner's key"):
        read_all(path, three_layers.keys)


def test_another_content_key_opens_nothing(three_layers: Sealed, sealed_again: Sealed) -> None:
    with Package(three_layers.path) as package:
        opened = OpenPackage(package, sealed_again.keys.content_key.reveal())
        for number in range(len(package.manifest.sections)):
            with pytest.raises(PackageError, match=f"section {number}, chunk 0 does not open"):
                opened.read_section(number)


def test_closing_survives_an_error_that_holds_a_chunk(three_layers: Sealed) -> None:
    # The error's traceback refers to the frame with the view of the mapped file.
    with pytest.raises(PackageError), Package(three_layers.path) as package:
        OpenPackage(package, bytes(32)).read_section(0)


# What the file gives away.


def test_nonces_never_repeat(three_layers: Sealed, one_gemm: Sealed) -> None:
    for sealed in (three_layers, one_gemm):
        with Package(sealed.path) as package:
            places = list(chunks(package))
        nonces = [chunk_nonce(*place) for place in places]

        assert len(set(nonces)) == len(nonces) > 3


def test_no_weight_stands_in_the_file(three_layers: Sealed, one_gemm: Sealed) -> None:
    for sealed in (three_layers, one_gemm):
        data = sealed.path.read_bytes()
        for weight in sealed.weights:
            for start in range(0, len(weight) - 16, max(16, len(weight) // 500)):
                assert weight[start : start + 16] not in data


def test_no_name_from_inside_the_model_stands_in_the_file(three_layers: Sealed) -> None:
    data = three_layers.path.read_bytes()

    assert b"three layers" in data  # public
    for name in (b"Conv", b"Gemm", b"stem", b"crown"):
        assert name not in data
        assert any(name in section for section in read_all(three_layers.path, three_layers.keys))
