"""A sealed request on the wire: BYTES tensors of records, and two parameters. Pure.

The request's parameters carry ``lasagna_request_id`` (16 bytes in hexadecimal digits) and
``lasagna_capsule`` (base64); every input is a BYTES tensor of shape [rows], an element a record.
The gateway can't read any of it; it checks what can be checked from outside, so that a mistake is
named before it has cost the enclave anything.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Final

from lasagna.enclave.messages import SealedRows
from lasagna.errors import InvalidInputError, ProtocolError
from lasagna.gateway.metadata import VERSION
from lasagna.gateway.tensors import (
    AnswerJson,
    InferRequest,
    Parameter,
    Tensor,
    TensorJson,
    element_bytes,
    encode_answer,
)
from lasagna.package.format import TensorSpec
from lasagna.server.served import ModelFacts
from lasagna.trust.keys import REQUEST_ID_BYTES
from lasagna.trust.records import RECORD_OVERHEAD
from lasagna.trust.request import CAPSULE_BYTES
from lasagna.units import KIB

REQUEST_ID: Final = "lasagna_request_id"
CAPSULE: Final = "lasagna_capsule"
MAX_JSON_BYTES: Final = 64 * KIB
"""Room for a request's JSON besides its records."""


def sealed_rows(request: InferRequest, facts: ModelFacts) -> SealedRows:
    """A request as the enclave takes it.

    Raises:
        InvalidInputError: the inputs aren't this model's, or not sealed as its records are.
    """
    request_id = _request_id(request.parameters)
    capsule = _capsule(request.parameters)
    given = {tensor.name: tensor for tensor in request.inputs}
    names = [spec.name for spec in facts.inputs]
    if missing := [name for name in names if name not in given]:
        raise InvalidInputError(f"no input {missing[0]!r}; the model takes {_listed(names)}")
    if unknown := [name for name in given if name not in names]:
        raise InvalidInputError(f"unknown input {unknown[0]!r}; the model takes {_listed(names)}")
    tensors = [given[name] for name in names]
    rows = _rows(tensors, facts)
    for tensor, spec in zip(tensors, facts.inputs, strict=True):
        _check_records(tensor, spec)
    return SealedRows(request_id, capsule, rows, tuple(tensor.elements for tensor in tensors))


def sealed_answer(
    request: InferRequest, model: str, facts: ModelFacts, records: Sequence[Sequence[bytes]]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow.

    Raises:
        ProtocolError: the records are not one list for every output.
    """
    names = [spec.name for spec in facts.outputs]
    if len(records) != len(names):
        raise ProtocolError(f"{len(records)} outputs came back of a model that has {len(names)}")
    chosen = [names.index(name) for name in request.outputs] or list(range(len(names)))
    answer = AnswerJson(
        model_name=model,
        model_version=VERSION,
        outputs=tuple(
            TensorJson(names[index], (len(records[index]),), "BYTES") for index in chosen
        ),
        id=request.id or None,
    )
    binary = [request.wants_binary(names[index]) for index in chosen]
    return encode_answer(answer, [records[index] for index in chosen], binary)


def check_outputs(request: InferRequest, facts: ModelFacts) -> None:
    """See that the outputs asked for exist, before anything is computed.

    Raises:
        InvalidInputError: one doesn't.
    """
    names = [spec.name for spec in facts.outputs]
    for name in request.outputs:
        if name not in names:
            raise InvalidInputError(f"no output {name!r}; the model has {_listed(names)}")


def raw_request(
    body: bytes, parameters: Mapping[str, Parameter], facts: ModelFacts
) -> InferRequest:
    """A raw body: one row's record of a model that has one input, and parameters from headers.

    Raises:
        InvalidInputError: the model has more inputs than one.
    """
    if len(facts.inputs) != 1:
        raise InvalidInputError(
            f"a raw body is one input, this model has {len(facts.inputs)}: send JSON"
        )
    tensor = Tensor(facts.inputs[0].name, "BYTES", (1,), (memoryview(body),))
    return InferRequest("", dict(parameters), (tensor,), binary_default=True)


def body_limit(facts: ModelFacts) -> int:
    """Bytes of the largest body that can be right: all rows, in base64, and some JSON."""
    row = sum(element_bytes(spec.row_bytes + RECORD_OVERHEAD) for spec in facts.inputs)
    return facts.max_rows * (row * 4 // 3 + KIB) + MAX_JSON_BYTES


def _rows(tensors: Sequence[Tensor], facts: ModelFacts) -> int:
    for tensor in tensors:
        if tensor.datatype != "BYTES":
            raise InvalidInputError(
                f"input {tensor.name!r} has datatype {tensor.datatype}; this server takes sealed "
                "records (BYTES), which lasagna.Client or the local proxy make"
            )
        if len(tensor.shape) != 1:
            raise InvalidInputError(
                f"input {tensor.name!r} has shape {list(tensor.shape)}; sealed records have [rows]"
            )
    rows = tensors[0].shape[0]
    if any(tensor.shape[0] != rows for tensor in tensors):
        raise InvalidInputError("the inputs have different numbers of rows")
    if not 1 <= rows <= facts.max_rows:
        raise InvalidInputError(
            f"{rows} rows in one request; this server takes 1 to {facts.max_rows} of this model"
        )
    return rows


def _check_records(tensor: Tensor, spec: TensorSpec) -> None:
    expected = spec.row_bytes + RECORD_OVERHEAD
    for row, record in enumerate(tensor.elements):
        if len(record) != expected:
            raise InvalidInputError(
                f"row {row} of input {spec.name!r} is a record of {len(record)} bytes; a row of "
                f"{spec.dtype} {list(spec.row_shape)} is sealed in {expected}"
            )


def _request_id(parameters: Mapping[str, Parameter]) -> bytes:
    text = parameters.get(REQUEST_ID)
    try:
        raw = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != REQUEST_ID_BYTES:
        raise InvalidInputError(
            f"the parameter {REQUEST_ID} must be {2 * REQUEST_ID_BYTES} hexadecimal digits"
        )
    return raw


def _capsule(parameters: Mapping[str, Parameter]) -> bytes:
    text = parameters.get(CAPSULE)
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != CAPSULE_BYTES:
        raise InvalidInputError(
            f"the parameter {CAPSULE} must be a capsule of {CAPSULE_BYTES} bytes in base64"
        )
    return raw


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
