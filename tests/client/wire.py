"""The way from a client to a gateway in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from starlette.testclient import TestClient
from tests.gateway.twin import BROKER, POLICY, TwinModel

from lasagna import Client
from lasagna.gateway.app import gateway_app


class Wire(httpx.BaseTransport):
    """Notes requests and how long their answers are waited for; may change the answers."""

    def __init__(self, *models: TwinModel) -> None:
        self.asked: list[str] = []
        self.waits: list[float] = []
        self.change: Callable[[str, bytes], bytes] = lambda path, body: body
        self._app = TestClient(gateway_app({one.name: one for one in models}))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        self.asked.append(f"{request.method} {path.partition('?')[0]}")
        self.waits.append(request.extensions["timeout"]["read"])
        answer = self._app.request(
            request.method, path, content=request.read(), headers=list(request.headers.raw)
        )
        body = self.change(path, answer.content)
        headers = [(n, v) for n, v in answer.headers.raw if n.lower() != b"content-length"]
        return httpx.Response(answer.status_code, headers=headers, stream=httpx.ByteStream(body))


def client_of(wire: httpx.BaseTransport, **changes: Any) -> Client:
    arguments: dict[str, Any] = {
        "policy": POLICY,
        "brokers": [BROKER],
        "insecure_allow_emulated": True,
        "transport": wire,
    }
    return Client("http://gateway", **(arguments | changes))
