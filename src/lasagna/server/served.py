"""What a gateway sees of a model, whoever serves it: one host here, a cluster later."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from lasagna.enclave.messages import SealedRows, Stats
from lasagna.package.format import TensorSpec
from lasagna.policy.predictions import PredictionErrors
from lasagna.server.plan_facts import PlanFacts
from lasagna.units import Bytes


class State(StrEnum):
    """How a served model is."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Status:
    """A state and, unless it is READY, its reason in words."""

    state: State
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self.state is State.READY


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What anybody may know of a model.

    Attributes:
        digest: SHA-256 of the package's signed manifest, 32 bytes.
        inputs: its inputs in order.
        outputs: its outputs in order.
        batchable: whether a request may have more than one row.
        plan: how it was fitted into the enclave; None before it was loaded the first time.
        max_rows: that one request may have, and one batch.
    """

    digest: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool
    plan: PlanFacts | None = None
    max_rows: int = 1


@dataclass(frozen=True, slots=True)
class Statistics:
    """How the enclave that runs now has fared.

    Attributes:
        budget_bytes: of enclave memory.
        plan: how it is spent.
        counters: since the enclave was started.
        process_peak_bytes: most memory of its process that was resident at once, by the kernel's
            count; 0 if nobody can tell. The budget is a part of it only.
        prediction_errors: how far the scheduler's predictions of a run's times were off of late.
    """

    budget_bytes: Bytes
    plan: PlanFacts
    counters: Stats
    process_peak_bytes: Bytes
    prediction_errors: PredictionErrors = field(default_factory=PredictionErrors)


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """How a request is to be served, by its sender's word. None of it is authenticated.

    Attributes:
        tenant: whose it is, among whom a server is shared fairly; empty for nobody in particular.
        priority: higher goes first. From a gateway it is -4 to 4: Triton counts its levels from 1,
            which goes first, and 9 of them have their default in the middle, here 0.
        deadline_s: seconds from arrival within which the answer is worth something; None for no
            limit. Above 0.
    """

    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None


STARTING_RETRY_S: Final = 1.0
"""When to try again a model that is being started."""
DEFAULT_SERVICE: Final = ServiceClass()
"""Of a request that doesn't say."""


class ServedModel(Protocol):
    """A model that answers sealed requests."""

    @property
    def name(self) -> str:
        """What clients call it."""
        ...

    @property
    def status(self) -> Status:
        """How it is now."""
        ...

    @property
    def facts(self) -> ModelFacts:
        """What anybody may know of it."""
        ...

    async def infer(
        self, request: SealedRows, timeout_s: float, service: ServiceClass = DEFAULT_SERVICE
    ) -> tuple[tuple[bytes, ...], ...]:
        """Answer one request. A cancelled call leaves the queue.

        A model with more work than it can hold refuses at once rather than to let everybody wait,
        and so it does with a request that can't be answered before its deadline: both are an
        ``OverloadedError`` with the time after which the queue has probably gone down.

        Args:
            request: to answer.
            timeout_s: how long the caller waits.
            service: who goes first, and what is not worth beginning.

        Returns:
            Sealed records by output and row.

        Raises:
            InvalidInputError: it has more rows than the model takes.
            TrustError: its capsule or a record does not open in the enclave.
            OverloadedError: the queue is full, the deadline can't be met, or the time was too
                short.
            EnclaveLostError: the enclave died with it twice.
            LasagnaError: why the model can't be served, if it has failed.
        """
        ...

    async def attest(self, nonce: bytes, timeout_s: float) -> bytes:
        """The enclave's evidence for a client: a document for ``trust.evidence.decode_attested``.

        Raises:
            LasagnaError: the model is not ready.
        """
        ...

    async def statistics(self, timeout_s: float) -> Statistics:
        """Plan and counters of the enclave.

        Raises:
            LasagnaError: the model is not ready.
        """
        ...
