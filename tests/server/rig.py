"""A host over real enclave processes, and a client's half of its requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasagna.client.sealing import SealedCall, Service, seal_call
from lasagna.enclave.messages import SealedRows
from lasagna.errors import EvidenceError, KeyRefusedError, LasagnaError
from lasagna.gateway.metadata import model_metadata
from lasagna.gateway.sealed import sealed_answer, sealed_rows
from lasagna.gateway.tensors import parse_request
from lasagna.server.broker import InsecureBroker
from lasagna.server.host import EnclaveHost
from lasagna.server.lifecycle import HostConfig
from lasagna.server.served import State
from lasagna.tee.backend import EnclaveSpec
from lasagna.tee.process import ChildProcess, InsecureProcessBackend
from lasagna.trust.evidence import decode_attested
from lasagna.trust.verifier import UnixSeconds, verify_service
from lasagna.units import MIB, Bytes

Array = NDArray[Any]
NOW = UnixSeconds(0)
DEADLINE_S = 30.0


class Backend(InsecureProcessBackend):
    """The real backend; remembers what it has started."""

    def __init__(self) -> None:
        self.started: list[ChildProcess] = []

    async def start(self, spec: EnclaveSpec) -> ChildProcess:
        self.started.append(await super().start(spec))
        return self.started[-1]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the enclave that runs now."""
        os.kill(self.started[-1].pid, number)


class Relay:
    """The way to a broker in this process, which may fail first."""

    def __init__(self, broker: InsecureBroker, failures: Sequence[LasagnaError] = ()) -> None:
        self.broker = broker
        self.failures = list(failures)

    async def release(self, request: bytes) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        try:
            return self.broker.release(request, NOW)
        except EvidenceError as error:  # over HTTP it is a 403 like the other
            raise KeyRefusedError(str(error)) from None


class Rig:
    """A host, what moves it, and a client of it."""

    def __init__(
        self, enclave: EnclaveHost, backend: Backend, relay: Relay, name: str = ""
    ) -> None:
        self.enclave = enclave
        self.host = enclave.models[name] if name else next(iter(enclave.models.values()))
        self.backend = backend
        self.relay = relay
        self.broker = relay.broker

    async def service(self) -> Service:
        document = decode_attested(await self.host.attest(b"n" * 16, DEADLINE_S))
        claims = verify_service(
            document.evidence,
            document.claims,
            policy=self.broker.policy,
            brokers={self.broker.public_key},
            now=NOW,
            nonce=b"n" * 16,
            insecure_allow_emulated=True,
        )
        return Service(model_metadata(self.host).lasagna, claims.public_key)

    async def seal(self, inputs: dict[str, Array]) -> tuple[SealedCall, SealedRows]:
        call = seal_call(await self.service(), inputs, os.urandom, {})
        return call, sealed_rows(parse_request(call.body, call.json_bytes), self.host.facts)

    async def infer(self, inputs: dict[str, Array], timeout_s: float = DEADLINE_S) -> Array:
        return await self.answer(await self.seal(inputs), timeout_s)

    async def answer(
        self, sealed: tuple[SealedCall, SealedRows], timeout_s: float = DEADLINE_S
    ) -> Array:
        call, rows = sealed
        records = await self.host.infer(rows, timeout_s)
        request = parse_request(call.body, call.json_bytes)
        body, length = sealed_answer(request, self.host.name, self.host.facts, records)
        (output,) = call.open(body, length).values()
        return output

    async def until(self, state: State) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.host.until(state)


@contextlib.asynccontextmanager
async def hosting(
    package: Path | Sequence[Path],
    broker: InsecureBroker,
    folder: Path,
    *,
    failures: Sequence[LasagnaError] = (),
    **changes: Any,
) -> AsyncIterator[Rig]:
    backend = Backend()
    config = HostConfig(**({"budget": Bytes(64 * MIB), "exit_timeout_s": 2.0} | changes))
    sockets = folder / "sockets"
    sockets.mkdir(mode=0o700, exist_ok=True)
    relay = Relay(broker, failures)
    packages = [package] if isinstance(package, Path) else package
    host = EnclaveHost(packages, config, backend, relay, sockets)
    async with host:
        async with asyncio.timeout(DEADLINE_S):
            for model in host.models.values():
                await model.settled()
        yield Rig(host, backend, relay)
    assert all(gone(enclave.pid) for enclave in backend.started)
    assert list(sockets.iterdir()) == []


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def dispatched() -> None:
    """Let everything run that does not wait for the outside."""
    for _ in range(10):
        await asyncio.sleep(0)


def noise(rows: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random((rows, 3, 224, 224), np.float32)
