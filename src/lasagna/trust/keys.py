"""Secrets and the key schedule: which key exists, who can derive it, from what.

::

    service secret ──┬─ service private key (X25519) ── public key ── service id
                     └─ activation key (request id, SHA-256 of capsule)
    request secret ──┬─ input key  (SHA-256 of capsule)
                     └─ output key (SHA-256 of capsule)

The service secret is in every enclave of a service (released after attestation), so any of them can
open any capsule and go on with any request. The request secret is the client's, fresh for each
request. Every arrow is HKDF-SHA256 (RFC 5869) with its own label.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NewType, NoReturn, final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lasagna.errors import RecordError, UsageError
from lasagna.trust.encoding import canonical

KEY_BYTES: Final = 32
"""Every secret, symmetric key and public key here has 32 bytes."""
SERVICE_ID_BYTES: Final = 16
REQUEST_ID_BYTES: Final = 16
DIGEST_BYTES: Final = 32


@final
class SecretKey:
    """32 secret bytes that don't show, don't pickle and compare in constant time.

    Not a dataclass: ``dataclasses.asdict`` and msgspec would walk its fields. Python can't erase
    memory reliably, so this guards against leaks by accident, not against a reader of the process.
    """

    __slots__ = ("_raw",)
    _raw: bytes

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise UsageError(f"a secret key has {KEY_BYTES} bytes, not {len(raw)}")
        object.__setattr__(self, "_raw", bytes(raw))

    def reveal(self) -> bytes:
        """The bytes. Every call is a place to look at in a review."""
        return self._raw

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> NoReturn:
        raise TypeError("a SecretKey is not hashed: a hash table compares in variable time")

    def __repr__(self) -> str:
        return f"SecretKey(<{KEY_BYTES} bytes hidden>)"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a SecretKey does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a SecretKey does not change")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretKey is not copied or pickled")


ServiceSecret = NewType("ServiceSecret", SecretKey)
"""What every enclave of a service holds, and its key broker."""
ContentKey = NewType("ContentKey", SecretKey)
"""What the chunks of a model's package are encrypted under."""
RequestSecret = NewType("RequestSecret", SecretKey)
"""What a client draws for one request: uniformly random, used once."""


class Direction(StrEnum):
    """What a record is, and so which key it is sealed under."""

    INPUT = "input"
    ACTIVATION = "activation"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, eq=False)
class RecordKey:
    """An AES-256-GCM key for records of one direction of one request.

    The direction stands in the key, so that no mistake seals an activation for the client to read.
    """

    direction: Direction
    aead: AESGCM = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class RequestKeys:
    """What a client holds for one request: it seals the inputs and opens the outputs."""

    input: RecordKey
    output: RecordKey


@dataclass(frozen=True, slots=True, eq=False)
class ServiceKeys:
    """A service's secret and what follows from it; computed once per enclave (about 40 us).

    Attributes:
        secret: the service's secret.
        private_key: opens the capsules of its clients.
        public_key: 32 bytes, what evidence binds and clients seal to.
        service_id: 16 bytes, see :func:`service_id`.
    """

    secret: ServiceSecret
    private_key: X25519PrivateKey = field(repr=False)
    public_key: bytes
    service_id: bytes


def _derive(secret: SecretKey, label: str, *fields: bytes) -> bytes:
    """HKDF-SHA256 without salt (RFC 5869, section 3.1); the canonical encoding is the `info`."""
    hkdf = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=canonical(label, *fields))
    return hkdf.derive(secret.reveal())


def _record_key(direction: Direction, raw: bytes) -> RecordKey:
    return RecordKey(direction, AESGCM(raw))


def service_id(public_key: bytes) -> bytes:
    """A service's id: the first 16 bytes of SHA-256 over its labelled public key.

    A name for logs and associated data. 128 bits withstand a second preimage (NIST SP 800-107,
    section 5.1), and HPKE binds the whole public key anyway (RFC 9180, section 4.1, `kem_context`).
    """
    named = canonical("lasagna/v1/service-id", public_key)
    return hashlib.sha256(named).digest()[:SERVICE_ID_BYTES]


def service_keys(secret: ServiceSecret) -> ServiceKeys:
    """The keys that every enclave of a service derives from the service's secret.

    Any 32 bytes are an X25519 private key (RFC 7748, section 5).
    """
    raw = _derive(secret, "lasagna/v1/service-private-key")
    private_key = X25519PrivateKey.from_private_bytes(raw)
    public_key = private_key.public_key().public_bytes_raw()
    return ServiceKeys(secret, private_key, public_key, service_id(public_key))


def capsule_digest(capsule: bytes) -> bytes:
    """SHA-256 of a client's capsule: what the keys of its request are bound to."""
    return hashlib.sha256(capsule).digest()


def activation_key(secret: ServiceSecret, request_id: bytes, digest: bytes) -> RecordKey:
    """The key of a request's activations between enclaves.

    It depends on the capsule, not only on the request id, which is anyone's to choose. Otherwise a
    client in league with the host could send a request under another client's id, let the host feed
    the other's sealed activations into it, and read the result under its own output key.

    An enclave between two others takes ``digest`` from the host: a wrong one makes a key that opens
    nothing. An enclave that reads inputs or writes outputs takes all its keys from
    :func:`lasagna.trust.request.open_capsule`, which computes the digest itself.

    Raises:
        RecordError: the id or the digest has the wrong length.
    """
    _require_length("request id", request_id, REQUEST_ID_BYTES)
    _require_length("capsule digest", digest, DIGEST_BYTES)
    raw = _derive(secret, "lasagna/v1/activation-key", request_id, digest)
    return _record_key(Direction.ACTIVATION, raw)


def request_keys(secret: RequestSecret, digest: bytes) -> RequestKeys:
    """The keys of a request's inputs and outputs.

    They depend on the capsule too, which is fresh at every sealing (HPKE draws an ephemeral key).
    So a client whose random generator repeats itself still has fresh record keys.

    Raises:
        RecordError: the digest has the wrong length.
    """
    _require_length("capsule digest", digest, DIGEST_BYTES)
    return RequestKeys(
        _record_key(Direction.INPUT, _derive(secret, "lasagna/v1/input-key", digest)),
        _record_key(Direction.OUTPUT, _derive(secret, "lasagna/v1/output-key", digest)),
    )


def _require_length(name: str, value: bytes, length: int) -> None:
    if len(value) != length:
        raise RecordError(f"a {name} has {length} bytes, not {len(value)}")
