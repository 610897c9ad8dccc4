"""What the model's owner keeps: the file that opens a package, and that no server ever sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from lasagna.errors import TrustError
from lasagna.trust.documents import Bytes32, decode_document
from lasagna.trust.keys import ContentKey, SecretKey
from lasagna.units import KIB

MAX_MODEL_KEYS_BYTES: Final = 4 * KIB


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one package.

    Attributes:
        package_id: 32 bytes, the package's name.
        content_key: what its chunks are encrypted under.
        owner_public_key: Ed25519, 32 bytes, what its manifest is verified with.

    Raises:
        TrustError: a field has the wrong length.
    """

    package_id: bytes
    content_key: ContentKey
    owner_public_key: bytes

    def __post_init__(self) -> None:
        for name, value in (
            ("package id", self.package_id),
            ("owner's public key", self.owner_public_key),
        ):
            if len(value) != 32:
                raise TrustError(f"a {name} has 32 bytes, not {len(value)}")


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, with its secret in the clear: it never leaves this module."""

    version: Literal[1]
    package_id: Bytes32
    content_key: Bytes32
    owner_public_key: Bytes32


_DECODER: Final = msgspec.json.Decoder(_Document)


def encode_model_keys(keys: ModelKeys) -> bytes:
    """The keys as JSON, secret in the clear: write it readable for its owner only."""
    secret = keys.content_key.reveal()
    return msgspec.json.encode(_Document(1, keys.package_id, secret, keys.owner_public_key))


def decode_model_keys(raw: bytes) -> ModelKeys:
    """Read the keys.

    Property: any bytes give keys or :class:`TrustError`, whose text has no part of a key.
    """
    document = decode_document(
        raw, _DECODER, name="model keys file", limit=MAX_MODEL_KEYS_BYTES, error=TrustError
    )
    content_key = ContentKey(SecretKey(document.content_key))
    return ModelKeys(document.package_id, content_key, document.owner_public_key)
