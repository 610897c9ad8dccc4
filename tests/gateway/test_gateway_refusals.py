"""What the gateway refuses, with which status and which words."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tests.gateway.asking import NAME, PATH, as_json, error_of, http_to, sealed
from tests.gateway.twin import INPUT, TwinModel

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
from lasagna.gateway.tensors import HEADER_LENGTH
from lasagna.package.format import TensorSpec

pytestmark = pytest.mark.anyio


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


async def test_a_time_longer_than_any_number_is_the_servers_own(
    http: httpx.AsyncClient, model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    wish = as_json(body, headers)
    wish["parameters"]["timeout"] = 10**400  # no float holds it
    assert (await http.post(PATH + "/infer", json=wish)).status_code == 200
    assert model.timeouts == [60.0]


async def test_slow_uploads_take_no_place_from_those_that_are_here(
    model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    go_on = asyncio.Event()
    begun = asyncio.Barrier(3)

    async def slow() -> AsyncIterator[bytes]:
        await begun.wait()
        yield body[:1]
        await go_on.wait()
        yield body[1:]

    limits = GatewayLimits(requests=1, uploads=3)
    async with http_to(model, limits=limits) as http:
        uploads = [
            asyncio.create_task(http.post(PATH + "/infer", content=slow(), headers=headers))
            for _ in range(2)
        ]
        await begun.wait()
        quick = await http.post(PATH + "/infer", content=body, headers=headers)
        assert quick.status_code == 200
        go_on.set()
        statuses = [(await upload).status_code for upload in uploads]
        assert 200 in statuses


async def test_too_many_uploads_at_once_are_refused(
    model: TwinModel, request_of: tuple[bytes, dict[str, str], Any]
) -> None:
    body, headers, _ = request_of
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        begun.set()
        await go_on.wait()
        yield body

    async with http_to(model, limits=GatewayLimits(uploads=1)) as http:
        first = asyncio.create_task(http.post(PATH + "/infer", content=slow(), headers=headers))
        await begun.wait()
        refused = await http.post(PATH + "/infer", content=body, headers=headers)
        assert "1 requests are being received, which is the limit" in error_of(refused, 503)
        go_on.set()
        assert (await first).status_code == 200


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
