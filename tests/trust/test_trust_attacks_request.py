"""Attacks on requests by the host, which moves every record, alone or with a client of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import pytest

from lasagna.errors import RecordError
from lasagna.trust.keys import (
    Direction,
    RecordKey,
    RequestSecret,
    SecretKey,
    ServiceSecret,
    activation_key,
    capsule_digest,
    service_keys,
)
from lasagna.trust.records import RecordContext, open_record_into, seal_record
from lasagna.trust.request import RequestScope, SealedRequest, open_capsule, seal_capsule

SERVICE = service_keys(ServiceSecret(SecretKey(b"v" * 32)))
SCOPE = RequestScope(service_id=SERVICE.service_id, model_digest=b"m" * 32, request_id=b"r" * 16)
IMAGE = RecordContext(
    scope=SCOPE, direction=Direction.INPUT, tensor="image", dtype="uint8", row_shape=(16,), rows=2
)
MIDDLE = replace(IMAGE, direction=Direction.ACTIVATION, tensor="conv", variant="avx2", boundary=1)
LABEL = replace(IMAGE, direction=Direction.OUTPUT, tensor="label")
_NONCES = count()


def seal(key: RecordKey, context: RecordContext, row: int, plaintext: bytes) -> bytes:
    return seal_record(key, context, row, plaintext, next(_NONCES).to_bytes(12, "big"))


def reopen(key: RecordKey, context: RecordContext, row: int, record: bytes) -> bytes:
    out = bytearray(context.row_bytes)
    open_record_into(key, context, row, record, out)
    return bytes(out)


@dataclass(frozen=True)
class Client:
    sealed: SealedRequest

    @classmethod
    def asking(cls, scope: RequestScope, secret: bytes) -> Client:
        return cls(seal_capsule(SERVICE.public_key, scope, RequestSecret(SecretKey(secret * 32))))


def first_slice(scope: RequestScope, capsule: bytes, record: bytes) -> bytes:
    """What an enclave does at the first slice, the network being the identity."""
    keys = open_capsule(SERVICE, scope, capsule)
    row = reopen(keys.input, replace(IMAGE, scope=scope), 0, record)
    return seal(keys.activation, replace(MIDDLE, scope=scope), 0, row)


def last_slice(scope: RequestScope, capsule: bytes, record: bytes) -> bytes:
    keys = open_capsule(SERVICE, scope, capsule)
    row = reopen(keys.activation, replace(MIDDLE, scope=scope), 0, record)
    return seal(keys.output, replace(LABEL, scope=scope), 0, row)


def test_an_honest_run_from_client_to_client() -> None:
    client = Client.asking(SCOPE, b"1")
    image = b"a private image!"
    record = seal(client.sealed.keys.input, IMAGE, 0, image)
    activation = first_slice(SCOPE, client.sealed.capsule, record)
    # An enclave between the two doesn't open the capsule: the host tells it the digest.
    digest = capsule_digest(client.sealed.capsule)
    key = activation_key(SERVICE.secret, SCOPE.request_id, digest)
    moved = seal(key, replace(MIDDLE, boundary=1), 0, reopen(key, MIDDLE, 0, activation))
    output = last_slice(SCOPE, client.sealed.capsule, moved)
    assert reopen(client.sealed.keys.output, LABEL, 0, output) == image


def test_a_colluding_client_with_the_victims_request_id_reads_nothing() -> None:
    """The host feeds the victim's activations into a request of its own under the same id.

    With a key made from the request id alone, the last enclave would seal the victim's result for
    the colluding client.
    """
    victim, colluder = Client.asking(SCOPE, b"1"), Client.asking(SCOPE, b"2")
    record = seal(victim.sealed.keys.input, IMAGE, 0, b"a private image!")
    activation = first_slice(SCOPE, victim.sealed.capsule, record)
    with pytest.raises(RecordError, match="does not open"):
        last_slice(SCOPE, colluder.sealed.capsule, activation)


def test_a_colluding_client_with_the_victims_capsule_reads_nothing() -> None:
    """It can send the victim's capsule again, but the result is sealed for the victim."""
    victim, colluder = Client.asking(SCOPE, b"1"), Client.asking(SCOPE, b"2")
    record = seal(victim.sealed.keys.input, IMAGE, 0, b"a private image!")
    activation = first_slice(SCOPE, victim.sealed.capsule, record)
    output = last_slice(SCOPE, victim.sealed.capsule, activation)
    with pytest.raises(RecordError, match="does not open"):
        reopen(colluder.sealed.keys.output, LABEL, 0, output)


def test_a_capsule_moved_to_another_request_id_does_not_open() -> None:
    victim = Client.asking(SCOPE, b"1")
    with pytest.raises(RecordError, match="does not open"):
        open_capsule(SERVICE, replace(SCOPE, request_id=b"x" * 16), victim.sealed.capsule)


def test_a_request_sent_to_another_model_does_not_open() -> None:
    """The host wants the image run through a model that reveals more of it."""
    victim = Client.asking(SCOPE, b"1")
    with pytest.raises(RecordError, match="does not open"):
        open_capsule(SERVICE, replace(SCOPE, model_digest=b"x" * 32), victim.sealed.capsule)


def test_another_requests_input_does_not_open() -> None:
    """Replay: yesterday's input of the same client, in today's request."""
    yesterday, today = Client.asking(SCOPE, b"1"), Client.asking(SCOPE, b"1")
    record = seal(yesterday.sealed.keys.input, IMAGE, 0, b"yesterday's imag")
    with pytest.raises(RecordError, match="does not open"):
        first_slice(SCOPE, today.sealed.capsule, record)


def test_rows_do_not_change_places() -> None:
    client = Client.asking(SCOPE, b"1")
    second = seal(client.sealed.keys.input, IMAGE, 1, b"the second image")
    with pytest.raises(RecordError, match="row 0"):
        first_slice(SCOPE, client.sealed.capsule, second)


def test_rows_are_not_dropped_from_a_request() -> None:
    """The host says that the request has one row; the records say that it has two."""
    client = Client.asking(SCOPE, b"1")
    record = seal(client.sealed.keys.input, IMAGE, 0, b"the first image!")
    keys = open_capsule(SERVICE, SCOPE, client.sealed.capsule)
    with pytest.raises(RecordError, match="does not open"):
        reopen(keys.input, replace(IMAGE, rows=1), 0, record)


def test_an_activation_is_not_fed_to_another_slice() -> None:
    client = Client.asking(SCOPE, b"1")
    keys = open_capsule(SERVICE, SCOPE, client.sealed.capsule)
    record = seal(keys.activation, MIDDLE, 0, b"half of an image")
    with pytest.raises(RecordError, match="does not open"):
        reopen(keys.activation, replace(MIDDLE, boundary=2), 0, record)


def test_an_activation_is_not_fed_to_a_server_of_another_layout() -> None:
    client = Client.asking(SCOPE, b"1")
    keys = open_capsule(SERVICE, SCOPE, client.sealed.capsule)
    record = seal(keys.activation, MIDDLE, 0, b"half of an image")
    with pytest.raises(RecordError, match="does not open"):
        reopen(keys.activation, replace(MIDDLE, variant="avx512"), 0, record)


def test_an_activation_is_not_presented_to_the_client_as_its_output() -> None:
    """Layers before the last say more about the weights than a client may know."""
    client = Client.asking(SCOPE, b"1")
    keys = open_capsule(SERVICE, SCOPE, client.sealed.capsule)
    record = seal(keys.activation, MIDDLE, 0, b"half of an image")
    with pytest.raises(RecordError, match="does not open"):
        reopen(client.sealed.keys.output, LABEL, 0, record)


def test_an_input_is_not_returned_to_the_client_as_its_output() -> None:
    client = Client.asking(SCOPE, b"1")
    echo = replace(LABEL, tensor="image")
    record = seal(client.sealed.keys.input, IMAGE, 0, b"a private image!")
    with pytest.raises(RecordError, match="does not open"):
        reopen(client.sealed.keys.output, echo, 0, record)


def test_an_output_is_not_kept_for_a_later_request() -> None:
    """The answer to an old question, to a client that asks again under the same id."""
    yesterday, today = Client.asking(SCOPE, b"1"), Client.asking(SCOPE, b"1")
    keys = open_capsule(SERVICE, SCOPE, yesterday.sealed.capsule)
    record = seal(keys.output, LABEL, 0, b"an old answer...")
    with pytest.raises(RecordError, match="does not open"):
        reopen(today.sealed.keys.output, LABEL, 0, record)


def test_an_enclave_of_another_service_opens_nothing() -> None:
    client = Client.asking(SCOPE, b"1")
    digest = capsule_digest(client.sealed.capsule)
    keys = open_capsule(SERVICE, SCOPE, client.sealed.capsule)
    record = seal(keys.activation, MIDDLE, 0, b"half of an image")
    stranger = ServiceSecret(SecretKey(b"w" * 32))
    with pytest.raises(RecordError, match="does not open"):
        reopen(activation_key(stranger, SCOPE.request_id, digest), MIDDLE, 0, record)
