"""A host with its enclave, its key broker and sealed requests, in one process: for benchmarks.

Everything between a gateway and the enclave is the real thing; there is no HTTP. It is insecure
because one process holds all keys.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from lasagna.client.sealing import Service, seal_call
from lasagna.enclave.messages import SealedRows
from lasagna.errors import LasagnaError
from lasagna.gateway.metadata import model_metadata
from lasagna.gateway.sealed import sealed_rows
from lasagna.gateway.tensors import parse_request
from lasagna.server.broker import InsecureBroker
from lasagna.server.broker_state import BrokerSecrets
from lasagna.server.host import EnclaveHost
from lasagna.server.lifecycle import HostConfig
from lasagna.server.served import State
from lasagna.tee.backend import EnclaveBackend
from lasagna.tee.emulated import EmulatedEnclave
from lasagna.tee.epc import stats_folder
from lasagna.tee.epc_stats import StatsFile, stats_path
from lasagna.tee.measurement import measure_code, source_root
from lasagna.trust.evidence import decode_attested
from lasagna.trust.keys import SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.verifier import UnixSeconds, verify_service

Array = NDArray[Any]
NOW: Final = UnixSeconds(0)
START_S: Final = 120.0
ASK_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A package, the keys that open it, and the inputs of its requests.

    Attributes:
        name: of the model.
        package: file.
        keys: that open it.
        inputs: of one request of one row.
    """

    name: str
    package: Path
    keys: ModelKeys
    inputs: Mapping[str, Array]


class Served:
    """An ``EnclaveHost`` that is ready, and one sealed request for each of its models.

    Use as an asynchronous context manager.

    Attributes:
        host: asks and answers.
        requests: by model.
    """

    def __init__(
        self,
        models: Sequence[SealedModel],
        config: HostConfig,
        backend: EnclaveBackend,
        socket_dir: Path,
    ) -> None:
        """Nothing is started."""
        self._models = models
        secrets = BrokerSecrets(Ed25519PrivateKey.generate(), _secret())
        self._policy = MeasurementIn(frozenset([measure_code(source_root())]))
        self._broker = InsecureBroker(secrets, [one.keys for one in models], self._policy, True)
        self.host = EnclaveHost(
            [one.package for one in models], config, backend, _Relay(self._broker), socket_dir
        )
        self.requests: dict[str, SealedRows] = {}

    async def __aenter__(self) -> Self:
        await self.host.__aenter__()
        try:
            async with asyncio.timeout(START_S):
                for model in self._models:
                    status = await self.host.models[model.name].settled()
                    if status.state is not State.READY:
                        raise LasagnaError(f"{model.name}: {status.reason}")
                    self.requests[model.name] = await self._seal(model)
        except BaseException:
            await self.host.stop(0.0)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.host.stop(0.0)

    async def _seal(self, model: SealedModel) -> SealedRows:
        hosted = self.host.models[model.name]
        nonce = os.urandom(16)
        document = decode_attested(await hosted.attest(nonce, ASK_S))
        claims = verify_service(
            document.evidence,
            document.claims,
            policy=self._policy,
            brokers={self._broker.public_key},
            now=NOW,
            nonce=nonce,
            insecure_allow_emulated=True,
        )
        service = Service(model_metadata(hosted).lasagna, claims.public_key)
        call = seal_call(service, model.inputs, os.urandom, {})
        return sealed_rows(parse_request(call.body, call.json_bytes), hosted.facts)

    async def infer(self, model: str, timeout_s: float = ASK_S) -> None:
        """Answer the model's request once."""
        await self.host.models[model].infer(self.requests[model], timeout_s)

    @property
    def epc(self) -> StatsFile | None:
        """The emulator's statistics of the enclave, if there is an emulator."""
        process = self.host.process
        if not isinstance(process, EmulatedEnclave):
            return None
        return StatsFile(stats_path(stats_folder(), process.pid))


class _Relay:
    """The way to a broker in this process."""

    def __init__(self, broker: InsecureBroker) -> None:
        self._broker = broker

    async def release(self, request: bytes) -> bytes:
        return self._broker.release(request, NOW)


def _secret() -> ServiceSecret:
    return ServiceSecret(SecretKey(os.urandom(32)))
