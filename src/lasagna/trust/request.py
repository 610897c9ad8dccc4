"""Client to service: the capsule, which carries a request's secret to the service's enclaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from lasagna.errors import EvidenceError, RecordError, UsageError
from lasagna.trust import hpke
from lasagna.trust.encoding import canonical
from lasagna.trust.keys import (
    DIGEST_BYTES,
    KEY_BYTES,
    REQUEST_ID_BYTES,
    SERVICE_ID_BYTES,
    RecordKey,
    RequestKeys,
    RequestSecret,
    SecretKey,
    ServiceKeys,
    activation_key,
    capsule_digest,
    request_keys,
    service_id,
)

CAPSULE_VERSION: Final = 1
CAPSULE_BYTES: Final = 1 + KEY_BYTES + hpke.OVERHEAD
"""Version byte, encapsulated key, sealed request secret, tag: 81 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestScope:
    """What every sealed byte of one request is bound to.

    Attributes:
        service_id: 16 bytes, :func:`lasagna.trust.keys.service_id`.
        model_digest: 32 bytes, SHA-256 of the package's signed manifest. It must cover the cuts,
            for a boundary's number has no meaning without them.
        request_id: 16 bytes that the client draws; a name, not a secret.

    Raises:
        RecordError: a field has the wrong length.
    """

    service_id: bytes
    model_digest: bytes
    request_id: bytes

    def __post_init__(self) -> None:
        for name, value, length in (
            ("service id", self.service_id, SERVICE_ID_BYTES),
            ("model digest", self.model_digest, DIGEST_BYTES),
            ("request id", self.request_id, REQUEST_ID_BYTES),
        ):
            if len(value) != length:
                raise RecordError(f"a {name} has {length} bytes, not {len(value)}")


@dataclass(frozen=True, slots=True, eq=False)
class SealedRequest:
    """What a client has after sealing: the capsule to send, and the keys to keep."""

    capsule: bytes
    keys: RequestKeys


@dataclass(frozen=True, slots=True, eq=False)
class EnclaveRequestKeys:
    """All keys of one request, for an enclave that reads its inputs or writes its outputs."""

    input: RecordKey
    activation: RecordKey
    output: RecordKey


def seal_capsule(public_key: bytes, scope: RequestScope, secret: RequestSecret) -> SealedRequest:
    """Seal a request's secret to a service (RFC 9180, section 6.1).

    Args:
        public_key: the service's, 32 bytes, from :func:`lasagna.trust.verifier.verify_service`.
        scope: its ``service_id`` must be that public key's.
        secret: 32 bytes fresh from the client's random generator.

    Raises:
        UsageError: the public key isn't that of the service named.
        EvidenceError: it is no usable key, so no honest enclave has claimed it.
    """
    if service_id(public_key) != scope.service_id:
        raise UsageError("the public key is not the one that the service id is made from")
    try:
        recipient = X25519PublicKey.from_public_bytes(public_key)
        sealed = hpke.SUITE.encrypt(secret.reveal(), recipient, _info(scope))
    except ValueError:  # wrong length; or all-zero shared secret (RFC 9180, section 7.1.4)
        raise EvidenceError("the service's public key is not a usable X25519 key") from None
    capsule = bytes([CAPSULE_VERSION]) + sealed
    return SealedRequest(capsule, request_keys(secret, capsule_digest(capsule)))


def open_capsule(service: ServiceKeys, scope: RequestScope, capsule: bytes) -> EnclaveRequestKeys:
    """Open a client's capsule inside an enclave; about 60 us (RFC 9180, section 6.1).

    The host says which request the capsule belongs to; the capsule opens only if that is true.
    Property: any bytes give keys or :class:`RecordError`.

    1. It has the size and version of a capsule.
    2. The request is for this service.
    3. It opens under the service's key, with service, model and request id as `info`.
    4. The keys are bound to this very capsule.

    Raises:
        RecordError: one of the steps failed.
    """
    # 1. Size and version.
    if len(capsule) != CAPSULE_BYTES:
        raise RecordError(f"a capsule has {CAPSULE_BYTES} bytes, not {len(capsule)}")
    if capsule[0] != CAPSULE_VERSION:
        raise RecordError(f"the capsule has version {capsule[0]}; known is {CAPSULE_VERSION}")
    # 2. This service.
    if scope.service_id != service.service_id:
        raise RecordError(
            f"the request is for service {scope.service_id.hex()}, "
            f"this is {service.service_id.hex()}"
        )
    # 3. Service, model and request are those the client sealed for.
    try:
        raw = hpke.SUITE.decrypt(capsule[1:], service.private_key, _info(scope))
    except (InvalidTag, ValueError):
        raise RecordError(
            f"the capsule of request {scope.request_id.hex()} does not open: it was changed, or "
            "sealed for another service, model or request"
        ) from None
    # 4. Keys of this very capsule.
    secret, digest = RequestSecret(SecretKey(raw)), capsule_digest(capsule)
    keys = request_keys(secret, digest)
    activation = activation_key(service.secret, scope.request_id, digest)
    return EnclaveRequestKeys(keys.input, activation, keys.output)


def _info(scope: RequestScope) -> bytes:
    """HPKE's application-supplied information (RFC 9180, section 8.1)."""
    return canonical("lasagna/v1/capsule", scope.service_id, scope.model_digest, scope.request_id)
