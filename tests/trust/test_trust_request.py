"""Capsules: a round trip, the errors, and RFC 9180 written out a second time."""

from __future__ import annotations

import hmac
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lasagna.errors import EvidenceError, RecordError, UsageError
from lasagna.trust.encoding import canonical
from lasagna.trust.keys import (
    RecordKey,
    RequestSecret,
    SecretKey,
    ServiceSecret,
    activation_key,
    capsule_digest,
    service_id,
    service_keys,
)
from lasagna.trust.request import CAPSULE_BYTES, RequestScope, open_capsule, seal_capsule

SERVICE = service_keys(ServiceSecret(SecretKey(b"s" * 32)))
SCOPE = RequestScope(service_id=SERVICE.service_id, model_digest=b"m" * 32, request_id=b"r" * 16)
SECRET = RequestSecret(SecretKey(b"q" * 32))


def fingerprint(key: RecordKey) -> bytes:
    return key.aead.encrypt(bytes(12), b"", b"")


def test_client_and_enclave_have_the_same_keys() -> None:
    sealed = seal_capsule(SERVICE.public_key, SCOPE, SECRET)
    opened = open_capsule(SERVICE, SCOPE, sealed.capsule)
    assert len(sealed.capsule) == CAPSULE_BYTES
    assert fingerprint(opened.input) == fingerprint(sealed.keys.input)
    assert fingerprint(opened.output) == fingerprint(sealed.keys.output)
    middle = activation_key(SERVICE.secret, SCOPE.request_id, capsule_digest(sealed.capsule))
    assert fingerprint(opened.activation) == fingerprint(middle)


def test_a_client_whose_generator_repeats_still_has_fresh_keys() -> None:
    one = seal_capsule(SERVICE.public_key, SCOPE, SECRET)
    other = seal_capsule(SERVICE.public_key, SCOPE, SECRET)
    assert one.capsule != other.capsule
    assert fingerprint(one.keys.input) != fingerprint(other.keys.input)
    assert fingerprint(one.keys.output) != fingerprint(other.keys.output)


@pytest.mark.parametrize("field", ["model_digest", "request_id"])
def test_a_capsule_opens_only_for_its_model_and_request(field: str) -> None:
    capsule = seal_capsule(SERVICE.public_key, SCOPE, SECRET).capsule
    other = replace(SCOPE, **{field: b"x" * len(getattr(SCOPE, field))})
    with pytest.raises(RecordError, match="does not open"):
        open_capsule(SERVICE, other, capsule)


def test_a_capsule_opens_only_at_its_service() -> None:
    capsule = seal_capsule(SERVICE.public_key, SCOPE, SECRET).capsule
    stranger = service_keys(ServiceSecret(SecretKey(b"t" * 32)))
    with pytest.raises(RecordError, match="is for service"):
        open_capsule(stranger, SCOPE, capsule)
    with pytest.raises(RecordError, match="does not open"):
        open_capsule(stranger, replace(SCOPE, service_id=stranger.service_id), capsule)


@pytest.mark.parametrize("place", [0, 1, 32, 33, 64, 65, CAPSULE_BYTES - 1])
def test_a_changed_capsule_does_not_open(place: int) -> None:
    capsule = bytearray(seal_capsule(SERVICE.public_key, SCOPE, SECRET).capsule)
    capsule[place] ^= 0x80  # at 32 the bit that X25519 itself ignores (RFC 7748, section 5)
    with pytest.raises(RecordError):
        open_capsule(SERVICE, SCOPE, bytes(capsule))


def test_a_capsule_with_a_low_order_key_does_not_open() -> None:
    with pytest.raises(RecordError, match="does not open"):
        open_capsule(SERVICE, SCOPE, b"\x01" + bytes(CAPSULE_BYTES - 1))


@pytest.mark.parametrize("size", [0, 1, CAPSULE_BYTES - 1, CAPSULE_BYTES + 1, 10**6])
def test_a_capsule_has_one_size(size: int) -> None:
    with pytest.raises(RecordError, match=f"has {CAPSULE_BYTES} bytes, not {size}"):
        open_capsule(SERVICE, SCOPE, b"\x01" * size)


def test_a_capsule_of_a_later_version_is_named_as_such() -> None:
    with pytest.raises(RecordError, match="version 2; known is 1"):
        open_capsule(SERVICE, SCOPE, b"\x02" + bytes(CAPSULE_BYTES - 1))


def test_sealing_to_a_key_that_is_not_the_services_is_refused() -> None:
    stranger = service_keys(ServiceSecret(SecretKey(b"t" * 32)))
    with pytest.raises(UsageError, match="service id"):
        seal_capsule(stranger.public_key, SCOPE, SECRET)


@pytest.mark.parametrize("public_key", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_sealing_to_an_unusable_key_is_refused(public_key: bytes) -> None:
    scope = replace(SCOPE, service_id=service_id(public_key))
    with pytest.raises(EvidenceError, match="usable"):
        seal_capsule(public_key, scope, SECRET)


@pytest.mark.parametrize(
    ("field", "size"),
    [("service_id", 15), ("service_id", 17), ("model_digest", 31), ("request_id", 0)],
)
def test_a_scope_has_whole_names(field: str, size: int) -> None:
    with pytest.raises(RecordError, match=field.replace("_", " ")):
        replace(SCOPE, **{field: bytes(size)})


def labeled_extract(suite: bytes, salt: bytes, label: bytes, key: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + key, "sha256")


def labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, size: int) -> bytes:
    text = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, text + b"\x01", "sha256")[:size]


def test_a_capsule_is_rfc_9180_opened_by_a_second_implementation() -> None:
    """Sections 4.1 (DHKEM), 5.1 (key schedule, base mode) and 5.2, from the RFC's text."""
    capsule = seal_capsule(SERVICE.public_key, SCOPE, SECRET).capsule
    encapsulated, ciphertext = capsule[1:33], capsule[33:]
    exchanged = SERVICE.private_key.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    kem = b"KEM\x00\x20"
    eae = labeled_extract(kem, b"", b"eae_prk", exchanged)
    context = encapsulated + SERVICE.public_key
    shared = labeled_expand(kem, eae, b"shared_secret", context, 32)

    suite = b"HPKE\x00\x20\x00\x01\x00\x02"  # X25519, HKDF-SHA256, AES-256-GCM
    info = canonical("lasagna/v1/capsule", SCOPE.service_id, SCOPE.model_digest, SCOPE.request_id)
    psk_hash = labeled_extract(suite, b"", b"psk_id_hash", b"")
    info_hash = labeled_extract(suite, b"", b"info_hash", info)
    schedule = b"\x00" + psk_hash + info_hash
    secret = labeled_extract(suite, shared, b"secret", b"")
    key = labeled_expand(suite, secret, b"key", schedule, 32)
    nonce = labeled_expand(suite, secret, b"base_nonce", schedule, 12)
    assert AESGCM(key).decrypt(nonce, ciphertext, b"") == SECRET.reveal()
