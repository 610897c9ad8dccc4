"""What became of simulated requests: a few bytes for each, so that ten millions fit."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Fate(IntEnum):
    """How a request ended."""

    ANSWERED = 0
    LATE = 1
    """Answered after its limit."""
    REJECTED = 2
    """By a balancer."""
    REFUSED = 3
    """By a server."""
    GIVEN_UP = 4
    UNFINISHED = 5
    """When the simulation was over."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model's requests, or of all. Latencies in seconds; NaN where nothing was answered.

    Attributes:
        count: requests that came in.
        answered: of these, late ones too; late: after their limit.
        refused: by a server, or rejected by a balancer.
        given_up: that no server can run; unfinished: when the simulation was over.
        throughput: answers a second, until the last of these requests ended; goodput: of those
            within their limit, if they have one.
        mean_s: of answered requests, as the percentiles are.
    """

    count: int
    answered: int
    late: int
    refused: int
    given_up: int
    unfinished: int
    throughput: float
    goodput: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """Of one server, from the beginning to the end, restarts included.

    Attributes:
        utilisation: share of the time in which its lanes were in runs.
        runs: that began; tasks: slices of rows in them.
        loads_per_task: slices that were decrypted for each of those.
        loaded_bytes: by decryption; pages: by the kernel.
        in_bytes: over its link to it; out_bytes: from it.
        in_share: of the time in which its link carried something to it; out_share: from it.
    """

    utilisation: float
    runs: int
    tasks: int
    loads_per_task: float
    loaded_bytes: int
    pages: int
    in_bytes: int
    out_bytes: int
    in_share: float
    out_share: float


class Requests:
    """Ends of requests, in order."""

    def __init__(self) -> None:
        """None has ended."""
        self._names: dict[str, int] = {}
        self._models = array("H")
        self._fates = array("B")
        self._asked_s = array("d")
        self._took_s = array("d")

    def __len__(self) -> int:
        return len(self._models)

    def end(self, model: str, fate: Fate, asked_s: float, now_s: float) -> None:
        """A request that was asked then has ended now."""
        number = self._names.setdefault(model, len(self._names))
        self._models.append(number)
        self._fates.append(fate)
        self._asked_s.append(asked_s)
        self._took_s.append(now_s - asked_s)

    @property
    def models(self) -> tuple[str, ...]:
        """Of requests that ended, by name."""
        return tuple(sorted(self._names))

    def latencies_s(self, model: str | None = None, *, since_s: float = 0.0) -> NDArray[np.float64]:
        """Of answered requests that were asked from then on, in order of their ends."""
        fates = self._column(self._fates, np.uint8)
        chosen = (fates <= Fate.LATE) & self._chosen(model, since_s)
        found: NDArray[np.float64] = self._column(self._took_s, np.float64)[chosen]
        return found

    def figures(self, model: str | None = None, *, since_s: float = 0.0) -> Figures:
        """Sum up.

        Rates are for the time from ``since_s`` until the last of the model's own requests ended, in
        whatever way: who leaves requests unfinished had all the time until the simulation was over,
        and another model that is overloaded until then does not count.

        Args:
            model: whose; None for all.
            since_s: what was asked before is left out: a cold start is not what counts.
        """
        chosen = self._chosen(model, since_s)
        fates = self._column(self._fates, np.uint8)[chosen]
        counts = np.bincount(fates, minlength=len(Fate)).tolist()
        latencies = self.latencies_s(model, since_s=since_s)
        ends_s = self._column(self._asked_s, np.float64) + self._column(self._took_s, np.float64)
        ends_s = ends_s[self._of(model)]
        span_s = max(float(ends_s.max()) - since_s, 1e-12) if len(ends_s) else 1.0
        answered = counts[Fate.ANSWERED] + counts[Fate.LATE]
        middle = (
            np.quantile(latencies, (0.5, 0.95, 0.99)).tolist() if answered else [float("nan")] * 3
        )
        return Figures(
            count=len(fates),
            answered=answered,
            late=counts[Fate.LATE],
            refused=counts[Fate.REFUSED] + counts[Fate.REJECTED],
            given_up=counts[Fate.GIVEN_UP],
            unfinished=counts[Fate.UNFINISHED],
            throughput=answered / span_s,
            goodput=counts[Fate.ANSWERED] / span_s,
            mean_s=float(latencies.mean()) if answered else float("nan"),
            p50_s=middle[0],
            p95_s=middle[1],
            p99_s=middle[2],
        )

    def _chosen(self, model: str | None, since_s: float) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = self._column(self._asked_s, np.float64) >= since_s
        return chosen & self._of(model)

    def _of(self, model: str | None) -> NDArray[np.bool_]:
        if model is None:
            return np.ones(len(self), np.bool_)
        found: NDArray[np.bool_] = self._column(self._models, np.uint16) == self._names.get(
            model, len(self._names)
        )
        return found

    @staticmethod
    def _column(values: array[Any], kind: Any) -> NDArray[Any]:
        """A copy: an array that numpy looks at can't grow."""
        return np.array(values, kind)


@dataclass(frozen=True, slots=True)
class Moves:
    """What was replanned.

    Attributes:
        looked: how often another placement was looked for.
        applied: how often it was worth its moves.
        moved_bytes: of weights that were carried to servers.
    """

    looked: int = 0
    applied: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulation.

    Attributes:
        seconds: that it lasted.
        requests: each of them.
        servers: by name.
        events: that balancers were told, requests that came to servers, and runs.
        moves: what was replanned.
    """

    seconds: float
    requests: Requests
    servers: Mapping[str, ServerFigures]
    events: int
    moves: Moves = Moves()

    def figures(self, *, since_s: float = 0.0) -> dict[str, Figures]:
        """Of each model."""
        return {name: self.requests.figures(name, since_s=since_s) for name in self.requests.models}
