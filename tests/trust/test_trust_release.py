"""Key release between an enclave and its broker, when everybody is honest."""

from __future__ import annotations

import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.errors import EvidenceError, KeyRefusedError
from lasagna.trust.evidence import InsecureEmulatedQuoter, attest, decode_attested
from lasagna.trust.grant import grant
from lasagna.trust.keys import ContentKey, SecretKey, ServiceSecret, service_keys
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.release import GRANT_BYTES, KeyBundle, make_key_request, open_grant
from lasagna.trust.verifier import UnixSeconds, verify_service

NOW = UnixSeconds(1_751_328_000)
QUOTER = InsecureEmulatedQuoter(measurement=b"m" * 32, signer=b"s" * 32)
POLICY = MeasurementIn(frozenset({QUOTER.measurement}))
BROKER = Ed25519PrivateKey.from_private_bytes(b"b" * 32)
BROKER_PUBLIC = BROKER.public_key().public_bytes_raw()
PACKAGE = b"p" * 32
BUNDLE = KeyBundle(
    ModelKeys(PACKAGE, ContentKey(SecretKey(b"c" * 32)), b"o" * 32),
    ServiceSecret(SecretKey(b"v" * 32)),
)
NONCE = b"n" * 32


def answer(request: bytes, nonce: bytes | None = None) -> bytes:
    return grant(
        request,
        keys=[BUNDLE],
        broker_key=BROKER,
        policy=POLICY,
        now=NOW,
        nonce=nonce,
        insecure_allow_emulated=True,
    )


def test_an_allowed_enclave_gets_the_keys_it_asks_for() -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    sealed = answer(pending.request)
    released = open_grant(pending, sealed)
    assert len(sealed) == GRANT_BYTES
    assert released.bundle == BUNDLE
    assert released.broker == BROKER_PUBLIC


def test_a_broker_may_demand_a_request_made_for_it_now() -> None:
    fresh = make_key_request(PACKAGE, QUOTER, nonce=NONCE)
    assert open_grant(fresh, answer(fresh.request, NONCE)).bundle == BUNDLE
    with pytest.raises(EvidenceError, match="may be old"):
        answer(make_key_request(PACKAGE, QUOTER).request, NONCE)


def test_the_enclave_then_claims_the_service_and_its_broker() -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    released = open_grant(pending, answer(pending.request))
    document = decode_attested(attest(released.service_claims(NONCE), QUOTER))
    claims = verify_service(
        document.evidence,
        document.claims,
        policy=POLICY,
        brokers={BROKER_PUBLIC},
        now=NOW,
        nonce=NONCE,
        insecure_allow_emulated=True,
    )
    assert claims.public_key == service_keys(BUNDLE.service_secret).public_key


def test_every_request_has_a_key_pair_of_its_own() -> None:
    one, other = make_key_request(PACKAGE, QUOTER), make_key_request(PACKAGE, QUOTER)
    assert one.request != other.request


def test_what_is_secret_neither_shows_nor_pickles() -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    released = open_grant(pending, answer(pending.request))
    assert "private" not in repr(pending)
    assert "hidden" in repr(released)
    for secret in (pending, released):
        with pytest.raises(TypeError):
            pickle.dumps(secret)


def test_a_package_id_is_whole() -> None:
    with pytest.raises(KeyRefusedError, match="32 bytes, not 31"):
        make_key_request(PACKAGE[1:], QUOTER)
