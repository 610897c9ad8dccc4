"""Every error that Lasagna raises on purpose.

::

    LasagnaError
    ├── UsageError             the caller's arguments or configuration are wrong
    ├── ModelError             an ONNX model can't be read, batched, tiled or cut
    ├── PackageError           a sealed package is malformed, tampered with or for another key
    ├── TrustError             a check of evidence, keys or records failed
    │   ├── EvidenceError      evidence is malformed or a policy refuses it
    │   ├── KeyRefusedError    the key broker won't release a key
    │   └── RecordError        a sealed record doesn't open where it was presented
    ├── BudgetError            a model's plan doesn't fit the enclave's memory budget
    ├── RequestError           one request can't be served
    │   ├── ModelNotFoundError     no such model is loaded
    │   ├── InvalidInputError      wrong name, shape, dtype or size
    │   └── OverloadedError        the queue is full: try again after ``retry_after_s``
    ├── EnclaveError           the enclave process failed
    │   ├── EnclaveLostError   it died or stopped answering
    │   └── ProtocolError      a frame between host and enclave is malformed
    └── ServiceError           a server answered with an error (raised by the client)

No HTTP status stands here: the gateway maps errors to its protocol.
Messages say what was wrong and what would be right; they never hold a key, a tensor or a plaintext.
"""

from __future__ import annotations

from typing import Self


class LasagnaError(Exception):
    """Base of every error that Lasagna raises on purpose."""

    def again(self) -> Self:
        """A fresh one of the same kind: an exception raised in two places collects tracebacks."""
        return type(self)(*self.args)


class UsageError(LasagnaError):
    """The caller's arguments or configuration are wrong."""


class ModelError(LasagnaError):
    """An ONNX model can't be read, batched, tiled or cut."""


class PackageError(LasagnaError):
    """A sealed package is malformed, was tampered with or belongs to another key."""


class TrustError(LasagnaError):
    """A check of evidence, keys or records failed."""


class EvidenceError(TrustError):
    """Evidence is malformed, or a verification policy refuses it."""


class KeyRefusedError(TrustError):
    """The key broker does not release the key asked for."""


class RecordError(TrustError):
    """A sealed record doesn't open at the place where it was presented."""


class BudgetError(LasagnaError):
    """A model's plan does not fit the enclave's memory budget."""


class RequestError(LasagnaError):
    """One request can't be served; others aren't affected (``policy.scheduler``, for batches)."""


class ModelNotFoundError(RequestError):
    """No model of that name is loaded."""


class InvalidInputError(RequestError):
    """An input has the wrong name, shape, element type or size."""


class OverloadedError(RequestError):
    """The queue is full.

    Attributes:
        retry_after_s: seconds after which a retry is likely to be admitted.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def again(self) -> Self:
        """A fresh one of the same kind."""
        return type(self)(str(self), self.retry_after_s)


class EnclaveError(LasagnaError):
    """The enclave process failed."""


class EnclaveLostError(EnclaveError):
    """The enclave process died, or stopped answering before its deadline."""


class ProtocolError(EnclaveError):
    """A frame between host and enclave is malformed or too long."""


class ServiceError(LasagnaError):
    """A server answered with an error.

    Attributes:
        status: the HTTP status of the answer; 0 when there was none.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def again(self) -> Self:
        """A fresh one of the same kind."""
        return type(self)(str(self), self.status)
