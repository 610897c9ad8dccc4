"""What the gateway tells about itself and its models; the client reads it with the same classes."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta

from lasagna.package.format import DTYPES, TensorSpec
from lasagna.server.served import ServedModel, Statistics

VERSION: Final = "1"
"""Every model has this one version."""
EXTENSIONS: Final = ("binary_tensor_data", "parameters", "schedule_policy", "lasagna_sealed")
PLATFORM: Final = "lasagna"

DATATYPES: Final = {name: name.upper().replace("FLOAT", "FP") for name in DTYPES}
"""OIP's names of the element types, such as FP32, by NumPy's."""

_Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, Meta(min_length=1, max_length=1024)]
_Extent = Annotated[int, Meta(ge=-1, le=2**40)]
_Shape = Annotated[tuple[_Extent, ...], Meta(min_length=1, max_length=16)]
_MAX_TENSORS: Final = 1024


class ServerMetadata(msgspec.Struct, frozen=True):
    """``GET /v2``."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TensorMetadata(msgspec.Struct, frozen=True):
    """A plaintext tensor as a client has it; -1 is the dimension that grows with the rows."""

    name: _Name
    datatype: str
    shape: _Shape


class SealedTensor(msgspec.Struct, frozen=True):
    """A tensor as its records are sealed: ``row_shape`` is its shape at one row."""

    name: _Name
    dtype: str
    row_shape: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=2**40)], ...], Meta(min_length=1, max_length=16)
    ]


class SealedFacts(msgspec.Struct, frozen=True):
    """What a client needs to seal requests to a model.

    Attributes:
        model_digest: 32 bytes in hexadecimal digits.
        evidence: path of the evidence, to which ``?nonce=`` is added.
        inputs: in order.
        outputs: in order.
        max_rows: of one request.
        batchable: whether there may be more than one.
        plan: how the model was fitted into the enclave, for people: fields come and go. Null
            before it was loaded.
        protocol: version of what the parameters and tensors of a sealed request are.
    """

    model_digest: _Hex32
    evidence: str
    inputs: Annotated[tuple[SealedTensor, ...], Meta(min_length=1, max_length=_MAX_TENSORS)]
    outputs: Annotated[tuple[SealedTensor, ...], Meta(min_length=1, max_length=_MAX_TENSORS)]
    max_rows: Annotated[int, Meta(ge=1, le=4096)]
    batchable: bool
    plan: dict[str, Any] | None = None
    protocol: Literal[1] = 1


class ModelMetadata(msgspec.Struct, frozen=True):
    """``GET /v2/models/{m}``."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    lasagna: SealedFacts


def server_metadata() -> ServerMetadata:
    """Name, version and what is understood beyond the protocol's core."""
    try:
        version = metadata.version("lasagna")
    except metadata.PackageNotFoundError:  # run from its source, without installation
        version = "unknown"
    return ServerMetadata("lasagna", version, EXTENSIONS)


def model_metadata(model: ServedModel) -> ModelMetadata:
    """A model's tensors, and what sealing requests to it needs."""
    facts = model.facts
    return ModelMetadata(
        name=model.name,
        versions=(VERSION,),
        platform=PLATFORM,
        inputs=tuple(_plain(spec, facts.batchable) for spec in facts.inputs),
        outputs=tuple(_plain(spec, facts.batchable) for spec in facts.outputs),
        lasagna=SealedFacts(
            model_digest=facts.digest.hex(),
            evidence=f"/v2/models/{quote(model.name, safe='')}/lasagna/evidence",
            inputs=tuple(_sealed(spec) for spec in facts.inputs),
            outputs=tuple(_sealed(spec) for spec in facts.outputs),
            max_rows=facts.max_rows,
            batchable=facts.batchable,
            plan=None if facts.plan is None else msgspec.to_builtins(facts.plan),
        ),
    )


def model_statistics(statistics: Statistics) -> dict[str, Any]:
    """``GET /v2/models/{m}/lasagna/statistics``: counters, the plan and the budget in one object.

    Counters are since the enclave was started; sizes are in bytes, times (``_s``) in seconds.
    """
    found: dict[str, Any] = msgspec.to_builtins(statistics.counters)
    for ours in ("id", "type"):
        found.pop(ours, None)
    return found | {
        "budget_bytes": statistics.budget_bytes,
        "plan": msgspec.to_builtins(statistics.plan),
        "process_peak_bytes": statistics.process_peak_bytes,
        "prediction_errors": asdict(statistics.prediction_errors),
    }


def _plain(spec: TensorSpec, batchable: bool) -> TensorMetadata:
    first = -1 if batchable else spec.row_shape[0]
    return TensorMetadata(spec.name, DATATYPES[spec.dtype], (first, *spec.row_shape[1:]))


def _sealed(spec: TensorSpec) -> SealedTensor:
    return SealedTensor(spec.name, spec.dtype, spec.row_shape)
