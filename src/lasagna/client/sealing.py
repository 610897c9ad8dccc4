"""Arrays to a sealed request, a sealed answer to arrays. Pure: randomness is handed in."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lasagna.errors import InvalidInputError, RecordError, ServiceError
from lasagna.gateway.metadata import SealedFacts, SealedTensor
from lasagna.gateway.sealed import CAPSULE, REQUEST_ID
from lasagna.gateway.tensors import (
    Parameter,
    RequestJson,
    TensorJson,
    element_bytes,
    parse_answer,
    write_length,
)
from lasagna.package.format import DTYPES
from lasagna.trust.keys import (
    KEY_BYTES,
    REQUEST_ID_BYTES,
    Direction,
    RequestSecret,
    SecretKey,
    service_id,
)
from lasagna.trust.records import (
    NONCE_BYTES,
    RecordContext,
    open_record_into,
    require_record_budget,
    seal_record_into,
)
from lasagna.trust.request import RequestScope, SealedRequest, seal_capsule
from lasagna.units import KIB, format_bytes

Array: TypeAlias = NDArray[Any]
Entropy: TypeAlias = Callable[[int], bytes]
"""So many bytes, fresh from a random generator for keys: ``os.urandom``."""
_ANSWER_JSON_BYTES: Final = 64 * KIB


@dataclass(frozen=True, slots=True)
class Service:
    """A model behind an enclave that has been verified.

    Attributes:
        facts: the server's word for what it serves. If it lies, nothing opens.
        public_key: what evidence binds to the enclave, 32 bytes.
    """

    facts: SealedFacts
    public_key: bytes


@dataclass(frozen=True, slots=True)
class SealedCall:
    """A request to send, and what opens its answer.

    Attributes:
        body: of the request.
        json_bytes: length of the JSON in front.
        answer_limit: bytes of the longest answer that can be right.
    """

    body: bytearray
    json_bytes: int
    answer_limit: int
    _facts: SealedFacts
    _scope: RequestScope
    _sealed: SealedRequest
    _rows: int

    def open(self, body: bytes, json_bytes: int | None) -> dict[str, Array]:
        """The outputs by name, of shape [rows, ...].

        Args:
            body: of the answer.
            json_bytes: length of the JSON in front, if something follows.

        Raises:
            ServiceError: the answer is malformed, or lacks an output.
            RecordError: an output does not open: it was changed, or is another request's.
        """
        try:
            answer = parse_answer(body, json_bytes)
        except InvalidInputError as error:
            raise ServiceError(f"the server's answer is malformed: {error}", 200) from None
        given = {tensor.name: tensor.elements for tensor in answer.outputs}
        found: dict[str, Array] = {}
        for spec in self._facts.outputs:
            records = given.get(spec.name, ())
            if len(records) != self._rows:
                raise ServiceError(
                    f"the server answers {len(records)} rows of output {spec.name!r}, "
                    f"not {self._rows}",
                    200,
                )
            found[spec.name] = self._open_output(spec, records)
        return found

    def _open_output(self, spec: SealedTensor, records: Sequence[memoryview]) -> Array:
        context = RecordContext.of(self._scope, Direction.OUTPUT, spec, self._rows)
        for record in records:  # before there is room for what the server says that rows take
            if len(record) != context.record_bytes:
                raise ServiceError(
                    f"the server answers a record of {len(record)} bytes for output "
                    f"{spec.name!r}, whose rows are sealed in {context.record_bytes}",
                    200,
                )
        plain = bytearray(context.row_bytes * self._rows)
        view = memoryview(plain)
        for row, record in enumerate(records):
            start = row * context.row_bytes
            place = view[start : start + context.row_bytes]
            open_record_into(self._sealed.keys.output, context, row, record, place)
        shape = (spec.row_shape[0] * self._rows, *spec.row_shape[1:])
        return np.frombuffer(plain, _dtype(spec)).reshape(shape)


def check_inputs(facts: SealedFacts, inputs: Mapping[str, ArrayLike]) -> tuple[int, list[Array]]:
    """Compare arrays with what the model takes.

    Returns:
        The number of rows, and contiguous arrays in the model's order.

    Raises:
        InvalidInputError: a name, shape or element type is wrong, or there are too many rows; the
            message says what would be right.
    """
    names = [spec.name for spec in facts.inputs]
    listed = ", ".join(repr(name) for name in names)
    for name in inputs:
        if name not in names:
            raise InvalidInputError(f"there is no input {name!r}; the model takes {listed}")
    for name in names:
        if name not in inputs:
            raise InvalidInputError(f"input {name!r} is missing; the model takes {listed}")
    arrays = [_checked(spec, np.asarray(inputs[spec.name]), facts) for spec in facts.inputs]
    counts = [len(a) // spec.row_shape[0] for a, spec in zip(arrays, facts.inputs, strict=True)]
    rows = counts[0]
    if any(count != rows for count in counts):
        raise InvalidInputError(
            "the inputs have different numbers of rows: "
            + ", ".join(f"{name!r} {count}" for name, count in zip(names, counts, strict=True))
        )
    if rows > facts.max_rows:
        size = sum(array.nbytes for array in arrays)
        raise InvalidInputError(
            f"{rows} rows ({format_bytes(size)}) in one call; this server takes up to "
            f"{facts.max_rows}: split them into several calls"
        )
    return rows, arrays


def seal_call(
    service: Service,
    inputs: Mapping[str, ArrayLike],
    entropy: Entropy,
    parameters: Mapping[str, Parameter],
) -> SealedCall:
    """Seal arrays for a service.

    Args:
        service: verified.
        inputs: by name, each of shape [rows, ...].
        entropy: for the request's id and secret, and a nonce for every record.
        parameters: to send along, readable for anybody.

    Raises:
        InvalidInputError: see :func:`check_inputs`.
        RecordError: the request is too large for one set of keys, or the model's facts are absurd.
    """
    facts = service.facts
    rows, arrays = check_inputs(facts, inputs)
    require_record_budget(rows, len(facts.inputs) + len(facts.outputs))
    scope = RequestScope(
        service_id=service_id(service.public_key),
        model_digest=bytes.fromhex(facts.model_digest),
        request_id=entropy(REQUEST_ID_BYTES),
    )
    sealed = seal_capsule(service.public_key, scope, RequestSecret(SecretKey(entropy(KEY_BYTES))))
    contexts = [RecordContext.of(scope, Direction.INPUT, spec, rows) for spec in facts.inputs]
    blobs = [rows * element_bytes(context.record_bytes) for context in contexts]
    head = msgspec.json.encode(
        RequestJson(
            inputs=tuple(
                TensorJson(spec.name, (rows,), "BYTES", {"binary_data_size": size})
                for spec, size in zip(facts.inputs, blobs, strict=True)
            ),
            parameters={
                **parameters,
                "binary_data_output": True,
                REQUEST_ID: scope.request_id.hex(),
                CAPSULE: base64.b64encode(sealed.capsule).decode(),
            },
        )
    )
    body = bytearray(len(head) + sum(blobs))
    body[: len(head)] = head
    place = memoryview(body)[len(head) :]
    for context, array in zip(contexts, arrays, strict=True):
        plain = array.reshape(-1).view(np.uint8).data
        for row in range(rows):
            out = write_length(place, context.record_bytes)
            source = plain[row * context.row_bytes : (row + 1) * context.row_bytes]
            seal_record_into(sealed.keys.input, context, row, source, entropy(NONCE_BYTES), out)
            place = place[element_bytes(context.record_bytes) :]
    outputs = [RecordContext.of(scope, Direction.OUTPUT, spec, rows) for spec in facts.outputs]
    limit = _ANSWER_JSON_BYTES + sum(rows * element_bytes(c.record_bytes) for c in outputs)
    return SealedCall(body, len(head), limit, facts, scope, sealed, rows)


def _checked(spec: SealedTensor, array: Array, facts: SealedFacts) -> Array:
    dtype = _dtype(spec)
    where = f"input {spec.name!r}"
    if array.dtype != dtype:
        raise InvalidInputError(
            f"{where} is {array.dtype}; the model takes {dtype}: pass "
            f"array.astype({dtype.name!r}) if the values are meant so"
        )
    first, rest = spec.row_shape[0], spec.row_shape[1:]
    rows = array.shape[0] // first if array.ndim else 0
    fits = array.shape[1:] == rest and rows >= 1 and array.shape[0] == rows * first
    if not fits or (rows > 1 and not facts.batchable):
        many = first if not facts.batchable else "rows" if first == 1 else f"rows x {first}"
        wanted = ", ".join(str(part) for part in (many, *rest))
        raise InvalidInputError(
            f"{where} has shape {list(array.shape)}; the model takes [{wanted}]"
            + (_batch_hint(array, spec) if facts.batchable else " (it has no batch dimension)")
        )
    return np.ascontiguousarray(array)


def _batch_hint(array: Array, spec: SealedTensor) -> str:
    if array.shape == spec.row_shape[1:] and spec.row_shape[0] == 1:
        return ": for one row, pass array[None]"
    if array.size and array.size % math.prod(spec.row_shape) == 0:
        return ": the number of elements is right, their order may not be"
    return ""


def _dtype(spec: SealedTensor) -> np.dtype[Any]:
    if spec.dtype not in DTYPES:
        raise RecordError(f"tensor {spec.name!r} has the unknown element type {spec.dtype!r}")
    return np.dtype(spec.dtype)
