"""What a client checks before it seals anything."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.gateway.twin import INPUT, TwinModel

from lasagna.client.sealing import Service, check_inputs, seal_call
from lasagna.errors import EvidenceError, InvalidInputError, RecordError, ServiceError
from lasagna.gateway.metadata import SealedFacts, SealedTensor, model_metadata
from lasagna.gateway.tensors import (
    HEADER_LENGTH,
    AnswerJson,
    TensorJson,
    encode_answer,
    parse_request,
)
from lasagna.package.format import TensorSpec
from lasagna.trust.keys import SecretKey, ServiceSecret, service_keys

FACTS = model_metadata(TwinModel()).lasagna
TWO = model_metadata(TwinModel(inputs=(INPUT, TensorSpec("ids", "int64", (2, 5))))).lasagna
SINGLE = model_metadata(TwinModel(batchable=False)).lasagna
SERVICE = Service(FACTS, service_keys(ServiceSecret(SecretKey(b"s" * 32))).public_key)


def floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("facts", "inputs", "message"),
    [
        (FACTS, {}, "input 'x' is missing; the model takes 'x'"),
        (FACTS, {"x": floats(1, 3), "z": 0}, "there is no input 'z'; the model takes 'x'"),
        (
            FACTS,
            {"x": np.zeros((1, 3))},
            r"input 'x' is float64; the model takes float32: pass array.astype\('float32'\)",
        ),
        (FACTS, {"x": floats(1, 3).astype(">f4")}, "input 'x' is >f4; the model takes float32"),
        (FACTS, {"x": [[1, 2, 3]]}, "input 'x' is int64"),
        (FACTS, {"x": floats(1, 4)}, r"has shape \[1, 4\]; the model takes \[rows, 3\]$"),
        (FACTS, {"x": floats(3)}, r"takes \[rows, 3\]: for one row, pass array\[None\]"),
        (FACTS, {"x": floats(3, 1)}, "the number of elements is right"),
        (FACTS, {"x": floats(0, 3)}, r"has shape \[0, 3\]"),
        (FACTS, {"x": np.float32(1)}, r"has shape \[\]"),
        (FACTS, {"x": floats(5, 3)}, r"5 rows \(60 B\) in one call; this server takes up to 4"),
        (SINGLE, {"x": floats(2, 3)}, r"takes \[1, 3\] \(it has no batch dimension\)"),
        (
            TWO,
            {"x": floats(1, 3), "ids": np.zeros((3, 5), np.int64)},
            r"takes \[rows x 2, 5\]",
        ),
        (
            TWO,
            {"x": floats(1, 3), "ids": np.zeros((4, 5), np.int64)},
            "different numbers of rows: 'x' 1, 'ids' 2",
        ),
    ],
)
def test_wrong_inputs_are_named_before_anything_is_sent(
    facts: SealedFacts, inputs: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_inputs(facts, inputs)


def test_right_inputs_come_in_the_models_order() -> None:
    ids = np.arange(20, dtype=np.int64).reshape(5, 4).T  # not contiguous
    rows, (x, given) = check_inputs(TWO, {"ids": ids, "x": floats(2, 3)})
    assert rows == 2
    assert x.shape == (2, 3)
    assert given.flags.c_contiguous
    assert (given == ids).all()


def test_nothing_of_the_plaintext_is_in_the_request() -> None:
    secret = np.frombuffer(b"secret! secret! secret!!"[:12], np.float32).reshape(1, 3)
    call = seal_call(SERVICE, {"x": secret}, os.urandom, {})
    assert b"secret" not in call.body
    (tensor,) = parse_request(call.body, call.json_bytes).inputs
    assert tensor.datatype == "BYTES"
    assert tensor.shape == (1,)


def test_no_two_requests_are_alike() -> None:
    bodies = {bytes(seal_call(SERVICE, {"x": floats(1, 3)}, os.urandom, {}).body) for _ in range(5)}
    assert len(bodies) == 5


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((), "0 rows of output 'y', not 1"),
        ((TensorJson("y", (2,), "BYTES"),), "2 rows of output 'y', not 1"),
        ((TensorJson("z", (1,), "BYTES"),), "0 rows of output 'y'"),
    ],
)
def test_an_answer_that_lacks_something_is_the_servers_fault(
    outputs: tuple[TensorJson, ...], message: str
) -> None:
    call = seal_call(SERVICE, {"x": floats(1, 3)}, os.urandom, {})
    records = [[b"x"] * tensor.shape[0] for tensor in outputs]
    body, length = encode_answer(AnswerJson("m", "1", outputs), records, [True for _ in outputs])
    with pytest.raises(ServiceError, match=message):
        call.open(body, length)


def test_a_server_that_claims_huge_rows_gets_no_memory_for_them() -> None:
    """A row of 1 GiB, of which not a byte is sent: 4 TiB for the largest request."""
    huge = SealedTensor("y", "uint8", (2**30,))
    facts = msgspec.structs.replace(FACTS, outputs=(huge,), max_rows=4096)
    call = seal_call(Service(facts, SERVICE.public_key), {"x": floats(4096, 3)}, os.urandom, {})
    head = AnswerJson("m", "1", (TensorJson("y", (4096,), "BYTES"),))
    body, length = encode_answer(head, [[b"x"] * 4096], [True])
    with pytest.raises(ServiceError, match="a record of 1 bytes for output 'y', whose rows are"):
        call.open(body, length)


def test_a_plan_with_fields_of_a_later_version_is_read() -> None:
    told = msgspec.json.decode(msgspec.json.encode(FACTS))
    told["plan"]["levels_of_something_new"] = [1, 2]
    later = msgspec.json.decode(msgspec.json.encode(told), type=SealedFacts)
    assert later.plan is not None
    assert later.plan["max_batch"] == 4


def test_an_answer_of_nonsense_is_the_servers_fault() -> None:
    call = seal_call(SERVICE, {"x": floats(1, 3)}, os.urandom, {})
    with pytest.raises(ServiceError, match="malformed"):
        call.open(b"<html>", None)


def test_a_forged_output_does_not_open() -> None:
    call = seal_call(SERVICE, {"x": floats(1, 3)}, os.urandom, {})
    forged = b"\x01" + bytes(12 + 12 + 16)
    body, length = encode_answer(
        AnswerJson("m", "1", (TensorJson("y", (1,), "BYTES"),)), [[forged]], [True]
    )
    with pytest.raises(RecordError, match="does not open"):
        call.open(body, length)


@pytest.mark.parametrize(
    "tensor",
    [
        SealedTensor("x", "object", (1, 3)),
        SealedTensor("x", "float32", (1, 2**40)),
        SealedTensor("", "float32", (1, 3)),
    ],
)
def test_absurd_facts_are_refused(tensor: SealedTensor) -> None:
    facts = SealedFacts(FACTS.model_digest, "", (tensor,), (tensor,), 4, True)
    with pytest.raises((RecordError, InvalidInputError)):
        seal_call(Service(facts, SERVICE.public_key), {tensor.name: floats(1, 3)}, os.urandom, {})


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(EvidenceError, match="not a usable X25519 key"):
        seal_call(Service(FACTS, bytes(32)), {"x": floats(1, 3)}, os.urandom, {})


def test_the_header_has_one_name() -> None:
    assert HEADER_LENGTH == "Inference-Header-Content-Length"
