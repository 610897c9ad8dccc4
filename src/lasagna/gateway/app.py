"""The Open Inference Protocol v2 over HTTP, for sealed requests.

The gateway is outside of all enclaves: it moves sealed bytes, and answers from public facts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lasagna.errors import (
    InvalidInputError,
    LasagnaError,
    ModelNotFoundError,
    OverloadedError,
)
from lasagna.gateway.body import compress, read_body
from lasagna.gateway.errors import headers_of, status_of
from lasagna.gateway.metadata import VERSION, model_metadata, model_statistics, server_metadata
from lasagna.gateway.sealed import (
    CAPSULE,
    REQUEST_ID,
    body_limit,
    check_outputs,
    raw_request,
    sealed_answer,
    sealed_rows,
)
from lasagna.gateway.service_class import TENANT, header_parameters, service_of
from lasagna.gateway.tensors import HEADER_LENGTH, InferRequest, Parameter, parse_request
from lasagna.server.served import ModelFacts, ServedModel
from lasagna.trust.evidence import CHALLENGE_MIN_BYTES
from lasagna.units import MIB

_log: Final = logging.getLogger(__name__)
_JSON: Final = "application/json"
_BINARY: Final = "application/octet-stream"
_MAX_NONCE: Final = 64
_CLOSED: Final = 499
"""Nobody reads this status: the client has gone. nginx logs it so."""
_BUSY_RETRY_S: Final = 1.0
_T = TypeVar("_T")
Handler = Callable[["_Call"], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """What one gateway takes on.

    Attributes:
        body_bytes: of any request; a model's own limit is usually lower.
        requests: answered at once; more are refused.
        uploads: requests whose bodies arrive at once; more are refused. A slow one costs a place
            here and none among ``requests``.
        body_timeout_s: for a request's body to arrive.
        answer_timeout_s: for its answer; a request's own ``timeout`` can only shorten it.
    """

    body_bytes: int = 256 * MIB
    requests: int = 128
    uploads: int = 512
    body_timeout_s: float = 60.0
    answer_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP request and the model that it names."""

    request: Request
    model: ServedModel


class Gateway:
    """The routes, over models that somebody else keeps running."""

    def __init__(self, models: Mapping[str, ServedModel], limits: GatewayLimits) -> None:
        """Look at ``models`` afresh for every request."""
        self._models = models
        self._limits = limits
        self._running = 0
        self._uploading = 0

    def routes(self) -> list[Route]:
        """The routes, each below a model also with its version."""
        found = [
            Route("/v2", self._server, methods=["GET"]),
            Route("/v2/health/live", self._live, methods=["GET"]),
            Route("/v2/health/ready", self._ready, methods=["GET"]),
        ]
        below: list[tuple[str, str, Handler]] = [
            ("", "GET", self._model),
            ("/ready", "GET", self._model_ready),
            ("/infer", "POST", self._infer),
            ("/lasagna/evidence", "GET", self._evidence),
            ("/lasagna/statistics", "GET", self._statistics),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            for path, method, handler in below:
                found.append(Route(prefix + path, self._about_a_model(handler), methods=[method]))
        return found

    async def _server(self, request: Request) -> Response:
        return _json(request, server_metadata())

    async def _live(self, request: Request) -> Response:
        return _json(request, {"live": True})

    async def _ready(self, request: Request) -> Response:
        """Ready means that all models are."""
        reasons = {
            name: f"{model.status.state}: {model.status.reason}"
            for name, model in self._models.items()
            if not model.status.ready
        }
        if not reasons:
            return _json(request, {"live": True, "ready": True})
        error = "; ".join(f"{name} is {reason}" for name, reason in reasons.items())
        body = {"live": True, "ready": False, "error": error, "models": reasons}
        return _json(request, body, status=503)

    async def _model(self, call: _Call) -> Response:
        return _json(call.request, model_metadata(call.model))

    async def _model_ready(self, call: _Call) -> Response:
        status = call.model.status
        if status.ready:
            return _json(call.request, {"name": call.model.name, "ready": True})
        error = f"{call.model.name} is {status.state}: {status.reason}"
        body = {"name": call.model.name, "ready": False, "error": error}
        return _json(call.request, body, status=503)

    async def _evidence(self, call: _Call) -> Response:
        text = call.request.query_params.get("nonce", "")
        try:
            nonce = bytes.fromhex(text)
        except ValueError:
            nonce = b""
        if not CHALLENGE_MIN_BYTES <= len(nonce) <= _MAX_NONCE:
            raise InvalidInputError(
                f"ask for evidence with ?nonce= and {CHALLENGE_MIN_BYTES} to {_MAX_NONCE} fresh "
                "random bytes in hexadecimal digits"
            )
        document = await call.model.attest(nonce, self._limits.answer_timeout_s)
        return Response(document, media_type=_JSON)

    async def _statistics(self, call: _Call) -> Response:
        statistics = await call.model.statistics(self._limits.answer_timeout_s)
        return _json(call.request, model_statistics(statistics))

    async def _infer(self, call: _Call) -> Response:
        self._require_place()  # or all of a body would be sent in vain
        body = await self._body(call)
        self._require_place()
        self._running += 1
        try:
            return await self._answer(call, body)
        finally:
            self._running -= 1

    def _require_place(self) -> None:
        if self._running >= self._limits.requests:
            raise OverloadedError(
                f"{self._running} requests are being answered, which is the limit", _BUSY_RETRY_S
            )

    async def _body(self, call: _Call) -> bytes:
        if self._uploading >= self._limits.uploads:
            raise OverloadedError(
                f"{self._uploading} requests are being received, which is the limit", _BUSY_RETRY_S
            )
        self._uploading += 1
        try:
            limit = min(self._limits.body_bytes, body_limit(call.model.facts))
            return await read_body(call.request, limit, self._limits.body_timeout_s)
        finally:
            self._uploading -= 1

    async def _answer(self, call: _Call, body: bytes) -> Response:
        model, facts = call.model, call.model.facts
        request = _parsed(call.request, body, facts)
        rows = sealed_rows(request, facts)
        check_outputs(request, facts)
        limit_s = self._limits.answer_timeout_s
        service = service_of(request.parameters, call.request.headers.getlist(TENANT), limit_s)
        timeout_s = limit_s if service.deadline_s is None else service.deadline_s
        records = await _unless_gone(call.request, model.infer(rows, timeout_s, service))
        answer, head_length = sealed_answer(request, model.name, facts, records)
        if head_length is None:
            return _encoded(call.request, answer, 200)
        return Response(answer, media_type=_BINARY, headers={HEADER_LENGTH: str(head_length)})

    def _about_a_model(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            name = _segment(request.path_params["model"])
            version = _segment(request.path_params.get("version", VERSION))
            model = self._models.get(name)
            if model is None:
                served = ", ".join(repr(name) for name in sorted(self._models)) or "none"
                raise ModelNotFoundError(f"no model {name!r} is served here; there are: {served}")
            if version != VERSION:
                raise ModelNotFoundError(
                    f"model {name!r} has no version {version!r}; it has only {VERSION!r}"
                )
            return await handler(_Call(request, model))

        return handle


def gateway_app(
    models: Mapping[str, ServedModel], limits: GatewayLimits | None = None
) -> Starlette:
    """The gateway as an ASGI application.

    Args:
        models: by the name that clients use; may change while it serves.
        limits: see ``GatewayLimits``.
    """
    return Starlette(
        routes=Gateway(models, limits or GatewayLimits()).routes(),
        middleware=[Middleware(_EscapedPath)],
        exception_handlers={
            LasagnaError: _show_error,
            HTTPException: _show_http_error,
            ClientDisconnect: _show_nothing,
            Exception: _show_bug,
        },
    )


class _EscapedPath:
    """Match routes against the path as sent, so that a model's name may hold an escaped slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("raw_path"):
            path = scope["raw_path"].partition(b"?")[0].decode("ascii", "replace")
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _segment(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ModelNotFoundError("a model's name in the path is UTF-8, percent-encoded") from None


def _parsed(request: Request, body: bytes, facts: ModelFacts) -> InferRequest:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return parse_request(body, None)
    if not text.isdecimal() or not text.isascii() or len(text) > 12:
        raise InvalidInputError(f"{HEADER_LENGTH} is {text[:20]!r}, which is not a length")
    if length := int(text):
        return parse_request(body, length)
    parameters: dict[str, Parameter] = {
        name: request.headers[name.replace("_", "-")]
        for name in (REQUEST_ID, CAPSULE)
        if name.replace("_", "-") in request.headers
    }
    return raw_request(body, parameters | header_parameters(request.headers), facts)


async def _unless_gone(request: Request, answering: Awaitable[_T]) -> _T:
    """The answer; but if the client goes away, cancel the work for it.

    Raises:
        ClientDisconnect: the client went away.
    """
    working = asyncio.ensure_future(answering)
    watching = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _json(request: Request, value: Any, status: int = 200) -> Response:
    return _encoded(request, msgspec.json.encode(value), status)


def _encoded(request: Request, body: bytes, status: int) -> Response:
    body, encoding = compress(body, request.headers.get("accept-encoding", ""))
    headers = {"Vary": "Accept-Encoding"} | ({"Content-Encoding": encoding} if encoding else {})
    return Response(body, status, headers, _JSON)


def _error(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode({"error": message}), status, headers, _JSON)


async def _show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LasagnaError)
    status = status_of(error)
    level = logging.WARNING if status >= 500 else logging.INFO
    _log.log(level, "%s %s: %d: %s", request.method, request.url.path, status, error)
    return _error(str(error), status, headers_of(error))


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(f"there is nothing at {request.url.path}", 404)
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        message = f"{request.method} is not for this path; use {' or '.join(allowed)}"
        return _error(message, 405, {"Allow": ", ".join(allowed)})
    return _error(error.detail, error.status_code, error.headers)


async def _show_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLOSED)


async def _show_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so it is logged with its traceback.
    return _error("internal error of the gateway; its log has the details", 500)
