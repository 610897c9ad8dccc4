"""What a client does, step by step, without doing it: generators that yield requests.

Whoever runs one sends each ``Ask`` and hands in its ``Reply``; the generator's value is the result.
So the synchronous and the asynchronous client share every decision, and tests need no server.

To infer:

1. Ask for the model's metadata: the server's word for digest, inputs and outputs.
2. Compare the digest with the one that the user has pinned, if any.
3. Ask for evidence with a fresh nonce, and verify it: an allowed enclave, with a secret of a
   trusted broker, holds the private key of the service's public key.
4. Check the arrays, seal them to that key, send them, open the answer.

Steps 1 to 3 are done once for a model. If a later request is refused as it might be after the
server was started with another package or another secret, they are repeated; and if something has
changed, so is step 4, once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
from numpy.typing import ArrayLike

from lasagna.client.sealing import Array, Entropy, Service, seal_call
from lasagna.errors import (
    EvidenceError,
    InvalidInputError,
    OverloadedError,
    ServiceError,
    UsageError,
)
from lasagna.gateway.metadata import ModelMetadata
from lasagna.gateway.service_class import PRIORITY, TENANT, TIMEOUT, check_tenant, priority_of
from lasagna.gateway.tensors import HEADER_LENGTH, Parameter
from lasagna.trust.evidence import MAX_ATTESTED_BYTES, decode_attested
from lasagna.trust.policy import Policy
from lasagna.trust.verifier import UnixSeconds, verify_service
from lasagna.units import MIB

_OK: Final = 200
_OUTDATED: Final = (400, 404)
"""How a request is refused that was sealed for what is no longer there."""
_UNAVAILABLE: Final = 503
_MAX_METADATA: Final = MIB
_NONCE_BYTES: Final = 32
_SHOWN: Final = 2000
_MAX_TIMEOUT_S: Final = 1e6
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send.

    Attributes:
        method: GET or POST.
        path: with its query, to be put behind the server's URL.
        limit: bytes of the answer's body that are read at most.
        body: to send.
        headers: to send.
        timeout_s: seconds to wait for the answer; None for as long as the client always does.
    """

    method: str
    path: str
    limit: int
    body: bytes | bytearray = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an ``Ask``; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Flow: TypeAlias = Generator[Ask, Reply, _T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom a client believes.

    Attributes:
        policy: which enclaves may read its inputs.
        brokers: public keys of the key brokers whose services it trusts.
        digests: of packages, by the model's name. The server says which package it serves; whoever
            doesn't pin the digest leaves it to the server which of the broker's models answers.
        insecure_allow_emulated: accept evidence that anyone can write. It protects nothing.
    """

    policy: Policy
    brokers: AbstractSet[bytes]
    digests: Mapping[str, bytes] = field(default_factory=dict)
    insecure_allow_emulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a request would like to be served; the server reads it, and may believe it.

    Attributes:
        priority: as Triton counts: 1 goes first, 9 last, 0 is the default (the same as 5).
        timeout_s: seconds from its arrival at the server after which nobody waits for the answer;
            a server that can't keep to it refuses at once. None for the client's own.
        tenant: whose request it is; a proxy between may know better.
    """

    priority: int = 0
    timeout_s: float | None = None
    tenant: str = ""

    def check(self) -> None:
        """See that a server would take it.

        Raises:
            UsageError: with the first thing found wrong.
        """
        try:
            priority_of(self.priority)
            check_tenant(self.tenant)
        except InvalidInputError as error:
            raise UsageError(str(error)) from None
        if self.timeout_s is not None:
            check_timeout(self.timeout_s)


def check_timeout(timeout_s: float) -> None:
    """See that it is a time to wait.

    Raises:
        UsageError: it is not.
    """
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise UsageError(
            f"a timeout is more than 0 and at most {_MAX_TIMEOUT_S:,.0f} seconds, not {timeout_s:g}"
        )


class Session:
    """What a client knows of one server, and the flows that use it."""

    def __init__(
        self, trust: Trust, *, entropy: Entropy, now: Callable[[], UnixSeconds], timeout_s: float
    ) -> None:
        """Know nothing yet.

        Args:
            trust: whom to believe.
            entropy: ``os.urandom``.
            now: the time.
            timeout_s: told to the server, so that it doesn't work for nobody.

        Raises:
            UsageError: the timeout is not one.
        """
        check_timeout(timeout_s)
        self._trust = trust
        self._entropy = entropy
        self._now = now
        self._timeout_s = timeout_s
        self._services: dict[str, Service] = {}

    def metadata(self, model: str) -> Flow[ModelMetadata]:
        """The server's word for what the model is."""
        reply = yield Ask("GET", _path(model), _MAX_METADATA)
        _require_ok(reply)
        try:
            return _METADATA.decode(reply.body)
        except (ValueError, RecursionError) as error:
            raise ServiceError(
                f"the server's metadata of {model!r} is not Lasagna's: {error}", reply.status
            ) from None

    def statistics(self, model: str) -> Flow[dict[str, Any]]:
        """The server's word for how its enclave has fared."""
        reply = yield Ask("GET", _path(model) + "/lasagna/statistics", _MAX_METADATA)
        _require_ok(reply)
        try:
            return _STATISTICS.decode(reply.body)
        except (ValueError, RecursionError) as error:
            raise ServiceError(
                f"the server's statistics of {model!r} are malformed: {error}", reply.status
            ) from None

    def verify(self, model: str) -> Flow[Service]:
        """Steps 1 to 3: find out who serves the model, and believe it or raise."""
        # 1. The server's word.
        metadata = yield from self.metadata(model)
        facts = metadata.lasagna
        # 2. The pinned digest.
        pinned = self._trust.digests.get(model)
        if pinned is not None and pinned.hex() != facts.model_digest:
            raise EvidenceError(
                f"the server serves package {facts.model_digest} as {model!r}; "
                f"pinned is {pinned.hex()}"
            )
        # 3. Evidence.
        nonce = self._entropy(_NONCE_BYTES)
        path = f"{_path(model)}/lasagna/evidence?nonce={nonce.hex()}"
        reply = yield Ask("GET", path, MAX_ATTESTED_BYTES)
        _require_ok(reply)
        attested = decode_attested(reply.body)
        claims = verify_service(
            attested.evidence,
            attested.claims,
            policy=self._trust.policy,
            brokers=self._trust.brokers,
            now=self._now(),
            nonce=nonce,
            insecure_allow_emulated=self._trust.insecure_allow_emulated,
        )
        service = Service(facts, claims.public_key)
        self._services[model] = service
        return service

    def infer(
        self, model: str, inputs: Mapping[str, ArrayLike], wish: Wish | None = None
    ) -> Flow[dict[str, Array]]:
        """All steps."""
        wish = wish or Wish()
        wish.check()
        known = self._services.get(model)
        if known is None:
            service = yield from self.verify(model)
            return (yield from self._send(model, service, inputs, wish))
        try:
            return (yield from self._send(model, known, inputs, wish))
        except (InvalidInputError, ServiceError) as error:
            if isinstance(error, ServiceError) and error.status not in _OUTDATED:
                raise
            service = yield from self.verify(model)
            if service == known:
                raise
        return (yield from self._send(model, service, inputs, wish))

    def _send(
        self, model: str, service: Service, inputs: Mapping[str, ArrayLike], wish: Wish
    ) -> Flow[dict[str, Array]]:
        # 4. Check, seal, send, open.
        timeout_s = self._timeout_s if wish.timeout_s is None else wish.timeout_s
        parameters: dict[str, Parameter] = {TIMEOUT: max(1, round(timeout_s * 1_000_000))}
        if wish.priority:
            parameters[PRIORITY] = wish.priority
        call = seal_call(service, inputs, self._entropy, parameters)
        headers = {
            HEADER_LENGTH: str(call.json_bytes),
            "Content-Type": "application/octet-stream",
        }
        if wish.tenant:
            headers[TENANT] = wish.tenant
        path = _path(model) + "/infer"
        reply = yield Ask("POST", path, call.answer_limit, call.body, headers, timeout_s)
        _require_ok(reply)
        length = reply.headers.get(HEADER_LENGTH.lower(), "")
        json_bytes = int(length[:12]) if length.isascii() and length.isdecimal() else None
        return call.open(reply.body, json_bytes)


class _ErrorBody(msgspec.Struct):
    error: str


_STATISTICS: Final[msgspec.json.Decoder[dict[str, Any]]] = msgspec.json.Decoder(dict[str, Any])
_METADATA: Final = msgspec.json.Decoder(ModelMetadata)
_ERROR: Final = msgspec.json.Decoder(_ErrorBody)


def _path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


def _require_ok(reply: Reply) -> None:
    """Raise what a server says when it doesn't answer.

    Raises:
        OverloadedError: it says when to try again.
        ServiceError: any other error.
    """
    if reply.status == _OK:
        return
    try:
        reason = _ERROR.decode(reply.body).error[:_SHOWN]
    except (ValueError, RecursionError):
        reason = "no reason given"
    message = f"the server answers {reply.status}: {reason}"
    seconds = reply.headers.get("retry-after", "")
    if reply.status == _UNAVAILABLE and seconds.isascii() and seconds.isdecimal():
        raise OverloadedError(message, float(seconds[:9]))
    raise ServiceError(message, reply.status)
