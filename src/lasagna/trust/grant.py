"""Key release, the broker's side: verify an enclave's request, answer with sealed keys."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from lasagna.errors import KeyRefusedError
from lasagna.trust import hpke
from lasagna.trust.evidence import decode_attested
from lasagna.trust.policy import Policy
from lasagna.trust.release import GRANT_VERSION, KeyBundle, grant_info, grant_message
from lasagna.trust.verifier import UnixSeconds, verify_key_request


def grant(
    request: bytes,
    *,
    keys: Iterable[KeyBundle],
    broker_key: Ed25519PrivateKey,
    policy: Policy,
    now: UnixSeconds,
    nonce: bytes | None = None,
    insecure_allow_emulated: bool = False,
) -> bytes:
    """Release a package's keys to the enclave that asks for them.

    1. The request is small and well-formed.
    2. Its evidence verifies: an allowed enclave holds the private key of the public key in it, and
       wants this package (the steps of :mod:`lasagna.trust.verifier`).
    3. The broker has this package's keys.
    4. They are signed for this request, and sealed to the enclave's key with this request's hash.

    Property: any request gives a grant, :class:`EvidenceError` or :class:`KeyRefusedError`.

    A replayed request is answered again, with a grant that only the enclave that made it can open.
    A broker that wants to know the enclave to be running now demands a nonce.

    Args:
        request: from :func:`lasagna.trust.release.make_key_request`, relayed by anyone.
        keys: every package's that the policy holds for.
        broker_key: signs the grant; clients trust its public key.
        policy: which enclaves may have the keys.
        now: for the dates in quotes and their collateral.
        nonce: demands a request made for it.
        insecure_allow_emulated: release to anybody. It protects nothing.

    Returns:
        The grant, ``GRANT_BYTES`` long.

    Raises:
        EvidenceError: steps 1 and 2.
        KeyRefusedError: steps 3 and 4.
    """
    # 1. The request.
    attested = decode_attested(request)
    # 2. Its evidence.
    claims = verify_key_request(
        attested.evidence,
        attested.claims,
        policy=policy,
        now=now,
        nonce=nonce,
        insecure_allow_emulated=insecure_allow_emulated,
    )
    # 3. The package.
    bundle = _find(keys, claims.package_id)
    # 4. Signed and sealed for this request.
    signed = b"".join(
        (
            bundle.model.package_id,
            bundle.model.content_key.reveal(),
            bundle.model.owner_public_key,
            bundle.service_secret.reveal(),
            broker_key.public_key().public_bytes_raw(),
        )
    )
    payload = signed + broker_key.sign(grant_message(request, signed))
    try:
        recipient = X25519PublicKey.from_public_bytes(claims.public_key)
        sealed = hpke.SUITE.encrypt(payload, recipient, grant_info(request))
    except ValueError:  # all-zero shared secret (RFC 9180, section 7.1.4)
        raise KeyRefusedError("the request's public key is not a usable X25519 key") from None
    return bytes([GRANT_VERSION]) + sealed


def _find(keys: Iterable[KeyBundle], package_id: bytes) -> KeyBundle:
    for bundle in keys:
        if hmac.compare_digest(bundle.model.package_id, package_id):
            return bundle
    raise KeyRefusedError(
        f"this broker has no keys for package {package_id.hex()}: its key file was not given to "
        "the broker, or is of an earlier seal"
    )
