"""The owner's signature and the owner's key file."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.errors import PackageError, TrustError
from lasagna.trust.encoding import canonical
from lasagna.trust.keys import ContentKey, SecretKey
from lasagna.trust.model_keys import (
    MAX_MODEL_KEYS_BYTES,
    ModelKeys,
    decode_model_keys,
    encode_model_keys,
)
from lasagna.trust.signing import SIGNATURE_BYTES, sign_manifest, verify_manifest

OWNER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
PUBLIC = OWNER.public_key().public_bytes_raw()
MANIFEST = b'{"model": "resnet50"}'
SIGNATURE = sign_manifest(OWNER, MANIFEST)
KEYS = ModelKeys(b"p" * 32, ContentKey(SecretKey(b"c" * 32)), PUBLIC)


def test_the_owners_signature_verifies() -> None:
    assert len(SIGNATURE) == SIGNATURE_BYTES
    verify_manifest(PUBLIC, MANIFEST, SIGNATURE)
    OWNER.public_key().verify(SIGNATURE, canonical("lasagna/v1/manifest", MANIFEST))


def test_a_changed_manifest_is_refused() -> None:
    with pytest.raises(PackageError, match="not signed by the owner's key"):
        verify_manifest(PUBLIC, MANIFEST + b" ", SIGNATURE)


def test_a_changed_signature_is_refused() -> None:
    for bit in range(0, 512, 7):
        changed = bytearray(SIGNATURE)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PackageError):
            verify_manifest(PUBLIC, MANIFEST, bytes(changed))


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65)])
def test_bytes_that_are_no_signature_are_refused(signature: bytes) -> None:
    with pytest.raises(PackageError):
        verify_manifest(PUBLIC, MANIFEST, signature)


@pytest.mark.parametrize("public_key", [b"", bytes(31), b"\xff" * 32, b"x" * 1000])
def test_another_owner_is_refused(public_key: bytes) -> None:
    with pytest.raises(PackageError):
        verify_manifest(public_key, MANIFEST, SIGNATURE)


def test_a_signature_over_the_bare_manifest_is_refused() -> None:
    """The same key may sign other things: without the label they could pass as manifests."""
    with pytest.raises(PackageError):
        verify_manifest(PUBLIC, MANIFEST, OWNER.sign(MANIFEST))


def test_model_keys_come_back() -> None:
    assert decode_model_keys(encode_model_keys(KEYS)) == KEYS


def test_the_key_file_is_json_with_a_version() -> None:
    document = json.loads(encode_model_keys(KEYS))
    assert document == {
        "version": 1,
        "package_id": base64.b64encode(b"p" * 32).decode(),
        "content_key": base64.b64encode(b"c" * 32).decode(),
        "owner_public_key": base64.b64encode(PUBLIC).decode(),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"2 - at `\$.version`"),
        ({"content_key": "AAAA"}, r"length >= 32 - at `\$.content_key`"),
        ({"content_key": 5}, r"Expected `bytes`, got `int` - at `\$.content_key`"),
        ({"content_key": "not base64"}, r"base64.*`\$.content_key`"),
        ({"contentkey": ""}, "unknown field `contentkey`"),
    ],
)
def test_a_bad_key_file_is_refused_by_naming_what_is_wrong(
    change: dict[str, object], message: str
) -> None:
    document = json.loads(encode_model_keys(KEYS)) | change
    with pytest.raises(TrustError, match="model keys file is malformed: .*" + message):
        decode_model_keys(json.dumps(document).encode())


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TrustError, match="missing required field `package_id`"):
        decode_model_keys(b'{"version": 1}')


def test_a_huge_key_file_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(TrustError, match="at most 4096"):
        decode_model_keys(b" " * (MAX_MODEL_KEYS_BYTES + 1))


def test_no_part_of_a_key_is_in_an_error_or_what_hangs_on_it() -> None:
    """A UnicodeDecodeError holds the whole document: it must not stay in the error's context."""
    broken = encode_model_keys(KEYS).replace(b"version", b"versio\xff")
    with pytest.raises(TrustError) as caught:
        decode_model_keys(broken)
    assert caught.value.__context__ is None
    assert base64.b64encode(b"c" * 32).decode() not in str(caught.value)


@pytest.mark.parametrize("field", ["package_id", "owner_public_key"])
def test_model_keys_have_whole_fields(field: str) -> None:
    fields = {"package_id": bytes(32), "owner_public_key": bytes(32)} | {field: bytes(31)}
    with pytest.raises(TrustError, match="has 32 bytes, not 31"):
        ModelKeys(content_key=KEYS.content_key, **fields)
