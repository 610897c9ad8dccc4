"""Key release, the enclave's side: ask for a package's keys, open the broker's answer.

::

    enclave                           host (relays)                    key broker
      ephemeral X25519 key ── claims + evidence (key request) ──►  verifies, by policy
      opens, checks        ◄── grant, sealed to the ephemeral key ──  signs, seals

    grant  = version (1 byte) | HPKE (info = SHA-256 of the key request) of payload
    payload = package id | content key | owner's public key | service secret | broker's public key
              (32 bytes each) | Ed25519 signature by the broker (64)

The broker signs, for sealing alone says nothing about who sealed: a host could answer a genuine
enclave with secrets of its own. An enclave can't tell a good broker from a bad one, so it names
the one it has in its ``ServiceClaims``, and clients choose. The signature covers the key request's
hash, and is inside the sealed part, so that nobody can put their own in its place.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lasagna.errors import KeyRefusedError
from lasagna.trust import hpke
from lasagna.trust.encoding import canonical
from lasagna.trust.evidence import KeyRequestClaims, Quoter, ServiceClaims, attest
from lasagna.trust.keys import KEY_BYTES, ContentKey, SecretKey, ServiceSecret, service_keys
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.signing import SIGNATURE_BYTES

GRANT_VERSION: Final = 1
PAYLOAD_BYTES: Final = 5 * KEY_BYTES + SIGNATURE_BYTES
GRANT_BYTES: Final = 1 + PAYLOAD_BYTES + hpke.OVERHEAD
"""Every grant has 273 bytes."""


@dataclass(frozen=True, slots=True)
class KeyBundle:
    """What a broker releases for one package to an allowed enclave.

    Attributes:
        model: the package's keys.
        service_secret: of the service that offers it.
    """

    model: ModelKeys
    service_secret: ServiceSecret


@dataclass(frozen=True, slots=True, eq=False)
class PendingKeyRequest:
    """A key request on its way, with the private key that opens the answer.

    Attributes:
        request: bytes for the broker.
        package_id: what was asked for.
        private_key: never leaves the enclave; forget it after :func:`open_grant`.
    """

    request: bytes
    package_id: bytes
    private_key: X25519PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Released:
    """Keys that arrived in an enclave, and who gave them.

    Attributes:
        bundle: the keys.
        broker: Ed25519, 32 bytes, whose signature was verified.
    """

    bundle: KeyBundle
    broker: bytes

    def service_claims(self, nonce: bytes | None = None) -> ServiceClaims:
        """What this enclave can truthfully claim; the only way that claims should be made."""
        public_key = service_keys(self.bundle.service_secret).public_key
        return ServiceClaims(1, public_key, self.broker, nonce)


def make_key_request(
    package_id: bytes, quoter: Quoter, *, nonce: bytes | None = None
) -> PendingKeyRequest:
    """Ask for a package's keys, inside an enclave. A new key pair is made at every call.

    Args:
        package_id: 32 bytes.
        quoter: the processor, or its emulation.
        nonce: the broker's, 16 to 64 bytes, if it asks for one.

    Raises:
        KeyRefusedError: the package id has the wrong length.
    """
    if len(package_id) != KEY_BYTES:
        raise KeyRefusedError(f"a package id has {KEY_BYTES} bytes, not {len(package_id)}")
    private_key = X25519PrivateKey.generate()
    public_key = private_key.public_key().public_bytes_raw()
    request = attest(KeyRequestClaims(1, public_key, package_id, nonce), quoter)
    return PendingKeyRequest(request, package_id, private_key)


def open_grant(pending: PendingKeyRequest, grant: bytes) -> Released:
    """Open a broker's answer inside the enclave that asked.

    Property: any bytes give keys or :class:`KeyRefusedError`.

    1. It has the size and version of a grant.
    2. It opens under this request's private key, with this request's hash.
    3. The broker named in it signed it for this request.
    4. It is for the package asked for.

    Raises:
        KeyRefusedError: one of the steps failed.
    """
    # 1. Size and version.
    if len(grant) != GRANT_BYTES:
        raise KeyRefusedError(f"a grant has {GRANT_BYTES} bytes, not {len(grant)}")
    if grant[0] != GRANT_VERSION:
        raise KeyRefusedError(f"the grant has version {grant[0]}; known is {GRANT_VERSION}")
    # 2. For this request.
    try:
        payload = hpke.SUITE.decrypt(grant[1:], pending.private_key, grant_info(pending.request))
    except (InvalidTag, ValueError):
        raise KeyRefusedError(
            "the grant does not open: it was changed, or answers another key request"
        ) from None
    assert len(payload) == PAYLOAD_BYTES  # follows from the grant's size
    signed, signature = payload[:-SIGNATURE_BYTES], payload[-SIGNATURE_BYTES:]
    package_id, content, owner, service, broker = (
        signed[start : start + KEY_BYTES] for start in range(0, len(signed), KEY_BYTES)
    )
    # 3. By the broker it names.
    try:
        Ed25519PublicKey.from_public_bytes(broker).verify(
            signature, grant_message(pending.request, signed)
        )
    except (InvalidSignature, ValueError):
        raise KeyRefusedError("the grant is not signed by the broker it names") from None
    # 4. The package asked for.
    if not hmac.compare_digest(package_id, pending.package_id):
        raise KeyRefusedError(
            f"the grant is for package {package_id.hex()}; {pending.package_id.hex()} was asked for"
        )
    model = ModelKeys(package_id, ContentKey(SecretKey(content)), owner)
    return Released(KeyBundle(model, ServiceSecret(SecretKey(service))), broker)


def grant_info(request: bytes) -> bytes:
    """HPKE's `info` (RFC 9180, section 8.1): a grant opens for one key request only."""
    return canonical("lasagna/v1/grant", hashlib.sha256(request).digest())


def grant_message(request: bytes, signed: bytes) -> bytes:
    """What the broker signs: the request that it answers, and what it releases."""
    return canonical("lasagna/v1/grant-signature", hashlib.sha256(request).digest(), signed)
