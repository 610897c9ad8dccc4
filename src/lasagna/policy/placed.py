"""Where the slices of models live, and what that promises. ``policy.placement`` works it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lasagna.policy.cluster import Part


@dataclass(frozen=True, slots=True)
class PartCosts:
    """What a part takes where it lives.

    Attributes:
        work_s: seconds of its server for a request, when the server is busy and batches are full.
        through_s: seconds from a request's arrival at the idle server until it has left.
        in_bytes: of a request that comes in; out_bytes: of one that leaves.
        rate: requests a second that the plan sends through it; 0 for a spare replica.
    """

    work_s: float
    through_s: float
    in_bytes: int
    out_bytes: int
    rate: float


@dataclass(frozen=True, slots=True)
class Bound:
    """What no plan can do better than, and how that is known."""

    value: float
    how: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Parts on servers, with what is predicted of them.

    Attributes:
        parts: costs of each. Of every model with demand, at least one chain of parts goes from its
            first slice through its last. Rates are the scale's; of a plan for the lowest latency,
            the demand's.
        scale: sustainable load, in multiples of the demand.
        throughput: requests a second of all models at that scale.
        latency_s: predicted mean seconds of a request of each model at the demand; infinite where
            the demand is more than is sustainable.
        bottleneck: what limits the scale, in words.
        bound: on the scale, of plans that are made as this one was.
        ceiling: on the scale, of anything that these servers and links could do.
        mean_s: predicted mean seconds of a request of all models at the demand; infinite where that
            is more than is sustainable, or where nobody has reckoned it.
        latency_bound: on these seconds, of plans that are made as this one was; None for plans for
            throughput, and where linear programs don't see how the demand could be served.
    """

    parts: Mapping[Part, PartCosts]
    scale: float
    throughput: float
    latency_s: Mapping[str, float]
    bottleneck: str
    bound: Bound
    ceiling: Bound
    mean_s: float = float("inf")
    latency_bound: Bound | None = None

    @property
    def gap(self) -> float:
        """Share by which the scale may be below the best one."""
        return 1.0 - self.scale / self.bound.value if self.bound.value > 0 else 0.0

    @property
    def latency_gap(self) -> float:
        """Share of its bound by which the mean latency may be above the best one."""
        bound = self.latency_bound
        return self.mean_s / bound.value - 1.0 if bound is not None and bound.value > 0 else 0.0

    def on(self, server: str) -> list[Part]:
        """The parts of one server, in order."""
        return sorted(part for part in self.parts if part.server == server)


def connected(parts: Iterable[Part], slices: Mapping[str, int]) -> dict[str, list[Part]]:
    """The parts of each model that lie on a chain from its first slice through its last.

    Args:
        parts: on all servers.
        slices: of each model, how many it has.

    Returns:
        By model, in order of their first slice; an empty list where there is no such chain.
    """
    by_model: dict[str, list[Part]] = {model: [] for model in slices}
    for part in parts:
        by_model[part.model].append(part)
    found: dict[str, list[Part]] = {}
    for model, those in by_model.items():
        those.sort()
        reached = {0}
        for part in those:  # in order of first slices: what leads to a part comes before it
            if part.first in reached:
                reached.add(part.last)
        leads = {slices[model]}
        for part in sorted(those, key=lambda one: -one.last):
            if part.last in leads:
                leads.add(part.first)
        found[model] = [part for part in those if part.first in reached and part.last in leads]
    return found
