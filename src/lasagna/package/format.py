"""The sealed package's structure on disk.

::

    offset 0   MAGIC (8 bytes) | format version u32 | manifest length u32     (little-endian)
          16   manifest (MessagePack of Manifest, public) | Ed25519 signature (64 bytes)
           …   section 0 | section 1 | …    each in chunks of AES-256-GCM ciphertext + 16-byte tag

The manifest holds what an untrusted scheduler may know: sizes, times, slice numbers, the model's
inputs and outputs. Layer names, shapes inside the network, graphs and weights are in the sections.
Every byte of the file is covered: header and manifest by the signature, the sections by their
tags; sections follow each other without a gap and the last one ends the file.

``package.parse`` reads it back, and refuses what is not safe to index into.
"""

from __future__ import annotations

import itertools
import struct
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from lasagna.trust import records, signing
from lasagna.units import MIB

MAGIC: Final = b"LASAGNA\0"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sII")
SIGNATURE_BYTES: Final = signing.SIGNATURE_BYTES
TAG_BYTES: Final = records.TAG_BYTES
CHUNK_BYTES: Final = MIB
"""Plaintext bytes of a chunk: 3.4-3.7 GB/s a core at 1 MiB, 1.9 at 4 KiB (DESIGN.md, fact 4)."""
MAX_MANIFEST_BYTES: Final = 16 * MIB
WEIGHT_ALIGNMENT: Final = 64
"""Weights start at multiples of a cache line, as ONNX Runtime's own allocator would place them."""
PROFILE_BATCHES: Final = (1, 2, 4, 8)
PORTABLE: Final = "portable"
MAX_NAME: Final = 1024
"""Characters of a layer's name or a weight's; tensors have the limit of records."""
MAX_MODEL_NAME: Final = 256

DTYPES: Final[dict[str, np.dtype[np.generic]]] = {
    name: np.dtype(name) for name in records.ITEM_BYTES
}
"""Element types, by their names."""

_Index = Annotated[int, Meta(ge=0, le=2**20)]
_Count = Annotated[int, Meta(ge=0, le=2**48)]
_Seconds = Annotated[float, Meta(ge=0.0, le=1e6)]
_Name = Annotated[str, Meta(max_length=MAX_NAME)]
_Text = Annotated[str, Meta(max_length=4096)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Encoded as an array: field order is part of the format."""


class TensorSpec(_Record, frozen=True):
    """A named tensor, by the shape of one of its rows.

    A **row** is what a tensor has at batch 1. Its *leading dimension* need not be 1 there: a model
    may fold positions or heads into it. So ``row_shape`` includes it, as ``(1, 3, 224, 224)`` or
    ``(16, 64)``. With n rows (a **batch**, of one request or several) it is n times as long and the
    rest stays: ``(16 * n, 64)``. Rows lie one behind the other, ``row_bytes`` each, and each is
    sealed in a record of its own, which also sets the limits (``records.require_sealable``).
    """

    name: _Name
    dtype: _Name
    row_shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**40)], ...], Meta(max_length=16)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        count = 1
        for extent in self.row_shape:
            count *= extent
        return count * DTYPES[self.dtype].itemsize

    def shape(self, rows: int) -> tuple[int, ...]:
        """The shape with so many rows."""
        return (self.row_shape[0] * rows, *self.row_shape[1:])


class SliceFacts(_Record, frozen=True):
    """What a scheduler may know of one slice. Tensors are numbers of ``Variant.tensor_bytes``."""

    graph: _Index
    weights: Annotated[tuple[_Index, ...], Meta(min_length=1)]
    """Sections whose plaintext, one behind the other, is the slice's weights."""
    weight_bytes: _Count
    inputs: tuple[_Index, ...]
    outputs: tuple[_Index, ...]
    layers: _Index
    workspace: tuple[_Count, ...]
    """Bytes that ONNX Runtime allocates while running, for each of ``PROFILE_BATCHES``: measured at
    batch 1 and 2, estimated from above for the others."""
    compute_s: tuple[_Seconds, ...]
    """Seconds on one thread of the sealing machine, for each of ``PROFILE_BATCHES``, or empty."""


class Places(_Record, frozen=True):
    """Where tensors that cross cuts lie while they are needed: offsets for one row.

    Both are multiplied by the batch that memory is reserved for. Tensors that are needed together
    lie apart, but a sum may take the place of what it is added to, in the slice that makes it.
    """

    offsets: tuple[_Count, ...]
    size: _Count


class Variant(_Record, frozen=True):
    """The model compiled for one memory layout."""

    name: _Name
    block: Annotated[int, Meta(ge=0, le=64)]
    """Channels per block of ONNX Runtime's NCHWc layout; 0 when the graph runs anywhere."""
    details: _Index
    tensor_bytes: tuple[_Count, ...]
    """Bytes a row of each tensor that crosses a cut, the model's inputs and outputs included."""
    inputs: tuple[_Index, ...]
    outputs: tuple[_Index, ...]
    slices: tuple[SliceFacts, ...]
    places: Places
    whole: SliceFacts
    """All layers as one slice over the same weights, for an enclave in which they all fit."""
    whole_places: Places
    frozen: _Index
    """Section of the whole's graph with weights as constants, which their values make a model of:
    for an enclave with room for the copies that ONNX Runtime packs for its kernels."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights of all slices."""
        return sum(facts.weight_bytes for facts in self.slices)


class Manifest(_Record, frozen=True):
    """The public, signed part of a package."""

    package_id: Annotated[bytes, Meta(min_length=32, max_length=32)]
    name: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_NAME)]
    owner: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """The owner's Ed25519 public key; whom to believe is told by the key broker, not by this."""
    batchable: bool
    batch_note: _Text
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    sections: tuple[_Count, ...]
    """Plaintext bytes of each section; they follow the signature in this order, without gaps."""

    def section_offsets(self, body: int) -> tuple[int, ...]:
        """File offset of every section, and of the end, when the first begins at ``body``."""
        return tuple(itertools.accumulate(map(sealed_size, self.sections), initial=body))


class Layer(_Record, frozen=True):
    """One layer or tile, for people.

    ``tile`` is like ``3/50``, or ``join`` where tiles' results are put together, or empty.
    """

    name: _Name
    op: _Name
    tile: _Name
    weight_bytes: _Count


class WeightSpec(_Record, frozen=True):
    """A weight of a slice: graph input ``name``, at byte ``offset`` of the slice's weights."""

    name: _Name
    dtype: _Name
    shape: Annotated[tuple[_Count, ...], Meta(max_length=16)]
    offset: _Count

    @property
    def size(self) -> int:
        """Bytes of the weight."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * DTYPES[self.dtype].itemsize


class SliceDetails(_Record, frozen=True):
    """How to bind one slice: graph input and output names in the order of ``SliceFacts``."""

    layers: tuple[Layer, ...]
    weights: tuple[WeightSpec, ...]
    inputs: tuple[_Name, ...]
    outputs: tuple[_Name, ...]


class Details(_Record, frozen=True):
    """The secret description of one variant."""

    tensors: tuple[TensorSpec, ...]
    slices: tuple[SliceDetails, ...]
    whole: SliceDetails


def chunk_count(size: int) -> int:
    """Chunks of a section of ``size`` plaintext bytes; an empty section still has one."""
    return max(1, -(-size // CHUNK_BYTES))


def sealed_size(size: int) -> int:
    """Bytes in the file of a section of ``size`` plaintext bytes."""
    return size + TAG_BYTES * chunk_count(size)


def weight_chunks(manifest: Manifest, facts: SliceFacts) -> list[tuple[int, int, int, int]]:
    """Where the chunks of a slice's weights come from and go: (section, chunk, begin, end).

    ``begin`` and ``end`` are places in the slice's weights as they lie in memory.
    """
    found, base = [], 0
    for section in facts.weights:
        size = manifest.sections[section]
        for chunk in range(chunk_count(size)):
            begin = chunk * CHUNK_BYTES
            found.append((section, chunk, base + begin, base + min(size, begin + CHUNK_BYTES)))
        base += size
    return found


def chunk_nonce(section: int, chunk: int) -> bytes:
    """The 96-bit nonce of a chunk.

    A package's content key is drawn fresh when it is sealed and encrypts each (section, chunk)
    once, so the pair never repeats under one key (deterministic construction, NIST SP 800-38D,
    section 8.2.1).
    """
    return struct.pack("<IQ", section, chunk)


def chunk_associated_data(package_id: bytes, section: int, size: int, chunk: int) -> bytes:
    """Associated data of a chunk: it opens in this package, section, length and place only."""
    return b"lasagna/v1/chunk\0" + package_id + struct.pack("<IQQ", section, size, chunk)


def encode(record: _Record) -> bytes:
    """The canonical encoding of a part of the format."""
    return msgspec.msgpack.encode(record)
