"""Reading a sealed package: the public part without a key, the sections with it.

The file is mapped and stays untrusted: the host can write to it at any time. AES-GCM reads a
ciphertext twice, to check it and to decrypt it, so a chunk is copied into private memory first and
both happen there. (Decrypting straight from the mapping is a fifth faster, and open to a change in
between that passes the check: docs/adr/0003.)
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from lasagna.errors import PackageError
from lasagna.package.format import (
    CHUNK_BYTES,
    HEADER,
    SIGNATURE_BYTES,
    TAG_BYTES,
    Details,
    Manifest,
    Variant,
    chunk_associated_data,
    chunk_count,
    chunk_nonce,
)
from lasagna.package.parse import parse_details, parse_manifest, split_header
from lasagna.trust.signing import verify_manifest


class Package:
    """An open package file. Thread-safe after construction.

    Attributes:
        manifest: the public facts. Believe them after ``verify_signature``.
        model_digest: SHA-256 of the manifest and its signature: the name of exactly this package
            in evidence, requests and records.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and parse its public part.

        Raises:
            PackageError: the file can't be read, or is not a well-formed package.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < HEADER.size:
                    raise PackageError(f"{path} is no package: it has only {size} bytes")
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise PackageError(f"can't read package {path}: {error.strerror}") from None
        self._view = memoryview(self._map)
        try:
            length, body = split_header(self._view[: HEADER.size], size)
            signed = bytes(self._view[HEADER.size : body])
            self._manifest_bytes = signed[:length]
            self._signature = signed[length:]
            self.manifest: Manifest = parse_manifest(self._manifest_bytes, body, size)
            self._offsets = self.manifest.section_offsets(body)
            self.model_digest = hashlib.sha256(signed).digest()
        except PackageError:
            self.close()
            raise

    def verify_signature(self, owner: bytes) -> None:
        """Check that this owner signed the manifest.

        Args:
            owner: the Ed25519 public key to believe, 32 bytes.

        Raises:
            PackageError: another owner's package, or it was changed after signing.
        """
        assert len(self._signature) == SIGNATURE_BYTES
        verify_manifest(owner, self._manifest_bytes, self._signature)

    def close(self) -> None:
        """Unmap the file. Sections can't be read afterwards."""
        self._view.release()
        with contextlib.suppress(BufferError):  # an error's traceback may still hold a chunk
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ciphertext(self, section: int, chunk: int) -> memoryview:
        """The sealed bytes of one chunk, tag included, as they lie in the file."""
        start = self._offsets[section] + chunk * (CHUNK_BYTES + TAG_BYTES)
        plain = min(CHUNK_BYTES, self.manifest.sections[section] - chunk * CHUNK_BYTES)
        return self._view[start : start + plain + TAG_BYTES]


class OpenPackage:
    """A package together with its content key: sections can be decrypted. Thread-safe."""

    def __init__(self, package: Package, content_key: bytes) -> None:
        """Take the AES-256 content key (32 bytes); nothing is decrypted yet."""
        self.package = package
        self.manifest = package.manifest
        self._cipher = AESGCM(content_key)

    def decrypt_chunk(
        self, section: int, chunk: int, staging: NDArray[np.uint8], out: memoryview
    ) -> None:
        """Decrypt one chunk.

        Args:
            section: which section.
            chunk: which chunk of it.
            staging: private memory for the ciphertext, at least the chunk's length and
                ``TAG_BYTES``; not used by another thread meanwhile.
            out: as long as the chunk's plaintext.

        Raises:
            PackageError: the chunk was changed, or belongs elsewhere, or the key is another's.
        """
        size = self.manifest.sections[section]
        aad = chunk_associated_data(self.manifest.package_id, section, size, chunk)
        shared = np.frombuffer(self.package.ciphertext(section, chunk), dtype=np.uint8)
        private = staging[: shared.size]
        np.copyto(private, shared)  # releases the GIL, unlike a memoryview's copy
        try:
            self._cipher.decrypt_into(chunk_nonce(section, chunk), private.data, aad, out)
        except InvalidTag:
            out[:] = bytes(len(out))  # what stands there now is not authentic
            raise PackageError(
                f"section {section}, chunk {chunk} does not open: the package was changed "
                "or the key is another package's"
            ) from None

    def read_section(self, section: int) -> bytes:
        """Decrypt a whole section.

        Raises:
            PackageError: as ``decrypt_chunk``.
        """
        size = self.manifest.sections[section]
        plain = bytearray(size)
        view = memoryview(plain)
        staging = np.empty(min(size, CHUNK_BYTES) + TAG_BYTES, dtype=np.uint8)
        for chunk in range(chunk_count(size)):
            start = chunk * CHUNK_BYTES
            self.decrypt_chunk(section, chunk, staging, view[start : start + CHUNK_BYTES])
        return bytes(plain)

    def details(self, variant: Variant) -> Details:
        """The secret description of a variant.

        Raises:
            PackageError: changed, malformed, or at odds with the manifest.
        """
        return parse_details(self.read_section(variant.details), variant)
