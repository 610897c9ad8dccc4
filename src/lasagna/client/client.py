"""The clients: plaintext on this side, sealed bytes on the other."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
from numpy.typing import ArrayLike

from lasagna.client.flow import Ask, Flow, Reply, Session, Trust, Wish
from lasagna.client.sealing import Array
from lasagna.errors import ServiceError, UsageError
from lasagna.gateway.metadata import ModelMetadata
from lasagna.trust.policy import Policy
from lasagna.trust.verifier import UnixSeconds

_T = TypeVar("_T")
_PLAIN: Final = {"Accept-Encoding": "identity"}  # ciphertext does not get shorter
_KEY_BYTES: Final = 32


class Client:
    """Runs models in enclaves that it has verified. Threads may share it.

    Example:
        ::

            client = Client(
                "http://edge:8000",
                policy=MeasurementIn(frozenset({bytes.fromhex("...")})),
                brokers=[bytes.fromhex("...")],
            )
            probabilities = client.infer("squeezenet", {"data_0": image})["softmaxout_1"]
    """

    def __init__(
        self,
        url: str,
        *,
        policy: Policy,
        brokers: Collection[bytes],
        digests: Mapping[str, bytes] | None = None,
        insecure_allow_emulated: bool = False,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is sent before the first call.

        Args:
            url: of the server, such as ``http://edge:8000``. It needn't be HTTPS: all that matters
                is sealed for the enclave, beyond the server's own end of TLS.
            policy: which enclaves may read the inputs.
            brokers: Ed25519 public keys (32 bytes) of the key brokers that are trusted.
            digests: SHA-256 of packages' signed manifests, by the models' names: without it the
                server chooses which of the broker's models answers.
            insecure_allow_emulated: accept enclaves that protect nothing.
            timeout_s: for each request.
            transport: how to send; httpx's own if None.

        Raises:
            UsageError: the URL, a key or the timeout is not one.
        """
        self._session = _session(policy, brokers, digests, insecure_allow_emulated, timeout_s)
        self._http = httpx.Client(
            base_url=_checked_url(url), timeout=timeout_s, headers=_PLAIN, transport=transport
        )

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        tenant: str = "",
    ) -> dict[str, Array]:
        """Run a model.

        Args:
            model: its name.
            inputs: arrays by the name of the input, each of shape [rows, ...] and of exactly the
                element type that the model takes.
            priority: as Triton counts: 1 goes first, 9 last, 0 is the default (the same as 5).
            timeout_s: seconds after which the answer is worth nothing; a server that can't keep
                to it refuses at once. The client's own if None. What verifying the enclave takes
                before the first request is not in it.
            tenant: whose request it is, where no proxy in front of the server says that.

        Returns:
            Arrays by the name of the output, each of shape [rows, ...].

        Raises:
            UsageError: priority, timeout or tenant can't be; nothing was sent.
            InvalidInputError: an input's name, shape or element type is wrong; nothing was sent.
            EvidenceError: the server is not an enclave that the policy allows; nothing was sent.
            RecordError: the answer was changed on its way.
            OverloadedError: the server asks to try again later.
            ServiceError: the server answers with an error, or not at all (status 0).
        """
        wish = Wish(priority=priority, timeout_s=timeout_s, tenant=tenant)
        return self._run(self._session.infer(model, inputs, wish))

    def metadata(self, model: str) -> ModelMetadata:
        """The server's word for a model's inputs and outputs; nothing is verified.

        Raises:
            ServiceError: the server answers with an error, or not at all (status 0).
        """
        return self._run(self._session.metadata(model))

    def statistics(self, model: str) -> dict[str, Any]:
        """The server's word for how the model's enclave has fared since it was started.

        Returns:
            Counters (sizes in bytes, times in seconds), ``budget_bytes``, and the ``plan`` of how
            they are spent (see docs/reference/http.md).

        Raises:
            ServiceError: the server answers with an error, or not at all (status 0).
        """
        return self._run(self._session.statistics(model))

    def verify(self, model: str) -> None:
        """Verify the enclave that serves a model; ``infer`` does it by itself.

        Raises:
            EvidenceError: it is not an enclave that the policy allows.
            ServiceError: the server answers with an error, or not at all (status 0).
        """
        self._run(self._session.verify(model))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, flow: Flow[_T]) -> _T:
        reply: Reply | None = None
        while True:
            try:
                ask = next(flow) if reply is None else flow.send(reply)
            except StopIteration as end:
                result: _T = end.value
                return result
            reply = self._send(ask)

    def _send(self, ask: Ask) -> Reply:
        try:
            with self._http.stream(
                ask.method,
                ask.path,
                content=bytes(ask.body) or None,
                headers=ask.headers,
                timeout=self._http.timeout if ask.timeout_s is None else ask.timeout_s,
            ) as answer:
                body = bytearray()
                for part in answer.iter_raw():
                    body += part
                    _require_short(body, ask)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from None
        return _reply(answer, body)


class AsyncClient:
    """As ``Client``, for asyncio."""

    def __init__(
        self,
        url: str,
        *,
        policy: Policy,
        brokers: Collection[bytes],
        digests: Mapping[str, bytes] | None = None,
        insecure_allow_emulated: bool = False,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Arguments and errors as of ``Client``."""
        self._session = _session(policy, brokers, digests, insecure_allow_emulated, timeout_s)
        self._http = httpx.AsyncClient(
            base_url=_checked_url(url), timeout=timeout_s, headers=_PLAIN, transport=transport
        )

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        tenant: str = "",
    ) -> dict[str, Array]:
        """Run a model; see ``Client.infer``."""
        wish = Wish(priority=priority, timeout_s=timeout_s, tenant=tenant)
        return await self._run(self._session.infer(model, inputs, wish))

    async def metadata(self, model: str) -> ModelMetadata:
        """The server's word for a model; see ``Client.metadata``."""
        return await self._run(self._session.metadata(model))

    async def statistics(self, model: str) -> dict[str, Any]:
        """How the model's enclave has fared; see ``Client.statistics``."""
        return await self._run(self._session.statistics(model))

    async def verify(self, model: str) -> None:
        """Verify the enclave that serves a model; see ``Client.verify``."""
        await self._run(self._session.verify(model))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[_T]) -> _T:
        reply: Reply | None = None
        while True:
            try:
                ask = next(flow) if reply is None else flow.send(reply)
            except StopIteration as end:
                result: _T = end.value
                return result
            reply = await self._send(ask)

    async def _send(self, ask: Ask) -> Reply:
        try:
            async with self._http.stream(
                ask.method,
                ask.path,
                content=bytes(ask.body) or None,
                headers=ask.headers,
                timeout=self._http.timeout if ask.timeout_s is None else ask.timeout_s,
            ) as answer:
                body = bytearray()
                async for part in answer.aiter_raw():
                    body += part
                    _require_short(body, ask)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from None
        return _reply(answer, body)


def _session(
    policy: Policy,
    brokers: Collection[bytes],
    digests: Mapping[str, bytes] | None,
    insecure_allow_emulated: bool,
    timeout_s: float,
) -> Session:
    for broker in brokers:
        if len(broker) != _KEY_BYTES:
            raise UsageError(f"a broker's public key has {_KEY_BYTES} bytes, not {len(broker)}")
    if not brokers:
        raise UsageError("name the key broker whose services are trusted")
    trust = Trust(
        policy=policy,
        brokers=frozenset(brokers),
        digests=dict(digests or {}),
        insecure_allow_emulated=insecure_allow_emulated,
    )
    return Session(
        trust, entropy=os.urandom, now=lambda: UnixSeconds(int(time.time())), timeout_s=timeout_s
    )


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url!r} is not the URL of a server: write it like http://edge:8000")
    return parsed


def _require_short(body: bytearray, ask: Ask) -> None:
    if len(body) > ask.limit:
        raise ServiceError(
            f"the server's answer to {ask.path.partition('?')[0]} is longer than {ask.limit} "
            "bytes, which none that is right is",
            200,
        )


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> ServiceError:
    reason = str(error) or type(error).__name__
    hint = "; is lasagna serve running there?" if isinstance(error, httpx.ConnectError) else ""
    return ServiceError(f"the server at {url} can't be reached: {reason}{hint}", 0)


def _reply(answer: httpx.Response, body: bytearray) -> Reply:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Reply(answer.status_code, headers, bytes(body))
