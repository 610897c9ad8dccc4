"""The wire format: round trips, what is refused and why, and that nothing else ever happens."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lasagna.errors import InvalidInputError
from lasagna.gateway.tensors import (
    AnswerJson,
    InferRequest,
    TensorJson,
    bytes_blob,
    element_bytes,
    encode_answer,
    parse_answer,
    parse_request,
    write_length,
)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1], "datatype": "BYTES", **changes}


def body_of(head: Any, *blobs: bytes) -> tuple[bytes, int]:
    text = json.dumps(head).encode()
    return b"".join((text, *blobs)), len(text)


def parse(head: Any, *blobs: bytes) -> InferRequest:
    body, length = body_of(head, *blobs)
    return parse_request(body, length)


def binary(*elements: bytes) -> tuple[dict[str, Any], bytes]:
    blob = bytes_blob(elements)
    return tensor(shape=[len(elements)], parameters={"binary_data_size": len(blob)}), blob


def test_binary_tensors_follow_the_json_in_order() -> None:
    first, blob = binary(b"one", b"")
    second, other = binary(b"three")
    request = parse({"id": "7", "inputs": [first, second | {"name": "z"}]}, blob, other)
    assert request.id == "7"
    assert [bytes(element) for element in request.inputs[0].elements] == [b"one", b""]
    assert [bytes(element) for element in request.inputs[1].elements] == [b"three"]
    assert request.inputs[0].shape == (2,)


def test_elements_are_views_of_the_body() -> None:
    head, blob = binary(b"abc")
    body, length = body_of({"inputs": [head]}, blob)
    place = bytearray(body)
    (element,) = parse_request(place, length).inputs[0].elements
    place[-1:] = b"Z"
    assert bytes(element) == b"abZ"


def test_in_json_elements_are_base64() -> None:
    data = [base64.b64encode(part).decode() for part in (b"\x00\xff", b"")]
    request = parse_request(json.dumps({"inputs": [tensor(shape=[2], data=data)]}).encode(), None)
    assert [bytes(element) for element in request.inputs[0].elements] == [b"\x00\xff", b""]


def test_unknown_fields_and_nulls_are_ignored() -> None:
    head, blob = binary(b"a")
    request = parse(
        {"inputs": [head | {"extra": [1]}], "model_name": "m", "id": None, "outputs": None}, blob
    )
    assert request.id == ""
    assert request.outputs == ()


def test_other_datatypes_are_read_as_far_as_their_shape() -> None:
    request = parse({"inputs": [tensor(datatype="FP32", data=[[1.5]])]})
    assert request.inputs[0].datatype == "FP32"
    assert request.inputs[0].elements == ()


@pytest.mark.parametrize(
    ("parameters", "outputs", "wanted"),
    [
        ({}, None, False),
        ({"binary_data_output": True}, None, True),
        (
            {"binary_data_output": True},
            [{"name": "y", "parameters": {"binary_data": False}}],
            False,
        ),
        ({"binary_data_output": True}, [{"name": "y"}], True),
        ({}, [{"name": "y", "parameters": {"binary_data": True}}], True),
        ({}, [{"name": "other", "parameters": {"binary_data": True}}], False),
    ],
)
def test_which_outputs_are_wanted_in_binary(
    parameters: dict[str, Any], outputs: Any, wanted: bool
) -> None:
    head, blob = binary(b"a")
    request = parse({"inputs": [head], "parameters": parameters, "outputs": outputs}, blob)
    assert request.wants_binary("y") is wanted


HEAD, BLOB = binary(b"abc")


@pytest.mark.parametrize(
    ("head", "blobs", "message"),
    [
        ([], [], "the request is malformed"),
        ({}, [], "inputs"),
        ({"inputs": [HEAD]}, [], "0 bytes are left"),
        ({"inputs": [HEAD]}, [BLOB, b"!"], "1 bytes of the body belong to no tensor"),
        ({"inputs": [HEAD, HEAD]}, [BLOB, BLOB], "two tensors have one name"),
        ({"inputs": [HEAD | {"data": ["YQ=="]}]}, [BLOB], "both data and binary data"),
        ({"inputs": [HEAD | {"shape": [2]}]}, [BLOB], r"shape \[2\] has 1 elements, not 2"),
        ({"inputs": [HEAD | {"shape": [0]}]}, [BLOB], "does not end where it should"),
        ({"inputs": [HEAD | {"shape": [2**20, 2]}]}, [BLOB], "more than 1048576 elements"),
        ({"inputs": [HEAD | {"shape": [-1]}]}, [BLOB], "malformed"),
        ({"inputs": [HEAD | {"parameters": {"binary_data_size": True}}]}, [BLOB], "of True"),
        ({"inputs": [HEAD | {"parameters": {"binary_data_size": -1}}]}, [BLOB], "of -1"),
        ({"inputs": [tensor()]}, [], "neither data nor binary_data_size"),
        ({"inputs": [tensor(data=["%"])]}, [], "is base64"),
        ({"inputs": [tensor(data=["é"])]}, [], "is base64"),
        ({"inputs": [tensor(data=[1])]}, [], "the data of tensor 'x' is malformed"),
        ({"inputs": [tensor(data=["YQ==", "YQ=="])]}, [], "2 elements, not 1"),
        (
            {"inputs": [HEAD], "outputs": [{"name": "y"}, {"name": "y"}]},
            [BLOB],
            "output 'y' is asked for twice",
        ),
    ],
)
def test_what_is_wrong_is_named(head: Any, blobs: list[bytes], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse(head, *blobs)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"\0\0\0", "does not end where it should"),
        (struct.pack("<I", 4) + b"abc", "an element of 4 bytes, of which 3 are there"),
        (struct.pack("<I", 2**32 - 1), "of which 0 are there"),
    ],
)
def test_a_damaged_blob_is_refused(blob: bytes, message: str) -> None:
    head = tensor(parameters={"binary_data_size": len(blob)})
    with pytest.raises(InvalidInputError, match=message):
        parse({"inputs": [head]}, blob)


@pytest.mark.parametrize("length", [0, -1, 100])
def test_a_header_length_outside_the_body_is_refused(length: int) -> None:
    with pytest.raises(InvalidInputError, match="the body has 2 bytes"):
        parse_request(b"{}", length)


def test_deeply_nested_json_is_refused() -> None:
    deep = b'{"inputs": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(InvalidInputError):
        parse_request(deep, None)


@given(st.binary(max_size=300), st.none() | st.integers(-5, 310))
@example(b'{"inputs":[]}\xff', 13)
def test_any_bytes_are_a_request_or_refused(body: bytes, length: int | None) -> None:
    for parser in (parse_request, parse_answer):
        with contextlib.suppress(InvalidInputError):
            parser(body, length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
almost_tensors = st.fixed_dictionaries(
    {
        "name": st.text(max_size=3) | json_values,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values,
        "datatype": st.sampled_from(["BYTES", "FP32"]) | json_values,
    },
    optional={
        "data": st.lists(st.sampled_from(["", "YQ==", "x"]), max_size=3) | json_values,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 20)})
        | json_values,
    },
)
almost_requests = st.fixed_dictionaries(
    {"inputs": st.lists(almost_tensors, max_size=3) | json_values},
    optional={
        "id": json_values,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.text(max_size=3)})) | json_values,
        "parameters": json_values,
    },
)


@given(almost_requests, st.binary(max_size=40), st.booleans())
def test_almost_requests_are_taken_or_refused(head: Any, blob: bytes, with_blob: bool) -> None:
    text = json.dumps(head).encode()
    try:
        request = parse_request(text + blob if with_blob else text, len(text))
    except InvalidInputError:
        return
    for one in request.inputs:
        count = 1
        for extent in one.shape:
            count *= extent
        assert len(one.elements) == (count if one.datatype == "BYTES" else 0)


@given(st.lists(st.lists(st.binary(max_size=20), max_size=4), min_size=1, max_size=3), st.data())
def test_answers_come_back_as_they_were(tensors: list[list[bytes]], data: st.DataObject) -> None:
    as_blob = [data.draw(st.booleans()) for _ in tensors]
    heads = tuple(
        TensorJson(f"y{number}", (len(elements),), "BYTES")
        for number, elements in enumerate(tensors)
    )
    body, length = encode_answer(AnswerJson("m", "1", heads, "id"), tensors, as_blob)
    assert (length is None) == (not any(as_blob))
    answer = parse_answer(body, length)
    assert answer.id == "id"
    assert answer.model == "m"
    assert [[bytes(e) for e in one.elements] for one in answer.outputs] == tensors


def test_an_element_can_be_written_in_place() -> None:
    place = memoryview(bytearray(element_bytes(3)))
    write_length(place, 3)[:] = b"abc"
    assert place.tobytes() == bytes_blob([b"abc"])
