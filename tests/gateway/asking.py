"""Requests to a gateway in this process, right ones and ways to change them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
from tests.gateway.twin import BROKER, POLICY, TwinModel

from lasagna.client.sealing import Service, seal_call
from lasagna.gateway.app import GatewayLimits, gateway_app
from lasagna.gateway.metadata import model_metadata
from lasagna.gateway.tensors import HEADER_LENGTH
from lasagna.trust.evidence import decode_attested
from lasagna.trust.verifier import UnixSeconds, verify_service

NAME = "org/twin model"
PATH = "/v2/models/org%2Ftwin%20model"


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
