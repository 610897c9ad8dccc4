"""The model owner's signature on a package's manifest."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lasagna.errors import PackageError
from lasagna.trust.encoding import canonical

SIGNATURE_BYTES: Final = 64


def sign_manifest(private_key: Ed25519PrivateKey, manifest: bytes) -> bytes:
    """Sign a manifest: Ed25519 (RFC 8032) over a label and its bytes.

    The label keeps a signature from being valid for anything else that the key may sign.

    Returns:
        64 bytes.
    """
    return private_key.sign(canonical("lasagna/v1/manifest", manifest))


def verify_manifest(public_key: bytes, manifest: bytes, signature: bytes) -> None:
    """Return if the owner signed this manifest.

    Whose key to believe is known only once the broker has released it, for which the manifest has
    to be read: what was parsed before is the host's word, and nothing is loaded on it.

    Property: any bytes return or raise :class:`PackageError`.

    Args:
        public_key: the owner's Ed25519 key, 32 bytes, out of the keys that a broker released or
            the owner's own file: never out of the package.
        manifest: its bytes as stored.
        signature: 64 bytes.

    Raises:
        PackageError: they didn't.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(signature, canonical("lasagna/v1/manifest", manifest))
    except (InvalidSignature, ValueError):
        raise PackageError(
            f"the manifest is not signed by the owner's key {public_key.hex()[:64]}"
        ) from None
