"""Reading the parts of a package back from untrusted bytes.

One property is stated and fuzzed (tests/package): any byte string is either accepted or refused
with a ``PackageError``, nothing else. What is accepted is safe to index into: numbers name things
that exist, sizes agree, tensors are made before they are used, and every place lies in its memory.
"""

from __future__ import annotations

from typing import Final

import msgspec

from lasagna.errors import PackageError, RecordError
from lasagna.package.format import (
    DTYPES,
    HEADER,
    MAGIC,
    MAX_MANIFEST_BYTES,
    PROFILE_BATCHES,
    SIGNATURE_BYTES,
    VERSION,
    WEIGHT_ALIGNMENT,
    Details,
    Manifest,
    Places,
    SliceDetails,
    SliceFacts,
    TensorSpec,
    Variant,
)
from lasagna.trust.records import require_sealable


def split_header(head: bytes | memoryview, file_size: int) -> tuple[int, int]:
    """Check the fixed header; return the manifest's length and the offset of the first section.

    Raises:
        PackageError: not a package, another version, or shorter than it says.
    """
    if len(head) < HEADER.size:
        raise PackageError(f"a package has at least {HEADER.size} bytes, this has {len(head)}")
    magic, version, length = HEADER.unpack_from(head)
    if magic != MAGIC:
        raise PackageError("not a Lasagna package: it does not begin with the package magic")
    if version != VERSION:
        raise PackageError(f"package format {version}; this Lasagna reads format {VERSION}")
    if length > MAX_MANIFEST_BYTES:
        raise PackageError(f"manifest of {length} bytes; the limit is {MAX_MANIFEST_BYTES}")
    body = HEADER.size + length + SIGNATURE_BYTES
    if body > file_size:
        raise PackageError(f"truncated: the header needs {body} bytes, the file has {file_size}")
    return length, body


_MANIFEST: Final = msgspec.msgpack.Decoder(Manifest)
_DETAILS: Final = msgspec.msgpack.Decoder(Details)
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises; text that is not UTF-8 is the codec's own error."""


def parse_manifest(data: bytes | memoryview, body: int, file_size: int) -> Manifest:
    """Decode a manifest and check everything that later code relies on.

    Args:
        data: the manifest's bytes.
        body: file offset where the sections must begin.
        file_size: length of the file, where they must end.

    Raises:
        PackageError: with the first thing found wrong.
    """
    try:
        manifest = _MANIFEST.decode(data)
    except _MALFORMED as error:
        raise PackageError(f"malformed manifest: {error}") from None
    end = manifest.section_offsets(body)[-1]
    if end != file_size:
        raise PackageError(f"the sections end at byte {end}, the file at {file_size}")
    _check_specs(manifest.inputs, "input")
    _check_specs(manifest.outputs, "output")
    if not manifest.variants:
        raise PackageError("a package has at least one variant")
    if len({variant.name for variant in manifest.variants}) != len(manifest.variants):
        raise PackageError("two variants have one name")
    for variant in manifest.variants:
        _check_variant(manifest, variant)
    return manifest


def parse_details(data: bytes, variant: Variant) -> Details:
    """Decode the secret part of a variant and check it against the public part.

    An enclave's host reads the errors: they number what has a secret name.

    Raises:
        PackageError: malformed, or at odds with the manifest.
    """
    try:
        details = _DETAILS.decode(data)
    except _MALFORMED as error:
        raise PackageError(f"malformed details of variant {variant.name}: {error}") from None
    _check_specs(details.tensors, "tensor", secret=True)
    if tuple(spec.row_bytes for spec in details.tensors) != variant.tensor_bytes:
        raise PackageError(f"variant {variant.name}: tensor sizes differ from the manifest")
    if len(details.slices) != len(variant.slices):
        raise PackageError(f"variant {variant.name}: slice count differs from the manifest")
    for number, (inner, facts) in enumerate(zip(details.slices, variant.slices, strict=True)):
        _check_details(f"slice {number}", inner, facts)
    _check_details("whole", details.whole, variant.whole)
    return details


def _check_details(place: str, inner: SliceDetails, facts: SliceFacts) -> None:
    if (len(inner.inputs), len(inner.outputs)) != (len(facts.inputs), len(facts.outputs)):
        raise PackageError(f"{place}: its tensors differ from the manifest")
    position = 0
    for number, weight in enumerate(inner.weights):
        if weight.dtype not in DTYPES:
            raise PackageError(f"{place}: weight {number} has an unknown element type")
        if weight.offset < position or weight.offset % WEIGHT_ALIGNMENT:
            raise PackageError(f"{place}: weight {number} is misplaced")
        position = weight.offset + weight.size
    if position > facts.weight_bytes:
        raise PackageError(f"{place}: its weights exceed {facts.weight_bytes} bytes")


def _check_specs(specs: tuple[TensorSpec, ...], what: str, *, secret: bool = False) -> None:
    names = set()
    for number, spec in enumerate(specs):
        called = f"{what} {number}" if secret else f"{what} {spec.name!r}"
        if not spec.row_shape:
            raise PackageError(f"{called} has no leading dimension")
        try:
            require_sealable(spec.name, spec.dtype, spec.row_shape)
        except RecordError as error:
            reason = "" if secret else f": {error}"
            raise PackageError(f"{called} can't be sealed in records{reason}") from None
        names.add(spec.name)
    if len(names) != len(specs):
        raise PackageError(f"two {what}s have one name")


def _check_variant(manifest: Manifest, variant: Variant) -> None:
    where = f"variant {variant.name!r}"
    tensors, sections = len(variant.tensor_bytes), manifest.sections
    if not variant.slices:
        raise PackageError(f"{where} has no slices")
    for section in (variant.details, variant.frozen):
        if section >= len(sections):
            raise PackageError(f"{where}: no section {section}")
    for numbers, specs in ((variant.inputs, manifest.inputs), (variant.outputs, manifest.outputs)):
        if len(numbers) != len(specs):
            raise PackageError(f"{where}: inputs or outputs differ from the model's")
        for number, spec in zip(numbers, specs, strict=True):
            if number >= tensors or variant.tensor_bytes[number] != spec.row_bytes:
                raise PackageError(f"{where}: tensor {number} is not {spec.name!r}")
    known = set(variant.inputs)
    for index, facts in enumerate(variant.slices):
        _check_slice(manifest, variant, facts, f"{where}, slice {index}", known)
        known.update(facts.outputs)
    if not known.issuperset(variant.outputs):
        raise PackageError(f"{where}: no slice makes one of the model's outputs")
    place = f"{where}, whole"
    _check_slice(manifest, variant, variant.whole, place, set(variant.inputs))
    if not set(variant.outputs).issubset(variant.whole.outputs):
        raise PackageError(f"{place} does not make the model's outputs")
    _check_places(variant, variant.places, known, where)
    _check_places(variant, variant.whole_places, {*variant.inputs, *variant.whole.outputs}, place)


def _check_places(variant: Variant, places: Places, needed: set[int], where: str) -> None:
    if len(places.offsets) != len(variant.tensor_bytes):
        raise PackageError(f"{where}: not every tensor has a place")
    for number in needed:
        if places.offsets[number] + variant.tensor_bytes[number] > places.size:
            raise PackageError(f"{where}: the place of tensor {number} is outside the activations")


def _check_slice(
    manifest: Manifest, variant: Variant, facts: SliceFacts, place: str, known: set[int]
) -> None:
    sections = manifest.sections
    if max(facts.graph, *facts.weights) >= len(sections):
        raise PackageError(f"{place}: a section it names does not exist")
    if sum(sections[number] for number in facts.weights) != facts.weight_bytes:
        raise PackageError(f"{place}: its weights are not of the size it says")
    if len(facts.workspace) != len(PROFILE_BATCHES):
        raise PackageError(f"{place}: needs {len(PROFILE_BATCHES)} workspace sizes")
    if len(facts.compute_s) not in (0, len(PROFILE_BATCHES)):
        raise PackageError(f"{place}: needs {len(PROFILE_BATCHES)} compute times or none")
    if not known.issuperset(facts.inputs):
        raise PackageError(f"{place} uses a tensor before a slice has made it")
    if len(set(facts.outputs)) != len(facts.outputs) or known.intersection(facts.outputs):
        raise PackageError(f"{place} makes a tensor that exists already")
    if any(number >= len(variant.tensor_bytes) for number in facts.outputs):
        raise PackageError(f"{place} makes a tensor that the variant does not have")
