"""The gateway's routes as unmodified OIP clients use them, over an enclave in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from tests.gateway.twin import BROKER, INPUT, POLICY, TwinModel

from lasagna.client.sealing import Service, seal_call
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    KeyRefusedError,
    LasagnaError,
    OverloadedError,
    PackageError,
    RecordError,
)
from lasagna.gateway.app import GatewayLimits, gateway_app
from lasagna.gateway.errors import STATUS, status_of
from lasagna.gateway.metadata import model_metadata
from lasagna.gateway.tensors import HEADER_LENGTH, parse_answer
from lasagna.package.format import TensorSpec
from lasagna.server.served import State, Status
from lasagna.trust.evidence import decode_attested
from lasagna.trust.verifier import UnixSeconds, verify_service

pytestmark = pytest.mark.anyio

NAME = "org/twin model"
PATH = "/v2/models/org%2Ftwin%20model"


@pytest.fixture
def model() -> TwinModel:
    return TwinModel(NAME)


@pytest.fixture
async def http(model: TwinModel) -> AsyncIterator[httpx.AsyncClient]:
    async with http_to(model) as client:
        yield client


@contextlib.asynccontextmanager
async def http_to(
    *models: TwinModel, limits: GatewayLimits | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    app = gateway_app({one.name: one for one in models}, limits)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def sealed(model: TwinModel, rows: int = 1, **parameters: Any) -> tuple[bytes, dict[str, str], Any]:
    """A right request: body, headers, and the call that opens its answer."""
    evidence = decode_attested(asyncio.run(model.attest(b"n" * 16, 1.0)))
    claims = verify_service(
        evidence.evidence,
        evidence.claims,
        policy=POLICY,
        brokers={BROKER},
        now=UnixSeconds(0),
        insecure_allow_emulated=True,
    )
    facts = model_metadata(model).lasagna
    inputs = {spec.name: np.ones(spec.shape(rows), spec.dtype) for spec in model.facts.inputs}
    call = seal_call(Service(facts, claims.public_key), inputs, os.urandom, parameters)
    return bytes(call.body), {HEADER_LENGTH: str(call.json_bytes)}, call


@pytest.fixture
def request_of(model: TwinModel) -> tuple[bytes, dict[str, str], Any]:
    return sealed(model)


def as_json(body: bytes, headers: dict[str, str], **changes: Any) -> dict[str, Any]:
    """The same request with its records in JSON."""
    length = int(headers[HEADER_LENGTH])
    head: dict[str, Any] = json.loads(body[:length])
    records = body[length:]
    for tensor in head["inputs"]:
        size = tensor.pop("parameters")["binary_data_size"]
        rows = tensor["shape"][0]
        each = size // rows
        tensor["data"] = [
            base64.b64encode(records[row * each + 4 : (row + 1) * each]).decode()
            for row in range(rows)
        ]
        records = records[size:]
    del head["parameters"]["binary_data_output"]
    return head | changes


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    text: str = answer.json()["error"]
    return text


async def test_server_metadata(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v2")
    assert answer.json()["name"] == "lasagna"
    assert "binary_tensor_data" in answer.json()["extensions"]
    assert (await http.get("/v2/")).status_code == 200


async def test_health(http: httpx.AsyncClient, model: TwinModel) -> None:
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/health/ready")).json() == {"live": True, "ready": True}
    assert (await http.get(PATH + "/ready")).json() == {"name": NAME, "ready": True}
    model.status = Status(State.FAILED, "the package was changed")
    answer = await http.get("/v2/health/ready")
    assert error_of(answer, 503) == f"{NAME} is failed: the package was changed"
    assert answer.json()["ready"] is False
    assert answer.json()["live"] is True
    assert "the package was changed" in error_of(await http.get(PATH + "/ready"), 503)


@pytest.mark.parametrize("path", [PATH, PATH + "/versions/1"])
async def test_model_metadata_has_the_plaintext_tensors(http: httpx.AsyncClient, path: str) -> None:
    answer = (await http.get(path)).json()
    assert answer["name"] == NAME
    assert answer["versions"] == ["1"]
    assert answer["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert answer["lasagna"]["model_digest"] == (b"d" * 32).hex()
    assert answer["lasagna"]["evidence"] == PATH + "/lasagna/evidence"
    assert answer["lasagna"]["inputs"] == [{"name": "x", "dtype": "float32", "row_shape": [1, 3]}]


async def test_a_model_without_a_batch_dimension_has_a_fixed_shape() -> None:
    async with http_to(TwinModel("fixed", batchable=False)) as http:
        answer = (await http.get("/v2/models/fixed")).json()
        assert answer["inputs"][0]["shape"] == [1, 3]


async def test_evidence_is_made_for_the_nonce(http: httpx.AsyncClient) -> None:
    nonce = b"0123456789abcdef"
    document = decode_attested(
        (await http.get(f"{PATH}/lasagna/evidence", params={"nonce": nonce.hex()})).content
    )
    claims = verify_service(
        document.evidence,
        document.claims,
        policy=POLICY,
        brokers={BROKER},
        now=UnixSeconds(0),
        nonce=nonce,
        insecure_allow_emulated=True,
    )
    assert claims.nonce == nonce


@pytest.mark.parametrize("nonce", ["", "zz" * 16, "00" * 15, "00" * 65])
async def test_evidence_needs_a_nonce(http: httpx.AsyncClient, nonce: str) -> None:
    answer = await http.get(f"{PATH}/lasagna/evidence", params={"nonce": nonce})
    assert "16 to 64 fresh" in error_of(answer, 400)


async def test_statistics_are_one_object(http: httpx.AsyncClient) -> None:
    answer = (await http.get(f"{PATH}/lasagna/statistics")).json()
    assert answer["budget_bytes"] == 1000
    assert answer["plan"]["max_batch"] == 4
    assert answer["entries"] == 3
    assert "id" not in answer


@pytest.mark.parametrize("rows", [1, 4])
async def test_infer_in_binary(http: httpx.AsyncClient, model: TwinModel, rows: int) -> None:
    body, headers, call = await asyncio.to_thread(sealed, model, rows)
    answer = await http.post(PATH + "/infer", content=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    outputs = call.open(answer.content, int(answer.headers[HEADER_LENGTH]))
    assert outputs["y"].tolist() == [[2.0, 2.0, 2.0]] * rows


async def test_infer_in_json_echoes_the_id(
    http: httpx.AsyncClient, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, call = request_of
    wish = as_json(body, headers, id="abc", model_name="ignored")
    answer = await http.post(PATH + "/versions/1/infer", json=wish)
    assert answer.headers["content-type"] == "application/json"
    assert HEADER_LENGTH not in answer.headers
    assert answer.json()["id"] == "abc"
    assert answer.json()["model_name"] == NAME
    assert answer.json()["model_version"] == "1"
    assert call.open(answer.content, None)["y"].tolist() == [[2.0, 2.0, 2.0]]


async def test_compressed_both_ways(
    http: httpx.AsyncClient, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, call = request_of
    packed = headers | {"Content-Encoding": "gzip"}
    answer = await http.post(PATH + "/infer", content=gzip.compress(body), headers=packed)
    assert "content-encoding" not in answer.headers  # sealed bytes don't get shorter
    assert call.open(answer.content, int(answer.headers[HEADER_LENGTH]))["y"].shape == (1, 3)
    metadata = await http.get(PATH, headers={"Accept-Encoding": "deflate"})
    assert metadata.json()["name"] == NAME


async def test_a_raw_body_is_one_record(
    http: httpx.AsyncClient, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, call = request_of
    head = json.loads(body[: int(headers[HEADER_LENGTH])])["parameters"]
    record = body[int(headers[HEADER_LENGTH]) + 4 :]
    raw = {
        HEADER_LENGTH: "0",
        "lasagna-request-id": head["lasagna_request_id"],
        "lasagna-capsule": head["lasagna_capsule"],
    }
    answer = await http.post(PATH + "/infer", content=record, headers=raw)
    assert call.open(answer.content, int(answer.headers[HEADER_LENGTH]))["y"].shape == (1, 3)


async def test_a_raw_body_is_for_models_of_one_input() -> None:
    model = TwinModel("two", inputs=(INPUT, TensorSpec("z", "int64", (1,))))
    async with http_to(model) as http:
        answer = await http.post("/v2/models/two/infer", content=b"x", headers={HEADER_LENGTH: "0"})
        assert "this model has 2" in error_of(answer, 400)


async def test_a_request_can_choose_its_outputs() -> None:
    model = TwinModel(
        "pair",
        outputs=(TensorSpec("a", "float32", (1, 3)), TensorSpec("b", "float32", (1, 3))),
        compute=lambda inputs: {"a": inputs["x"], "b": inputs["x"] * 3},
    )
    body, headers, _ = await asyncio.to_thread(sealed, model)
    wish = as_json(body, headers, outputs=[{"name": "b", "parameters": {"binary_data": True}}])
    async with http_to(model) as http:
        answer = await http.post("/v2/models/pair/infer", json=wish)
        found = parse_answer(answer.content, int(answer.headers[HEADER_LENGTH]))
        assert [tensor.name for tensor in found.outputs] == ["b"]
        wish["outputs"] = [{"name": "c"}]
        answer = await http.post("/v2/models/pair/infer", json=wish)
        assert error_of(answer, 400) == "no output 'c'; the model has 'a', 'b'"


def without(head: dict[str, Any], name: str) -> dict[str, Any]:
    kept = {key: value for key, value in head["parameters"].items() if key != name}
    return head | {"parameters": kept}


BAD: list[tuple[Any, str]] = [
    (lambda h: without(h, "lasagna_capsule"), "lasagna_capsule must be a capsule of 81 bytes"),
    (lambda h: without(h, "lasagna_request_id"), "must be 32 hexadecimal digits"),
    (
        lambda h: h | {"parameters": h["parameters"] | {"lasagna_capsule": "AAAA"}},
        "a capsule of 81 bytes",
    ),
    (lambda h: h | {"inputs": []}, "no input 'x'; the model takes 'x'"),
    (
        lambda h: h | {"inputs": [*h["inputs"], {**h["inputs"][0], "name": "z"}]},
        "unknown input 'z'; the model takes 'x'",
    ),
    (
        lambda h: h | {"inputs": [{**h["inputs"][0], "datatype": "FP32", "data": [1.0]}]},
        r"datatype FP32; this server takes sealed records \(BYTES\), which lasagna.Client",
    ),
    (
        lambda h: h | {"inputs": [{**h["inputs"][0], "shape": [1, 1]}]},
        r"shape \[1, 1\]; sealed records have \[rows\]",
    ),
    (
        lambda h: (
            h | {"inputs": [{**h["inputs"][0], "data": h["inputs"][0]["data"] * 5, "shape": [5]}]}
        ),
        "5 rows in one request; this server takes 1 to 4",
    ),
    (
        lambda h: h | {"inputs": [{**h["inputs"][0], "data": [], "shape": [0]}]},
        "0 rows in one request",
    ),
    (
        lambda h: h | {"inputs": [{**h["inputs"][0], "data": ["AAAA"]}]},
        r"a record of 3 bytes; a row of float32 \[1, 3\] is sealed in 41",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
async def test_a_wrong_request_is_named(
    http: httpx.AsyncClient,
    model: TwinModel,
    request_of: tuple[bytes, dict[str, str], Any],
    change: Any,
    message: str,
) -> None:
    body, headers, _ = request_of
    answer = await http.post(PATH + "/infer", json=change(as_json(body, headers)))
    assert re.search(message, error_of(answer, 400))
    assert model.seen == []


async def test_inputs_must_agree_on_the_rows() -> None:
    model = TwinModel("two", inputs=(INPUT, TensorSpec("z", "int64", (1,))))
    body, headers, _ = await asyncio.to_thread(sealed, model, 2)
    wish = as_json(body, headers)
    wish["inputs"][1] |= {"shape": [1], "data": wish["inputs"][1]["data"][:1]}
    async with http_to(model) as http:
        answer = await http.post("/v2/models/two/infer", json=wish)
        assert "different numbers of rows" in error_of(answer, 400)


async def test_garbage_records_are_refused_by_the_enclave(
    http: httpx.AsyncClient, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    damaged = body[:-1] + bytes([body[-1] ^ 1])
    answer = await http.post(PATH + "/infer", content=damaged, headers=headers)
    assert "does not open" in error_of(answer, 400)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/nobody", 404, "no model 'nobody' is served here; there are:"),
        ("POST", "/v2/models/nobody/infer", 404, "no model 'nobody'"),
        ("GET", "/v2/models/%ff", 404, "UTF-8"),
        ("GET", PATH + "/versions/2", 404, "has no version '2'; it has only '1'"),
        ("GET", "/v2/nothing", 404, "there is nothing at"),
        ("GET", "/", 404, "there is nothing at"),
        ("GET", PATH + "/infer", 405, "GET is not for this path; use POST"),
        ("DELETE", PATH, 405, "DELETE is not for this path; use GET or HEAD"),
        ("POST", "/v2", 405, "POST is not for this path"),
    ],
)
async def test_what_is_not_there(
    http: httpx.AsyncClient, method: str, path: str, status: int, message: str
) -> None:
    assert message in error_of(await http.request(method, path), status)


@pytest.mark.parametrize("length", ["-1", "x", "²", "9" * 5000, "1.0"])
async def test_a_wrong_header_length_is_refused(http: httpx.AsyncClient, length: str) -> None:
    headers = {HEADER_LENGTH.encode(): length.encode()}
    answer = await http.post(PATH + "/infer", content=b"{}", headers=headers)
    assert "is not a length" in error_of(answer, 400)


async def test_an_unknown_encoding_is_refused(http: httpx.AsyncClient) -> None:
    answer = await http.post(PATH + "/infer", content=b"x", headers={"Content-Encoding": "br"})
    assert "accepted are gzip, deflate" in error_of(answer, 400)


async def test_an_oversize_body_is_refused_at_the_models_own_limit(
    http: httpx.AsyncClient, model: TwinModel
) -> None:
    answer = await http.post(PATH + "/infer", content=bytes(200_000))
    assert "the body is too long: at most" in error_of(answer, 400)
    packed = gzip.compress(bytes(10_000_000))
    answer = await http.post(PATH + "/infer", content=packed, headers={"Content-Encoding": "gzip"})
    assert "the body is too long" in error_of(answer, 400)
    assert model.seen == []


async def test_a_body_that_never_ends_is_given_up(model: TwinModel) -> None:
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    limits = GatewayLimits(body_timeout_s=0.02)
    # httpx hands its stream to the application as it goes, so this is a slow client.
    async with http_to(model, limits=limits) as http:
        answer = await http.post(PATH + "/infer", content=body())
        assert "did not arrive within 0.02 s" in error_of(answer, 400)


ERRORS: list[tuple[LasagnaError, int, str | None]] = [
    (OverloadedError("full", 2.1), 503, "3"),
    (OverloadedError("full", 0.01), 503, "1"),
    (EnclaveLostError("died twice"), 503, "1"),
    (PackageError("tampered with"), 503, None),
    (KeyRefusedError("no"), 503, None),
    (BudgetError("too small"), 503, None),
    (RecordError("does not open"), 400, None),
    (EnclaveError("ONNX Runtime failed"), 500, None),
]


@pytest.mark.parametrize(("error", "status", "retry"), ERRORS)
async def test_errors_have_their_status(
    http: httpx.AsyncClient,
    model: TwinModel,
    request_of: tuple[bytes, dict[str, str], Any],
    error: LasagnaError,
    status: int,
    retry: str | None,
) -> None:
    body, headers, _ = request_of
    model.error = error
    answer = await http.post(PATH + "/infer", content=body, headers=headers)
    assert error_of(answer, status) == str(error)
    assert answer.headers.get("retry-after") == retry


def every_error(kind: type[LasagnaError]) -> Iterator[type[LasagnaError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from every_error(below)


def test_the_table_covers_the_whole_tree() -> None:
    assert LasagnaError in STATUS
    for kind in every_error(LasagnaError):
        if kind.__init__ is LasagnaError.__init__:
            assert 400 <= status_of(kind("why")) < 600


async def test_a_bug_is_a_500_without_details(
    http: httpx.AsyncClient, model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    model.error = ZeroDivisionError("secret detail")  # type: ignore[assignment]
    answer = await http.post(PATH + "/infer", content=body, headers=headers)
    assert error_of(answer, 500) == "internal error of the gateway; its log has the details"


async def test_too_many_at_once_are_refused(
    model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    model.gate = asyncio.Event()
    async with http_to(model, limits=GatewayLimits(requests=1)) as http:
        first = asyncio.create_task(http.post(PATH + "/infer", content=body, headers=headers))
        await model.arrived.wait()
        refused = await http.post(PATH + "/infer", content=body, headers=headers)
        assert "which is the limit" in error_of(refused, 503)
        assert refused.headers["retry-after"] == "1"
        model.gate.set()
        assert (await first).status_code == 200


@pytest.mark.parametrize(
    ("wish", "expected"), [(0, 60.0), (2_500_000, 2.5), (10**12, 60.0), (-5, 60.0), (True, 60.0)]
)
async def test_a_request_may_shorten_its_time(
    http: httpx.AsyncClient, model: TwinModel, wish: int, expected: float
) -> None:
    body, headers, _ = await asyncio.to_thread(sealed, model, 1, timeout=wish)
    assert (await http.post(PATH + "/infer", content=body, headers=headers)).status_code == 200
    assert model.timeouts == [expected]


async def test_a_client_that_goes_away_cancels_its_request(
    model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    model.gate = asyncio.Event()
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": f"{PATH}/infer".encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    serving = asyncio.create_task(gateway_app({NAME: model})(scope, receive, send))
    await model.arrived.wait()
    gone.set()
    await serving
    assert model.cancelled == 1
    assert sent[0]["status"] == 499
