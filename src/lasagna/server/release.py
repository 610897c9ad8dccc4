"""Carrying an enclave's key request to the key broker, and the broker's answer back.

The host sees an X25519 public key go by, evidence, and sealed bytes.
"""

from __future__ import annotations

from typing import Final, Protocol

import httpx
import msgspec

from lasagna.errors import KeyRefusedError, ServiceError
from lasagna.units import KIB

RELEASE_PATH: Final = "/v1/release"
BROKER_PATH: Final = "/v1/broker"
_MAX_ANSWER: Final = 16 * KIB
_SHOWN: Final = 1000


class KeyRelay(Protocol):
    """The way to a key broker."""

    async def release(self, request: bytes) -> bytes:
        """Have an enclave's key request answered.

        Raises:
            KeyRefusedError: the broker refuses; asking again won't help.
            ServiceError: the broker can't be reached or failed; it may be different later.
        """
        ...


class BrokerRelay:
    """The way to a key broker over HTTP."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        """Nothing is sent before the first request.

        Args:
            url: of the broker, without a path.
            timeout_s: how long it may take to answer.
        """
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s

    async def release(self, request: bytes) -> bytes:
        """Post a key request. Neither it nor the answer needs TLS.

        Raises:
            KeyRefusedError: the broker refuses (4xx).
            ServiceError: it can't be reached (status 0), or failed (5xx).
        """
        return await self._ask("POST", RELEASE_PATH, request)

    async def public_key(self) -> bytes:
        """What the broker says its public key is, to show to people: nobody has verified it.

        Raises:
            KeyRefusedError: the broker doesn't tell (4xx).
            ServiceError: it can't be reached (status 0), failed (5xx), or is no broker of ours.
        """
        body = await self._ask("GET", BROKER_PATH, b"")
        try:
            return bytes.fromhex(msgspec.json.decode(body, type=_Description).broker)
        except ValueError:
            raise ServiceError(f"at {self._url} is something else than a key broker", 0) from None

    async def _ask(self, method: str, path: str, content: bytes) -> bytes:
        body = bytearray()
        try:
            # Proxies of the environment are for the user's browser, not for a daemon.
            async with (
                httpx.AsyncClient(timeout=self._timeout_s, trust_env=False) as client,
                client.stream(
                    method,
                    self._url + path,
                    content=content,
                    headers={"Accept-Encoding": "identity"},
                ) as answer,
            ):
                async for part in answer.aiter_raw():
                    body += part
                    if len(body) > _MAX_ANSWER:
                        raise ServiceError(f"the key broker at {self._url} answers too much", 0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ServiceError(
                f"the key broker at {self._url} can't be reached: {reason}", 0
            ) from None
        status = answer.status_code
        if status == httpx.codes.OK:
            return bytes(body)
        message = f"the key broker at {self._url} answers {status}: {_reason(bytes(body))}"
        if httpx.codes.is_client_error(status):
            raise KeyRefusedError(message)
        raise ServiceError(message, status)


class _Description(msgspec.Struct):
    broker: str


class _ErrorBody(msgspec.Struct):
    error: str = ""


def _reason(body: bytes) -> str:
    try:
        reason = msgspec.json.decode(body, type=_ErrorBody).error
    except ValueError:  # msgspec's errors, and UnicodeDecodeError
        reason = ""
    return reason[:_SHOWN] or "no reason given"
