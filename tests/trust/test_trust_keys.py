"""Secrets that don't leak by accident, and the key schedule against the standard library's HMAC."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import hmac
import json
import pickle

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lasagna.errors import RecordError, UsageError
from lasagna.trust.encoding import canonical
from lasagna.trust.keys import (
    ContentKey,
    Direction,
    RecordKey,
    RequestSecret,
    SecretKey,
    ServiceSecret,
    activation_key,
    capsule_digest,
    request_keys,
    service_id,
    service_keys,
)
from lasagna.trust.model_keys import ModelKeys

RAW = bytes(range(32))
NONCE = bytes(12)


def hkdf(secret: bytes, label: str, *fields: bytes) -> bytes:
    """RFC 5869 for one block, by the standard library."""
    pseudorandom = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(pseudorandom, canonical(label, *fields) + b"\x01", "sha256")


def same_key(key: RecordKey, raw: bytes) -> bool:
    return key.aead.encrypt(NONCE, b"row", b"") == AESGCM(raw).encrypt(NONCE, b"row", b"")


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda key: f"{[key]}"])
def test_a_secret_does_not_show(show: object) -> None:
    assert callable(show)
    shown = show(SecretKey(RAW))
    assert "hidden" in shown
    assert "\\x" not in shown
    assert RAW.hex() not in shown


@pytest.mark.parametrize(
    "carry",
    [
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        json.dumps,
        msgspec.json.encode,
        msgspec.msgpack.encode,
        vars,
        hash,
    ],
)
def test_a_secret_is_not_carried_away(carry: object) -> None:
    assert callable(carry)
    with pytest.raises(TypeError):
        carry(SecretKey(RAW))


def test_a_secret_inside_a_dataclass_is_not_carried_away_either() -> None:
    keys = ModelKeys(bytes(32), ContentKey(SecretKey(RAW)), bytes(32))
    assert "hidden" in repr(keys)
    with pytest.raises(TypeError):
        dataclasses.asdict(keys)
    with pytest.raises(TypeError):
        msgspec.json.encode(keys)
    with pytest.raises(TypeError):
        pickle.dumps(keys)


def test_derived_keys_do_not_show_or_pickle() -> None:
    service = service_keys(ServiceSecret(SecretKey(RAW)))
    requests = request_keys(RequestSecret(SecretKey(RAW)), bytes(32))
    for keys in (service, requests, requests.input):
        with pytest.raises(TypeError):
            pickle.dumps(keys)
    assert "aead" not in repr(requests)
    assert "private" not in repr(service)


def test_a_secret_does_not_change() -> None:
    key = SecretKey(RAW)
    with pytest.raises(AttributeError):
        key._raw = bytes(32)
    with pytest.raises(AttributeError):
        del key._raw
    assert key.reveal() == RAW


def test_a_secret_does_not_follow_the_buffer_it_was_made_from() -> None:
    raw = bytearray(RAW)
    key = SecretKey(raw)  # type: ignore[arg-type]  # what a careless caller may do
    raw[:] = bytes(32)
    assert key.reveal() == RAW


def test_secrets_compare_by_value_and_only_with_secrets() -> None:
    assert SecretKey(RAW) == SecretKey(RAW)
    assert SecretKey(RAW) != SecretKey(bytes(32))
    assert SecretKey(RAW) != RAW


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_secret_has_32_bytes(size: int) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        SecretKey(bytes(size))


def test_the_key_schedule_is_hkdf_with_the_documented_labels() -> None:
    secret, request_id, digest = SecretKey(RAW), b"r" * 16, b"d" * 32
    service = service_keys(ServiceSecret(secret))
    private = X25519PrivateKey.from_private_bytes(hkdf(RAW, "lasagna/v1/service-private-key"))
    assert service.public_key == private.public_key().public_bytes_raw()
    activation = activation_key(ServiceSecret(secret), request_id, digest)
    assert same_key(activation, hkdf(RAW, "lasagna/v1/activation-key", request_id, digest))
    keys = request_keys(RequestSecret(secret), digest)
    assert same_key(keys.input, hkdf(RAW, "lasagna/v1/input-key", digest))
    assert same_key(keys.output, hkdf(RAW, "lasagna/v1/output-key", digest))


def test_the_schedule_does_not_change_unnoticed() -> None:
    """Known answers: a change here makes every client and package of version 1 useless."""
    service = service_keys(ServiceSecret(SecretKey(RAW)))
    assert service.public_key.hex() == (
        "c3f71256f63b0a47e77b41b0b0e6fa187844587000a424a76c34b1e6f6943c23"
    )
    assert service.service_id.hex() == "bc025f1f136d01a278063cf73e87304f"
    activation = activation_key(service.secret, b"r" * 16, b"d" * 32)
    assert activation.aead.encrypt(NONCE, b"", b"").hex() == "bc4b9467cd7c26df5c8d8ce818ff153a"


def test_the_service_id_names_the_public_key() -> None:
    public = service_keys(ServiceSecret(SecretKey(RAW))).public_key
    named = hashlib.sha256(canonical("lasagna/v1/service-id", public)).digest()
    assert service_id(public) == named[:16]


def test_every_key_of_a_request_is_another_one() -> None:
    secret = SecretKey(RAW)
    keys = request_keys(RequestSecret(secret), bytes(32))
    activation = activation_key(ServiceSecret(secret), bytes(16), bytes(32))
    tags = {key.aead.encrypt(NONCE, b"", b"") for key in (keys.input, keys.output, activation)}
    assert len(tags) == 3
    assert [keys.input.direction, activation.direction, keys.output.direction] == list(Direction)


@pytest.mark.parametrize(("id_size", "digest_size"), [(15, 32), (17, 32), (16, 31), (16, 33)])
def test_an_activation_key_needs_a_whole_id_and_digest(id_size: int, digest_size: int) -> None:
    with pytest.raises(RecordError, match="bytes, not"):
        activation_key(ServiceSecret(SecretKey(RAW)), bytes(id_size), bytes(digest_size))


def test_a_capsule_digest_is_sha256() -> None:
    assert capsule_digest(b"capsule") == hashlib.sha256(b"capsule").digest()
