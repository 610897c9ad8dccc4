"""What a scheduler is told, and what it answers.

Events are past facts, each with the time at which it was noticed (seconds of any steady clock).
Commands are what its driver has to do; the driver never refuses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from lasagna.policy.costs import Forms
from lasagna.policy.plan import MemoryPlan, Style
from lasagna.policy.stages import Machine


@dataclass(frozen=True, slots=True)
class ModelAdded:
    """A model is there to be served; an enclave that runs has its keys already."""

    at_s: float
    model: str
    forms: Forms


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    """A model is no longer served. Its requests are given up."""

    at_s: float
    model: str


class Arrived(msgspec.Struct, frozen=True):
    """A request came in.

    Attributes:
        at_s: when.
        request: its id, larger than all before.
        model: that it wants.
        rows: at least 1.
        tenant: whose it is.
        deadline_s: when its answer is worth nothing any more; None for never.
        priority: requests of a higher one go first.
    """

    at_s: float
    request: int
    model: str
    rows: int = 1
    tenant: str = ""
    deadline_s: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this request any more."""

    at_s: float
    request: int


class Ran(msgspec.Struct, frozen=True):
    """A run has ended well: its rows stand at the cut behind its last slice.

    Attributes:
        at_s: when.
        run: its number.
        compute_s: seconds of its thread, waits for weights not counted; 0 if unknown.
        load_bytes: that were decrypted since the last report, and load_s in how many seconds of one
            thread; 0 if unknown.
        seal_s: seconds of opening rows that came in and sealing those that left; 0 if unknown.
    """

    at_s: float
    run: int
    compute_s: float = 0.0
    load_bytes: int = 0
    load_s: float = 0.0
    seal_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunFailed:
    """A run came to nothing, and the enclave lives: a row's values may be to blame."""

    at_s: float
    run: int


@dataclass(frozen=True, slots=True)
class Moved:
    """The last Pin or Unpin has been carried out, or could not be."""

    at_s: float
    failed: bool = False


@dataclass(frozen=True, slots=True)
class EnclaveLost:
    """The enclave died, and with it everything in it."""

    at_s: float


@dataclass(frozen=True, slots=True)
class EnclaveReady:
    """An enclave runs and has the keys of all models."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    """The last Plan has been worked out.

    Attributes:
        at_s: when.
        best: division of the memory.
        kept: the present one, with the pins that suit the demand; None if there is none.
    """

    at_s: float
    best: MemoryPlan
    kept: MemoryPlan | None


@dataclass(frozen=True, slots=True)
class Arranged:
    """The last Arrange has been carried out; or refused, and nothing is arranged."""

    at_s: float
    failed: bool = False


Event: TypeAlias = (
    ModelAdded
    | ModelRemoved
    | Arrived
    | Cancelled
    | Ran
    | RunFailed
    | Moved
    | EnclaveLost
    | EnclaveReady
    | Planned
    | Arranged
)


class Rows(msgspec.Struct, frozen=True):
    """Rows ``first`` to ``first + count`` of a request, which wait at a cut since ``since_s``."""

    request: int
    first: int
    count: int
    since_s: float = 0.0


class Run(msgspec.Struct, frozen=True):
    """Run slices ``first`` to ``last``, exclusive, on these rows as one batch, in one entry.

    Runs are carried out in the order of their numbers, as many at once as there are lanes; the
    loader decrypts what the next ones need.
    """

    run: int
    model: str
    first: int
    last: int
    batch: tuple[Rows, ...]


class Answer(msgspec.Struct, frozen=True):
    """All rows of the request are at the model's end: send them."""

    request: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request can't be served in time, or too many wait: say so at once."""

    request: int
    retry_after_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The request can't be served at all."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Free what the enclave holds of the request."""

    request: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Work out ``memory.divide_best`` of these, and ``memory.repin`` of the present plan.

    That takes too long to be done between two requests; Planned follows. The present plan is for
    the first of the machines.
    """

    models: Mapping[str, Forms]
    demand: Mapping[str, float]
    machines: tuple[Machine, ...]
    style: Style
    present: MemoryPlan | None


@dataclass(frozen=True, slots=True)
class Arrange:
    """Divide the enclave's memory so, with what is pinned loaded; then Arranged.

    Nothing is in the enclave, and no Run comes before Arranged. None when no model is left.
    """

    plan: MemoryPlan | None


@dataclass(frozen=True, slots=True)
class Pin:
    """Load a slice into memory of its own and keep it; then Moved."""

    model: str
    slice: int


@dataclass(frozen=True, slots=True)
class Unpin:
    """Give up a slice's memory, when no run uses it; then Moved."""

    model: str
    slice: int


Command: TypeAlias = Run | Answer | Refuse | GiveUp | Forget | Plan | Arrange | Pin | Unpin
