"""The wire format of the Open Inference Protocol's HTTP requests and answers. Pure.

::

    body = JSON | blob of tensor 0 | blob of tensor 1 | …     (only tensors with binary_data_size)
    blob of a BYTES tensor = for every element: u32 length, little-endian | bytes

The JSON's length is in a header beside the body (``Inference-Header-Content-Length``); without it
the body is JSON only. Of the datatypes only BYTES is taken apart here, since what crosses this
gateway is sealed: in JSON an element is base64 (RFC 4648, section 4), for it is not text.

Property (fuzzed in tests/gateway): any body and length give a message or ``InvalidInputError``.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from lasagna.errors import InvalidInputError

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
MAX_JSON_TENSORS: Final = 1024
MAX_ELEMENTS: Final = 2**20
_LENGTH: Final = struct.Struct("<I")

Elements: TypeAlias = tuple[memoryview, ...]
Parameter: TypeAlias = bool | int | float | str
_Parameters: TypeAlias = dict[str, Parameter]
_Text: TypeAlias = Annotated[str, Meta(max_length=1024)]
_Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**40)]
_T = TypeVar("_T")


class TensorJson(msgspec.Struct, omit_defaults=True):
    """A tensor as the JSON has it. Fields that we don't know are ignored; null is as absent."""

    name: _Text
    shape: Annotated[tuple[_Size, ...], Meta(max_length=16)]
    datatype: Annotated[str, Meta(max_length=16)]
    parameters: _Parameters | None = None
    data: Raw | UnsetType = UNSET


class OutputWish(msgspec.Struct, omit_defaults=True):
    """An output that a request names."""

    name: _Text
    parameters: _Parameters | None = None


class RequestJson(msgspec.Struct, omit_defaults=True):
    """A request's JSON."""

    inputs: Annotated[tuple[TensorJson, ...], Meta(max_length=MAX_JSON_TENSORS)]
    id: _Text | None = None
    parameters: _Parameters | None = None
    outputs: Annotated[tuple[OutputWish, ...], Meta(max_length=MAX_JSON_TENSORS)] | None = None


class AnswerJson(msgspec.Struct, omit_defaults=True):
    """An answer's JSON."""

    model_name: str
    model_version: str
    outputs: Annotated[tuple[TensorJson, ...], Meta(max_length=MAX_JSON_TENSORS)]
    id: _Text | None = None
    parameters: _Parameters | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor.

    Attributes:
        name: of the input or output.
        datatype: OIP's name, such as BYTES.
        shape: as sent.
        elements: of a BYTES tensor, as many as the shape says; none of another type.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: Elements


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request to infer.

    Attributes:
        id: for the answer to echo.
        parameters: of the request.
        inputs: its tensors.
        outputs: names of the outputs asked for; empty for all.
        binary: names among them to be answered in binary; None for what ``binary_default`` says.
        binary_default: whether an output is answered in binary that doesn't say.
    """

    id: str
    parameters: _Parameters
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    binary: frozenset[str] | None = None
    binary_default: bool = False

    def wants_binary(self, output: str) -> bool:
        """Whether this output is to be answered in binary."""
        return self.binary_default if self.binary is None else output in self.binary


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """An answer as a client reads it."""

    id: str
    model: str
    outputs: tuple[Tensor, ...]


_REQUEST: Final = msgspec.json.Decoder(RequestJson)
_ANSWER: Final = msgspec.json.Decoder(AnswerJson)
_STRINGS: Final = msgspec.json.Decoder(tuple[str, ...])


def parse_request(body: bytes | bytearray, header_length: int | None) -> InferRequest:
    """Take a request apart; elements stay views of the body.

    Args:
        body: decompressed.
        header_length: of the JSON in front, or None for a body without binary tensors. Not 0: a
            raw body is a matter of the caller.

    Raises:
        InvalidInputError: with the first thing found wrong.
    """
    head, blobs = _split(body, header_length)
    request = _decode(_REQUEST, head, "the request")
    inputs = _tensors(request.inputs, blobs)
    parameters = request.parameters or {}
    default = parameters.get("binary_data_output") is True
    wishes: dict[str, bool] = {}
    for wish in request.outputs or ():
        if wish.name in wishes:
            raise InvalidInputError(f"output {wish.name!r} is asked for twice")
        wishes[wish.name] = (wish.parameters or {}).get("binary_data", default) is True
    return InferRequest(
        id=request.id or "",
        parameters=parameters,
        inputs=inputs,
        outputs=tuple(wishes),
        binary=frozenset(name for name, wish in wishes.items() if wish) if wishes else None,
        binary_default=default,
    )


def parse_answer(body: bytes | bytearray, header_length: int | None) -> InferAnswer:
    """Take an answer apart, on the client's side.

    Raises:
        InvalidInputError: with the first thing found wrong.
    """
    head, blobs = _split(body, header_length)
    answer = _decode(_ANSWER, head, "the answer")
    return InferAnswer(answer.id or "", answer.model_name, _tensors(answer.outputs, blobs))


def encode_answer(
    answer: AnswerJson, records: Sequence[Sequence[bytes]], binary: Sequence[bool]
) -> tuple[bytes, int | None]:
    """Put an answer together.

    Args:
        answer: its outputs name and shape only.
        records: the elements of every output.
        binary: which outputs go out in binary.

    Returns:
        The body, and the length of its JSON if binary tensors follow.
    """
    blobs: list[bytes] = []
    for tensor, elements, as_blob in zip(answer.outputs, records, binary, strict=True):
        if as_blob:
            blob = bytes_blob(elements)
            tensor.parameters = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            texts = [base64.b64encode(element).decode() for element in elements]
            tensor.data = Raw(msgspec.json.encode(texts))
    head = msgspec.json.encode(answer)
    return b"".join((head, *blobs)), len(head) if blobs else None


def bytes_blob(elements: Sequence[bytes]) -> bytes:
    """The binary form of a BYTES tensor."""
    return b"".join(part for one in elements for part in (_LENGTH.pack(len(one)), one))


def write_length(out: memoryview, length: int) -> memoryview:
    """Begin an element of a BYTES tensor in place; returns the memory that the element takes.

    For a client that seals a record straight into the body of its request.
    """
    _LENGTH.pack_into(out, 0, length)
    return out[_LENGTH.size : _LENGTH.size + length]


def element_bytes(length: int) -> int:
    """Bytes that an element takes in a blob."""
    return _LENGTH.size + length


def _split(body: bytes | bytearray, header_length: int | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    if not 0 < header_length <= len(body):
        raise InvalidInputError(
            f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes"
        )
    return view[:header_length], view[header_length:]


def _decode(decoder: msgspec.json.Decoder[_T], head: memoryview, what: str) -> _T:
    try:
        return decoder.decode(head)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError
        raise InvalidInputError(f"{what} is malformed: {error}") from None


def _tensors(heads: Sequence[TensorJson], blobs: memoryview) -> tuple[Tensor, ...]:
    """Give every tensor its part of what follows the JSON; nothing may be left over."""
    found: list[Tensor] = []
    for head in heads:
        blob: memoryview | None = None
        if (size := (head.parameters or {}).get("binary_data_size")) is not None:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(blobs):
                raise InvalidInputError(
                    f"tensor {head.name!r} has a binary_data_size of {size}, but {len(blobs)} "
                    "bytes are left of the body"
                )
            if head.data is not UNSET:
                raise InvalidInputError(f"tensor {head.name!r} has both data and binary data")
            blob, blobs = blobs[:size], blobs[size:]
        found.append(Tensor(head.name, head.datatype, head.shape, _elements(head, blob)))
    if blobs:
        raise InvalidInputError(f"{len(blobs)} bytes of the body belong to no tensor")
    if len({tensor.name for tensor in found}) != len(found):
        raise InvalidInputError("two tensors have one name")
    return tuple(found)


def _elements(head: TensorJson, blob: memoryview | None) -> Elements:
    if head.datatype != "BYTES":
        return ()
    count = math.prod(head.shape)
    if count > MAX_ELEMENTS:
        raise InvalidInputError(f"tensor {head.name!r}: more than {MAX_ELEMENTS} elements")
    if blob is not None:
        elements = _blob_elements(head.name, blob, count)
    elif isinstance(head.data, Raw):
        elements = _text_elements(head.name, head.data)
    else:
        raise InvalidInputError(f"tensor {head.name!r} has neither data nor binary_data_size")
    if len(elements) != count:
        raise InvalidInputError(
            f"tensor {head.name!r} of shape {list(head.shape)} has {len(elements)} elements, "
            f"not {count}"
        )
    return elements


def _blob_elements(name: str, blob: memoryview, count: int) -> Elements:
    found: list[memoryview] = []
    position = 0
    while position < len(blob):
        start = position + _LENGTH.size
        if start > len(blob) or len(found) == count:
            raise InvalidInputError(
                f"tensor {name!r}: its binary data does not end where it should"
            )
        (length,) = _LENGTH.unpack_from(blob, position)
        position = start + length
        if position > len(blob):
            raise InvalidInputError(
                f"tensor {name!r}: an element of {length} bytes, of which "
                f"{len(blob) - start} are there"
            )
        found.append(blob[start:position])
    return tuple(found)


def _text_elements(name: str, data: Raw) -> Elements:
    texts = _decode(_STRINGS, memoryview(data), f"the data of tensor {name!r}")
    try:
        return tuple(memoryview(base64.b64decode(text, validate=True)) for text in texts)
    except (binascii.Error, ValueError):
        raise InvalidInputError(
            f"tensor {name!r}: in JSON, each element of a sealed tensor is base64"
        ) from None
