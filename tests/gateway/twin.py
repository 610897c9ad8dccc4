"""An enclave in memory: implements ``served.ServedModel`` with the production's cryptography.

So gateway and client run unchanged against it, without processes; what it computes is a function.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import convert
from numpy.typing import NDArray

from lasagna.enclave.messages import SealedRows, Stats
from lasagna.errors import LasagnaError, RecordError
from lasagna.package.format import TensorSpec
from lasagna.server.plan_facts import PlanFacts, StageFacts
from lasagna.server.served import (
    DEFAULT_SERVICE,
    ModelFacts,
    ServiceClass,
    State,
    Statistics,
    Status,
)
from lasagna.trust.evidence import InsecureEmulatedQuoter, ServiceClaims, attest
from lasagna.trust.keys import Direction, SecretKey, ServiceKeys, ServiceSecret, service_keys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.records import RecordContext, open_record_into, seal_record
from lasagna.trust.request import RequestScope, open_capsule
from lasagna.units import Bytes

Array = NDArray[Any]
COUNTERS: Final = tuple(name for name in Stats.__struct_fields__ if name != "id")
Compute = Callable[[Mapping[str, Array]], Mapping[str, Array]]

MEASUREMENT: Final = b"m" * 32
POLICY: Final = MeasurementIn(frozenset({MEASUREMENT}))
BROKER: Final = Ed25519PrivateKey.from_private_bytes(b"b" * 32).public_key().public_bytes_raw()

INPUT: Final = TensorSpec("x", "float32", (1, 3))
OUTPUT: Final = TensorSpec("y", "float32", (1, 3))


def doubled(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"y": inputs["x"] * np.float32(2)}


class TwinModel:
    """A model whose enclave is this object."""

    def __init__(
        self,
        name: str = "twin",
        *,
        inputs: tuple[TensorSpec, ...] = (INPUT,),
        outputs: tuple[TensorSpec, ...] = (OUTPUT,),
        compute: Compute = doubled,
        batchable: bool = True,
        digest: bytes = b"d" * 32,
        secret: bytes = b"s" * 32,
        max_rows: int = 4,
    ) -> None:
        self.name = name
        self.status = Status(State.READY)
        self.error: LasagnaError | None = None
        self.gate: asyncio.Event | None = None
        self.arrived = asyncio.Event()
        self.seen: list[SealedRows] = []
        self.timeouts: list[float] = []
        self.services: list[ServiceClass] = []
        self.cancelled = 0
        self.measurement = MEASUREMENT
        self._compute = compute
        self._max_rows = max_rows if batchable else 1
        self._inputs, self._outputs, self._batchable = inputs, outputs, batchable
        self._service: ServiceKeys
        self.replace(digest, secret)

    def replace(self, digest: bytes, secret: bytes) -> None:
        """As if the server had been started again with another package or another secret."""
        self._service = service_keys(ServiceSecret(SecretKey(secret)))
        self.facts = ModelFacts(
            digest,
            self._inputs,
            self._outputs,
            self._batchable,
            plan_of(self._max_rows),
            self._max_rows,
        )

    async def attest(self, nonce: bytes, timeout_s: float) -> bytes:
        claims = ServiceClaims(1, self._service.public_key, BROKER, nonce)
        return attest(claims, InsecureEmulatedQuoter(self.measurement, bytes(32)))

    async def statistics(self, timeout_s: float) -> Statistics:
        if self.error is not None:
            raise self.error
        plan = self.facts.plan
        assert plan is not None
        return Statistics(
            Bytes(1000),
            plan,
            convert({"type": "stats", "id": 7} | dict.fromkeys(COUNTERS, 3), Stats),
            Bytes(5000),
        )

    async def infer(
        self, request: SealedRows, timeout_s: float, service: ServiceClass = DEFAULT_SERVICE
    ) -> tuple[tuple[bytes, ...], ...]:
        self.seen.append(request)
        self.timeouts.append(timeout_s)
        self.services.append(service)
        self.arrived.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return self._answer(request)

    def _answer(self, request: SealedRows) -> tuple[tuple[bytes, ...], ...]:
        scope = RequestScope(
            service_id=self._service.service_id,
            model_digest=self.facts.digest,
            request_id=request.request_id,
        )
        keys = open_capsule(self._service, scope, request.capsule)
        arrays: dict[str, Array] = {}
        for spec, records in zip(self._inputs, request.records, strict=True):
            if len(records) != request.rows:
                raise RecordError("rows are missing")
            context = RecordContext.of(scope, Direction.INPUT, spec, request.rows)
            plain = bytearray(spec.row_bytes * request.rows)
            for row, record in enumerate(records):
                place = memoryview(plain)[row * spec.row_bytes : (row + 1) * spec.row_bytes]
                open_record_into(keys.input, context, row, bytes(record), place)
            arrays[spec.name] = np.frombuffer(plain, spec.dtype).reshape(spec.shape(request.rows))
        outputs = self._compute(arrays)
        sealed = []
        for spec in self._outputs:
            rows = np.ascontiguousarray(outputs[spec.name]).reshape(request.rows, -1)
            context = RecordContext.of(scope, Direction.OUTPUT, spec, request.rows)
            sealed.append(
                tuple(
                    seal_record(keys.output, context, row, values.tobytes(), os.urandom(12))
                    for row, values in enumerate(rows)
                )
            )
        return tuple(sealed)


def plan_of(max_rows: int) -> PlanFacts:
    return PlanFacts(
        variant="portable",
        form="sliced",
        slices=1,
        stages=(StageFacts(0, 1, max_rows),),
        pinned_slices=(0,),
        weight_bytes=1000,
        pinned_bytes=1000,
        max_batch=max_rows,
        ring_slots=0,
        slot_bytes=0,
        activation_bytes=10,
        input_bytes=20,
        staging_bytes=30,
        workspace_bytes=40,
        waiting_bytes=0,
        total_bytes=1100,
    )
