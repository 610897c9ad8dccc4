"""docs/reference/package.md says what the code does, and suffices to write another reader."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lasagna.models.cut import CUT_COST_BYTES
from lasagna.models.tile import COLUMN_ALIGNMENT
from lasagna.package import format as package_format
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.records import MAX_NAME_BYTES, MAX_RANK, MAX_ROW_BYTES

if TYPE_CHECKING:
    from tests.package.conftest import Sealed

PAGE = (Path(__file__).parents[2] / "docs/reference/package.md").read_text()
WORDS = " ".join(PAGE.split())
RECORDS = "Manifest TensorSpec Variant SliceFacts Places Details SliceDetails Layer WeightSpec"


@pytest.mark.parametrize("name", RECORDS.split())
def test_fields_are_documented_in_their_order(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", PAGE, re.MULTILINE)
    without_remarks = re.sub(r"\([^()]*\)", "", row)

    assert re.findall(r"`(\w+)`", without_remarks) == list(
        getattr(package_format, name).__struct_fields__
    )


def test_element_types_are_documented() -> None:
    listed = " ".join(f"`{name}`" for name in package_format.DTYPES)

    assert f"Element types are {listed}." in WORDS


@pytest.mark.parametrize(
    "words",
    [
        f"**chunks** of {package_format.CHUNK_BYTES} bytes",
        f"its tag of {package_format.TAG_BYTES} bytes",
        f"signature ({package_format.SIGNATURE_BYTES} bytes)",
        f"format = {package_format.VERSION} (4)",
        f"| manifest | {package_format.MAX_MANIFEST_BYTES // 2**20} MiB |",
        f"| a name of a layer or weight | {package_format.MAX_NAME} characters |",
        f"| a name of a tensor | {MAX_NAME_BYTES} bytes of UTF-8, at least 1 |",
        f"| dimensions of a tensor | {MAX_RANK}, each at least 1 |",
        f"| bytes a row of a tensor | {MAX_ROW_BYTES // 2**30} GiB |",
        f"| the model's name | {package_format.MAX_MODEL_NAME} characters |",
        f"at a multiple of {package_format.WEIGHT_ALIGNMENT} bytes",
        f"at batch {', '.join(map(str, package_format.PROFILE_BATCHES))}",
        f"{CUT_COST_BYTES // 1000} kB for the call",
        {16: "columns in sixteens"}[COLUMN_ALIGNMENT],
    ],
)
def test_numbers_are_those_of_the_code(words: str) -> None:
    assert words in WORDS


def test_named_tests_exist() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))

    assert len(named) == 5
    assert named <= set(re.findall(r"def (test_\w+)\(", tests))


# A reader written from the page, without lasagna.package.


def read_as_documented(data: bytes, content_key: bytes, owner: bytes) -> tuple[Any, list[bytes]]:
    """The manifest as plain lists, and every section's plaintext."""
    magic, version, length = struct.unpack("<8sII", data[:16])
    assert (magic, version) == (b"LASAGNA\0", 1)
    signed, signature = data[16 : 16 + length], data[16 + length : 80 + length]
    parts = [b"lasagna/v1/manifest", signed]
    canonical = struct.pack(">I", len(parts)) + b"".join(
        struct.pack(">I", len(part)) + part for part in parts
    )
    Ed25519PublicKey.from_public_bytes(owner).verify(signature, canonical)
    manifest = msgspec.msgpack.decode(signed)
    package_id, sections = manifest[0], manifest[8]
    cipher, position, plain = AESGCM(content_key), 80 + length, []
    for section, size in enumerate(sections):
        content = b""
        for chunk in range(max(1, -(-size // 1048576))):
            end = position + min(1048576, size - len(content)) + 16
            nonce = struct.pack("<IQ", section, chunk)
            bound = b"lasagna/v1/chunk\0" + package_id
            bound += struct.pack("<IQQ", section, size, chunk)
            content += cipher.decrypt(nonce, data[position:end], bound)
            position = end
        plain.append(content)
    assert position == len(data)
    return manifest, plain


def test_a_reader_written_from_the_page_reads_the_same(
    three_layers: Sealed, one_gemm: Sealed
) -> None:
    for sealed in (three_layers, one_gemm):
        key = sealed.keys.content_key.reveal()
        data = sealed.path.read_bytes()
        manifest, plain = read_as_documented(data, key, sealed.keys.owner_public_key)
        with Package(sealed.path) as package:
            opened = OpenPackage(package, key)
            assert manifest == msgspec.msgpack.decode(package_format.encode(package.manifest))
            assert plain == [opened.read_section(n) for n in range(len(plain))]
            assert manifest[1] == package.manifest.name
            length = int.from_bytes(data[12:16], "little")
            assert package.model_digest == hashlib.sha256(data[16 : 80 + length]).digest()
            details = msgspec.msgpack.decode(plain[manifest[7][0][2]])
            first = package.manifest.variants[0]
            assert [t[0] for t in details[0]] == [t.name for t in opened.details(first).tensors]
