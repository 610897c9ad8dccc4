"""The gateway's routes as unmodified OIP clients use them, over an enclave in memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway.asking import NAME, PATH, as_json, error_of, http_to, sealed
from tests.gateway.twin import BROKER, INPUT, POLICY, TwinModel

from lasagna.gateway.app import Gateway, GatewayLimits
from lasagna.gateway.tensors import HEADER_LENGTH, parse_answer
from lasagna.package.format import TensorSpec
from lasagna.server.served import State, Status
from lasagna.trust.evidence import decode_attested
from lasagna.trust.verifier import UnixSeconds, verify_service

pytestmark = pytest.mark.anyio


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
    assert answer["process_peak_bytes"] == 5000
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


def test_the_reference_names_every_path() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text()
    named = {
        (method, path.partition("?")[0].replace("/M", "/{model}"))
        for method, path in re.findall(r"\| `(GET|POST) (/v2[^`]*)`", page)
    }
    routes = {
        (method, route.path)
        for route in Gateway({}, GatewayLimits()).routes()
        for method in route.methods or ()
        if method != "HEAD" and "versions" not in route.path
    }
    assert named == routes
