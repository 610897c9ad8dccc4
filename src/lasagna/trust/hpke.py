"""The one HPKE suite in use (RFC 9180, base mode), shared by capsules and grants."""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
"""DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM (RFC 9180, section 7)."""

OVERHEAD: Final = 48
"""An encapsulated X25519 key (32 bytes) in front of the ciphertext, a GCM tag (16) behind it."""
