"""Attacks on key release by the host, which relays every byte and can run enclaves and brokers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from lasagna.errors import EvidenceError, KeyRefusedError
from lasagna.trust import hpke
from lasagna.trust.evidence import (
    MAX_ATTESTED_BYTES,
    Attested,
    Evidence,
    InsecureEmulatedQuoter,
    KeyRequestClaims,
    ServiceClaims,
    attest,
    decode_attested,
)
from lasagna.trust.grant import grant
from lasagna.trust.keys import ContentKey, SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.release import (
    GRANT_BYTES,
    KeyBundle,
    PendingKeyRequest,
    grant_info,
    grant_message,
    make_key_request,
    open_grant,
)
from lasagna.trust.verifier import UnixSeconds, verify_service

NOW = UnixSeconds(1_751_328_000)
QUOTER = InsecureEmulatedQuoter(measurement=b"m" * 32, signer=b"s" * 32)
POLICY = MeasurementIn(frozenset({QUOTER.measurement}))
BROKER = Ed25519PrivateKey.from_private_bytes(b"b" * 32)
BROKER_PUBLIC = BROKER.public_key().public_bytes_raw()
HOST = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
PACKAGE, OTHER_PACKAGE = b"p" * 32, b"q" * 32


def bundle(package_id: bytes, service: bytes = b"v" * 32) -> KeyBundle:
    model = ModelKeys(package_id, ContentKey(SecretKey(b"c" * 32)), b"o" * 32)
    return KeyBundle(model, ServiceSecret(SecretKey(service)))


BUNDLE = bundle(PACKAGE)


def answer(request: bytes, **changes: Any) -> bytes:
    arguments: dict[str, Any] = {
        "keys": [BUNDLE, bundle(OTHER_PACKAGE)],
        "broker_key": BROKER,
        "policy": POLICY,
        "now": NOW,
        "insecure_allow_emulated": True,
    }
    return grant(request, **(arguments | changes))


@dataclass(frozen=True)
class Recorder:
    """A host that keeps the evidence of a genuine enclave."""

    kept: list[Evidence]

    def quote(self, report_data: bytes) -> Evidence:
        self.kept.append(QUOTER.quote(report_data))
        return self.kept[-1]


def test_a_grant_replayed_to_another_ephemeral_key_does_not_open() -> None:
    old, new = make_key_request(PACKAGE, QUOTER), make_key_request(PACKAGE, QUOTER)
    with pytest.raises(KeyRefusedError, match="does not open"):
        open_grant(new, answer(old.request))


def test_a_grant_for_another_request_of_the_same_key_does_not_open() -> None:
    """The same enclave and key, but other bytes: the host re-encoded the request."""
    pending = make_key_request(PACKAGE, QUOTER)
    with pytest.raises(KeyRefusedError, match="does not open"):
        open_grant(pending, answer(pending.request.replace(b":", b": ", 1)))


def test_a_grant_for_a_swapped_package_is_refused() -> None:
    """The broker is right, and so is the request it signed; what the enclave wants has changed."""
    pending = make_key_request(PACKAGE, QUOTER)
    with pytest.raises(KeyRefusedError, match=f"is for package {'70' * 32}; {'71' * 32} was"):
        open_grant(replace(pending, package_id=OTHER_PACKAGE), answer(pending.request))


def test_a_package_swapped_in_the_request_is_refused() -> None:
    """The host asks for a package that another enclave of the same code wants."""
    document = decode_attested(make_key_request(PACKAGE, QUOTER).request)
    claims = msgspec.json.decode(document.claims, type=KeyRequestClaims)
    swapped = msgspec.structs.replace(claims, package_id=OTHER_PACKAGE)
    request = Attested(1, document.evidence, msgspec.json.encode(swapped))
    with pytest.raises(EvidenceError, match="made for other claims"):
        answer(msgspec.json.encode(request))


def test_a_package_that_the_broker_does_not_have_is_refused() -> None:
    pending = make_key_request(b"z" * 32, QUOTER)
    with pytest.raises(KeyRefusedError, match=f"no keys for package {'7a' * 32}"):
        answer(pending.request)


def test_evidence_of_another_key_is_refused() -> None:
    """The host puts its own key into the request of a genuine enclave."""
    kept: list[Evidence] = []
    make_key_request(PACKAGE, Recorder(kept))
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()
    claims = msgspec.json.encode(KeyRequestClaims(1, own, PACKAGE))
    request = Attested(1, msgspec.json.encode(kept[0]), claims)
    with pytest.raises(EvidenceError, match="made for other claims"):
        answer(msgspec.json.encode(request))


def test_an_enclave_of_the_hosts_own_code_gets_no_keys() -> None:
    pending = make_key_request(PACKAGE, replace(QUOTER, measurement=b"x" * 32))
    with pytest.raises(EvidenceError, match="measurement 7878"):
        answer(pending.request)


def test_a_debug_enclave_gets_no_keys() -> None:
    with pytest.raises(EvidenceError, match="debug enclave"):
        answer(make_key_request(PACKAGE, replace(QUOTER, debug=True)).request)


def test_emulated_evidence_gets_no_keys_unless_the_broker_says_so() -> None:
    with pytest.raises(EvidenceError, match="anyone can write it"):
        answer(make_key_request(PACKAGE, QUOTER).request, insecure_allow_emulated=False)


def test_evidence_of_a_service_is_no_key_request() -> None:
    """Role confusion: every client can fetch a service's evidence, and the host too."""
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(EvidenceError, match="role 'service'"):
        answer(attest(ServiceClaims(1, own, BROKER_PUBLIC), QUOTER))


def test_a_key_request_with_a_low_order_key_is_refused() -> None:
    """A shared secret that everybody knows (RFC 9180, section 7.1.4)."""
    with pytest.raises(KeyRefusedError, match="usable"):
        answer(attest(KeyRequestClaims(1, bytes(32), PACKAGE), QUOTER))


def test_a_grant_with_any_bit_flipped_is_refused() -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    sealed = answer(pending.request)
    for bit in [*range(8), *range(8, GRANT_BYTES * 8, 13), 8 * 33 - 1]:
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyRefusedError):
            open_grant(pending, bytes(changed))
    open_grant(pending, sealed)


def test_a_request_with_any_bit_flipped_is_refused_or_opens_for_nobody() -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    for bit in range(0, len(pending.request) * 8, 29):
        changed = bytearray(pending.request)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((EvidenceError, KeyRefusedError)):
            open_grant(pending, answer(bytes(changed)))


@pytest.mark.parametrize("size", [0, 1, GRANT_BYTES - 1, GRANT_BYTES + 1, 10**7])
def test_a_grant_of_another_size_is_refused_unread(size: int) -> None:
    with pytest.raises(KeyRefusedError, match=f"has {GRANT_BYTES} bytes, not {size}"):
        open_grant(make_key_request(PACKAGE, QUOTER), b"\x01" * size)


def test_a_grant_of_a_later_version_is_named_as_such() -> None:
    with pytest.raises(KeyRefusedError, match="version 2; known is 1"):
        open_grant(make_key_request(PACKAGE, QUOTER), b"\x02" * GRANT_BYTES)


def test_an_oversize_request_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(EvidenceError, match=f"at most {MAX_ATTESTED_BYTES}"):
        answer(b"[" * (MAX_ATTESTED_BYTES + 1))


def host_answers(pending: PendingKeyRequest, named: bytes, signer: Ed25519PrivateKey) -> bytes:
    """A host seals secrets of its own to a genuine enclave, in the name of a broker."""
    signed = b"".join((PACKAGE, b"C" * 32, b"O" * 32, b"S" * 32, named))
    payload = signed + signer.sign(grant_message(pending.request, signed))
    document = decode_attested(pending.request)
    public = msgspec.json.decode(document.claims, type=KeyRequestClaims).public_key
    recipient = X25519PublicKey.from_public_bytes(public)
    return b"\x01" + hpke.SUITE.encrypt(payload, recipient, grant_info(pending.request))


def test_secrets_of_the_hosts_own_in_the_brokers_name_are_refused() -> None:
    """Sealing needs only the enclave's public key, which the host relays."""
    pending = make_key_request(PACKAGE, QUOTER)
    with pytest.raises(KeyRefusedError, match="not signed by the broker it names"):
        open_grant(pending, host_answers(pending, BROKER_PUBLIC, HOST))


def test_secrets_of_a_broker_of_the_hosts_own_show_in_the_enclaves_claims() -> None:
    """The enclave is genuine, its evidence too, but the host knows the service's secret.

    Were the broker not in the claims, a client would seal its input to a key that the host has.
    """
    pending = make_key_request(PACKAGE, QUOTER)
    host_public = HOST.public_key().public_bytes_raw()
    released = open_grant(pending, host_answers(pending, host_public, HOST))
    document = decode_attested(attest(released.service_claims(), QUOTER))
    with pytest.raises(EvidenceError, match="come from broker"):
        verify_service(
            document.evidence,
            document.claims,
            policy=POLICY,
            brokers={BROKER_PUBLIC},
            now=NOW,
            insecure_allow_emulated=True,
        )


def test_a_brokers_signature_for_one_request_is_not_valid_for_another() -> None:
    """An enclave of the host's that was once allowed passes on what it got."""
    old = make_key_request(PACKAGE, QUOTER)
    payload = hpke.SUITE.decrypt(answer(old.request)[1:], old.private_key, grant_info(old.request))
    new = make_key_request(PACKAGE, QUOTER)
    resealed = hpke.SUITE.encrypt(payload, new.private_key.public_key(), grant_info(new.request))
    with pytest.raises(KeyRefusedError, match="not signed"):
        open_grant(new, b"\x01" + resealed)


def test_a_payload_of_another_length_is_refused() -> None:
    """A broker that is wrong can't do more than be refused; the outer size already says so."""
    pending = make_key_request(PACKAGE, QUOTER)
    short = hpke.SUITE.encrypt(b"", pending.private_key.public_key(), grant_info(pending.request))
    with pytest.raises(KeyRefusedError, match="bytes, not 49"):
        open_grant(pending, b"\x01" + short)
