"""From an ONNX model to a sealed package, in one call."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lasagna.errors import ModelError, PackageError, UsageError
from lasagna.models.arrange import arrange, lifetimes
from lasagna.models.build import Built, Limits, Progress, build_variant
from lasagna.models.graph import Array
from lasagna.models.profile import Profile
from lasagna.models.shapes import TensorInfo
from lasagna.models.slices import Slice, freeze, join_weights, write_weights
from lasagna.models.source import Source
from lasagna.package.format import (
    CHUNK_BYTES,
    HEADER,
    MAGIC,
    MAX_MANIFEST_BYTES,
    MAX_MODEL_NAME,
    PORTABLE,
    VERSION,
    Details,
    Manifest,
    SliceFacts,
    TensorSpec,
    Variant,
    chunk_associated_data,
    chunk_count,
    chunk_nonce,
    encode,
)
from lasagna.package.parse import parse_details, parse_manifest
from lasagna.trust.keys import ContentKey, SecretKey
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.records import MAX_NAME_BYTES
from lasagna.trust.signing import sign_manifest


@dataclass(frozen=True, slots=True)
class SealOptions:
    """How to seal.

    Attributes:
        slice_bytes: target and limit of a slice's weights, tiles included; None chooses, see
            ``build.slice_limit``.
        memory_bytes: intermediate results a slice may hold inside at batch 1; None chooses a
            quarter of what the neediest layer holds, at least 1 MiB.
        profile: measure compute times (workspace is measured either way).
        portable: include the variant for any processor.
        native: include the variant for processors like this one.
    """

    slice_bytes: int | None = None
    memory_bytes: int | None = None
    profile: bool = True
    portable: bool = True
    native: bool = True


@dataclass(frozen=True, slots=True)
class SealReport:
    """What was sealed.

    Attributes:
        manifest: the public part of the package.
        file_bytes: length of the package.
        self_check: largest difference to plain ONNX Runtime, relative to the largest output, for
            each variant by name.
    """

    manifest: Manifest
    file_bytes: int
    self_check: Mapping[str, float]


def seal(
    source: Source,
    name: str,
    owner: Ed25519PrivateKey,
    path: Path,
    options: SealOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[ModelKeys, SealReport]:
    """Optimise, tile, cut, profile, encrypt and sign a model.

    Args:
        source: the model, from ``load_source`` or ``prepare``.
        name: what the package is called when served.
        owner: the key that signs.
        path: the file to write; it appears whole or not at all.
        options: see ``SealOptions``.
        progress: told what goes on.

    Returns:
        The keys that open the package, and what was sealed.

    Raises:
        ModelError: the model can't be sealed; the message names the layer or tensor.
        UsageError: the options exclude every variant, or the file can't be written.
    """
    options = options or SealOptions()
    if not (options.portable or options.native):
        raise UsageError("a package needs at least one variant, portable or native")
    if not 1 <= len(name) <= MAX_MODEL_NAME:
        raise UsageError(f"a model's name has 1 to {MAX_MODEL_NAME} characters")
    with tempfile.TemporaryDirectory(prefix="lasagna-seal-") as scratch:
        built: dict[str, Built] = {}
        for portable in (False, True):
            if not (options.portable if portable else options.native) or PORTABLE in built:
                continue  # without convolutions both are the same
            folder = Path(scratch) / ("portable" if portable else "native")
            folder.mkdir()
            one = build_variant(
                source,
                folder,
                portable=portable,
                limits=Limits(options.slice_bytes, options.memory_bytes),
                timed=options.profile,
                progress=progress,
            )
            built[one.name] = one
        keys, manifest, size = _write(source, name, owner, path, list(built.values()), progress)
    differences = {one.name: one.difference for one in built.values()}
    return keys, SealReport(manifest, size, differences)


@dataclass(slots=True)
class _Sections:
    """Sections in the order they will be written, each distinct content once."""

    sources: list[bytes | Slice]
    index: dict[bytes, int]

    def add(self, content: bytes | Slice) -> int:
        """The number of the section that holds this content."""
        data = content if isinstance(content, bytes) else _plain(content)
        kind = b"bytes" if isinstance(content, bytes) else b"weights"
        digest = kind + hashlib.sha256(data).digest()
        if digest not in self.index:
            self.index[digest] = len(self.sources)
            self.sources.append(content)
        return self.index[digest]


def _plain(content: bytes | Slice) -> bytes | bytearray:
    if isinstance(content, bytes):
        return content
    data = bytearray(content.weight_bytes)
    write_weights(content, memoryview(data))
    return data


def _write(
    source: Source,
    name: str,
    owner: Ed25519PrivateKey,
    path: Path,
    built: Sequence[Built],
    progress: Progress,
) -> tuple[ModelKeys, Manifest, int]:
    sections = _Sections([], {})
    variants = [_variant(one, source, sections, progress) for one in built]
    first = built[0]
    reference = source.references[0]
    package_id, content_key = os.urandom(32), AESGCM.generate_key(256)
    public = owner.public_key().public_bytes_raw()
    sizes = tuple(
        len(content) if isinstance(content, bytes) else content.weight_bytes
        for content in sections.sources
    )
    manifest = Manifest(
        package_id=package_id,
        name=name,
        owner=public,
        batchable=source.batchable,
        batch_note=source.batch_note,
        inputs=tuple(_spec(first.tensors, *item) for item in reference.inputs.items()),
        outputs=tuple(_spec(first.tensors, *item) for item in reference.outputs.items()),
        variants=tuple(variants),
        sections=sizes,
    )
    encoded = encode(manifest)
    head = HEADER.pack(MAGIC, VERSION, len(encoded)) + encoded + sign_manifest(owner, encoded)
    _check_own(manifest, encoded, sections)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(head)
            for sealed in _encrypt(package_id, content_key, sections.sources, progress):
                file.write(sealed)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return ModelKeys(package_id, ContentKey(SecretKey(content_key)), public), manifest, size


def _check_own(manifest: Manifest, encoded: bytes, sections: _Sections) -> None:
    """Read what is about to be written as any reader will: a limit of the format is found now."""
    try:
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise PackageError(f"a manifest of {len(encoded)} bytes is too long")
        parse_manifest(encoded, 0, manifest.section_offsets(0)[-1])
        for variant in manifest.variants:
            parse_details(bytes(_plain(sections.sources[variant.details])), variant)
    except PackageError as error:
        raise ModelError(f"the model does not fit the package format: {error}") from None


def _variant(built: Built, source: Source, sections: _Sections, progress: Progress) -> Variant:
    number = {tensor: index for index, tensor in enumerate(built.order)}

    def facts(piece: Slice, profile: Profile, weights: tuple[int, ...], size: int) -> SliceFacts:
        return SliceFacts(
            graph=sections.add(piece.model),
            weights=weights,
            weight_bytes=size,
            inputs=tuple(number[name] for name in piece.inputs),
            outputs=tuple(number[name] for name in piece.outputs),
            layers=len(piece.details.layers),
            workspace=profile.workspace,
            compute_s=profile.compute_s,
        )

    slices = []
    for position, (piece, profile) in enumerate(zip(built.slices, built.profiles, strict=True)):
        progress(f"lay out ({built.name})", position, len(built.slices))
        slices.append(facts(piece, profile, (sections.add(piece),), piece.weight_bytes))
    whole_details = join_weights(built.whole, built.slices)
    whole = facts(
        built.whole,
        built.whole_profile,
        tuple(section for one in slices for section in one.weights),
        sum(one.weight_bytes for one in slices),
    )
    specs = tuple(_sealable(built.tensors[name].spec) for name in built.order)
    details = Details(specs, tuple(piece.details for piece in built.slices), whole_details)
    reference = source.references[0]
    inputs = tuple(number[name] for name in reference.inputs)
    outputs = tuple(number[name] for name in reference.outputs)
    sizes = tuple(spec.row_bytes for spec in specs)
    in_place = [(number[a], number[b]) for piece in built.slices for a, b in piece.in_place]
    return Variant(
        name=built.name,
        block=built.block,
        details=sections.add(encode(details)),
        tensor_bytes=sizes,
        inputs=inputs,
        outputs=outputs,
        slices=tuple(slices),
        places=arrange(sizes, lifetimes(inputs, outputs, slices), in_place),
        whole=whole,
        whole_places=arrange(sizes, lifetimes(inputs, outputs, [whole])),
        frozen=sections.add(freeze(built.whole)),
    )


def _sealable(spec: TensorSpec) -> TensorSpec:
    """With a name that records take: inside the network it only has to be one of a kind."""
    name = spec.name.encode()
    if len(name) <= MAX_NAME_BYTES:
        return spec
    begin = name[: MAX_NAME_BYTES // 2].decode(errors="ignore")
    return TensorSpec(f"{begin}~{hashlib.sha256(name).hexdigest()}", spec.dtype, spec.row_shape)


def _spec(tensors: Mapping[str, TensorInfo], name: str, array: Array) -> TensorSpec:
    spec = tensors[name].spec
    if array.dtype.name != spec.dtype:
        raise ModelError(f"{name!r} changed its element type to {spec.dtype} when optimised")
    return spec


def _encrypt(
    package_id: bytes,
    content_key: bytes,
    contents: Sequence[bytes | Slice],
    progress: Progress,
) -> Iterator[bytes]:
    cipher = AESGCM(content_key)
    for section, content in enumerate(contents):
        progress("encrypt", section, len(contents))
        data = memoryview(_plain(content))
        for chunk in range(chunk_count(len(data))):
            part = data[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
            aad = chunk_associated_data(package_id, section, len(data), chunk)
            yield cipher.encrypt(chunk_nonce(section, chunk), part, aad)
