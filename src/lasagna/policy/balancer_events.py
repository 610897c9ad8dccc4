"""What a balancer is told, and what it answers. Times are seconds of one steady clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from lasagna.policy.cluster import Cluster, Part
from lasagna.policy.placed import Placement


class Asked(msgspec.Struct, frozen=True):
    """A request came in.

    Attributes:
        at_s: when.
        request: its id.
        model: that it wants.
        draw: a number below 1, drawn at random for this request: policies draw none themselves.
        rows: at least 1.
        deadline_s: when its answer is worth nothing any more; None for never.
    """

    at_s: float
    request: int
    model: str
    draw: float
    rows: int = 1
    deadline_s: float | None = None


class Passed(msgspec.Struct, frozen=True):
    """A request has left the part of its route with this number, counted from 0."""

    at_s: float
    request: int
    hop: int


class Ended(msgspec.Struct, frozen=True):
    """A request was answered, refused by a server, or given up; it is on none any more."""

    at_s: float
    request: int


class Reported(msgspec.Struct, frozen=True):
    """What a server said of itself.

    Attributes:
        at_s: when that came in.
        server: its name.
        measured_s: when it was so.
        backlog_s: seconds of work that waited or ran there.
        factor: measured over predicted times of late: above 1 for a server that has slowed down.
    """

    at_s: float
    server: str
    measured_s: float
    backlog_s: float
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerLost:
    """A server is not to be reached. Its requests begin anew."""

    at_s: float
    server: str


@dataclass(frozen=True, slots=True)
class ServerBack:
    """A server that was lost is there again, with nothing to do."""

    at_s: float
    server: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """Another placement is in force; requests under way keep their routes."""

    at_s: float
    placement: Placement
    cluster: Cluster | None = None
    """If servers or models have come that were not there before."""


BalancerEvent: TypeAlias = Asked | Passed | Ended | Reported | ServerLost | ServerBack | Replaced


class Dispatch(msgspec.Struct, frozen=True):
    """Send a request along these parts, from the first slice through the last."""

    request: int
    route: tuple[Part, ...]
    expected_s: float
    """When its answer is expected."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell who asked that the request can't be served in time, or at all now."""

    request: int
    retry_after_s: float
    reason: str


BalancerCommand: TypeAlias = Dispatch | Reject
