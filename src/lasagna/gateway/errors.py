"""Which HTTP status an error has: the only place that knows."""

from __future__ import annotations

import math
from typing import Final

from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    EvidenceError,
    InvalidInputError,
    KeyRefusedError,
    LasagnaError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
    ProtocolError,
    ServiceError,
    TrustError,
    UsageError,
)

STATUS: Final[dict[type[LasagnaError], int]] = {
    # The client's fault.
    InvalidInputError: 400,
    ModelNotFoundError: 404,
    TrustError: 400,  # its capsule or a record doesn't open
    # The model can't be served now.
    OverloadedError: 503,
    EnclaveLostError: 503,
    # It can't be served before the operator has done something.
    BudgetError: 503,
    EvidenceError: 503,
    KeyRefusedError: 503,
    PackageError: 503,
    ServiceError: 503,
    UsageError: 503,
    # Ours.
    EnclaveError: 500,
    ProtocolError: 500,
    LasagnaError: 500,
}
"""By class; an error has the status of its nearest class."""

RETRY_AFTER_S: Final = 1
"""For an enclave that died and is being started again."""


def status_of(error: LasagnaError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def headers_of(error: LasagnaError) -> dict[str, str]:
    """``Retry-After``, in whole seconds (RFC 9110, section 10.2.3), where trying again helps."""
    match error:
        case OverloadedError(retry_after_s=seconds):
            return {"Retry-After": str(max(1, math.ceil(seconds)))}
        case EnclaveLostError():
            return {"Retry-After": str(RETRY_AFTER_S)}
        case _:
            return {}
