"""A small key broker for development: it holds keys in files, and gives them to allowed enclaves.

It is called insecure because the secrets lie in plain files on an ordinary machine, and because it
is often started beside the very host that must not have them. What it checks before it releases a
key is the real thing (:mod:`lasagna.trust.grant`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lasagna.errors import EvidenceError, KeyRefusedError, UsageError
from lasagna.server.broker_state import BrokerSecrets
from lasagna.server.release import BROKER_PATH, RELEASE_PATH
from lasagna.trust.evidence import MAX_ATTESTED_BYTES
from lasagna.trust.grant import grant
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.policy import Policy
from lasagna.trust.release import KeyBundle
from lasagna.trust.verifier import UnixSeconds

_log: Final = logging.getLogger(__name__)
DEFAULT_BODY_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class InsecureBroker:
    """Keys, and who may have them.

    Attributes:
        secrets: the broker's own.
        models: keys of packages; all of them belong to one service.
        policy: which enclaves are allowed.
        insecure_allow_emulated: release to anybody who claims to be an allowed enclave.
    """

    secrets: BrokerSecrets
    models: Sequence[ModelKeys]
    policy: Policy
    insecure_allow_emulated: bool = False

    @property
    def public_key(self) -> bytes:
        """Ed25519, 32 bytes: what clients name as their trusted broker."""
        return self.secrets.signing_key.public_key().public_bytes_raw()

    def release(self, request: bytes, now: UnixSeconds) -> bytes:
        """Answer an enclave's key request.

        Raises:
            EvidenceError: its evidence does not verify.
            KeyRefusedError: there are no keys for its package.
        """
        secret = self.secrets.service_secret
        return grant(
            request,
            keys=(KeyBundle(model, secret) for model in self.models),
            broker_key=self.secrets.signing_key,
            policy=self.policy,
            now=now,
            insecure_allow_emulated=self.insecure_allow_emulated,
        )


def broker_app(
    broker: InsecureBroker, *, body_timeout_s: float = DEFAULT_BODY_TIMEOUT_S
) -> Starlette:
    """``POST /v1/release`` (key request to grant) and ``GET /v1/broker`` (the public key).

    Args:
        broker: what it answers from.
        body_timeout_s: for a key request to arrive.
    """

    async def release(request: Request) -> Response:
        body = bytearray()
        try:
            async with asyncio.timeout(body_timeout_s):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_ATTESTED_BYTES:
                        raise KeyRefusedError(
                            f"a key request has at most {MAX_ATTESTED_BYTES} bytes"
                        )
            answer = broker.release(bytes(body), UnixSeconds(int(time.time())))
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError:
            late = f"the key request did not arrive within {body_timeout_s:g} s"
            return JSONResponse({"error": late}, status_code=408)
        except (EvidenceError, KeyRefusedError) as error:
            _log.warning("keys refused: %s", error)
            return JSONResponse({"error": str(error)}, status_code=403)
        _log.info("keys released")
        return Response(answer, media_type="application/octet-stream")

    def describe(request: Request) -> Response:
        return JSONResponse(
            {
                "broker": broker.public_key.hex(),
                "packages": [model.package_id.hex() for model in broker.models],
                "insecure": True,
            }
        )

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(
            {"error": error.detail}, status_code=error.status_code, headers=error.headers
        )

    return Starlette(
        routes=[
            Route(RELEASE_PATH, release, methods=["POST"]),
            Route(BROKER_PATH, describe, methods=["GET"]),
        ],
        exception_handlers={HTTPException: refuse},
    )


def require_loopback(host: str, *, insecure_listen_anywhere: bool) -> None:
    """Refuse to offer keys to a network by accident.

    Raises:
        UsageError: the address is not this machine's own, and nobody said so by name.
    """
    if insecure_listen_anywhere or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            f"the insecure broker listens on this machine only (127.0.0.1, ::1), not on {host}: "
            "add --insecure-listen-anywhere if keys in plain files may be asked for from elsewhere"
        )
