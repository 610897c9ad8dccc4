"""Servers, links, models and load, as the global policies see them; and where slices live.

A cluster's servers hang on one switch, each by a link of its own, and so do the clients, by links
that nobody reckons with. A model is a chain of slices; where its graph branches, a cut is a point
in topological order, and all tensors that are alive there cross it. A **part** is a run of slices
on one server. To that server's scheduler a part is a model of its own, so what the local scheduler
does for models (stages, batches, pins) it does for parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import msgspec

from lasagna.errors import UsageError
from lasagna.policy.costs import SLICED, Forms, ModelCosts, SliceCosts
from lasagna.policy.stages import Machine

Kind: TypeAlias = tuple[Machine, float, float, float]
"""Servers of one kind can stand in for each other: machine, speed, bandwidth and delay."""


@dataclass(frozen=True, slots=True)
class Server:
    """An edge server.

    Attributes:
        name: unique.
        machine: its enclave's memory, lanes, cores and loading rate.
        speed: it computes so many times as fast as the machine of the models' profiles.
        bandwidth: bytes a second of its link, in each direction.
        delay_s: seconds from it to the switch.
    """

    name: str
    machine: Machine
    speed: float = 1.0
    bandwidth: float = 125e6
    delay_s: float = 0.0002

    @property
    def kind(self) -> Kind:
        """What it has in common with those that can stand in for it."""
        return self.machine, self.speed, self.bandwidth, self.delay_s


class Part(msgspec.Struct, frozen=True, order=True):
    """Slices ``first`` to ``last``, exclusive, of a model, on a server."""

    model: str
    first: int
    last: int
    server: str

    @property
    def key(self) -> str:
        """Its name as a model of its server's scheduler."""
        return f"{self.model}[{self.first}:{self.last}]"


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to plan for.

    Attributes:
        servers: at least one, with names of their own.
        models: costs of each in every form, at speed 1.
        demand: requests a second of each model that are expected; at least one above 0.
        limits_s: seconds in which a request of a model should be answered, at most.
    """

    servers: tuple[Server, ...]
    models: Mapping[str, Forms]
    demand: Mapping[str, float]
    limits_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [server.name for server in self.servers]
        if not names:
            raise UsageError("a cluster needs a server")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two servers are called {twice!r}")
        for what, table in (("demand", self.demand), ("latency limit", self.limits_s)):
            for model, value in table.items():
                if model not in self.models:
                    raise UsageError(f"{what} for {model!r}, which is not among the models")
                if not 0 <= value < float("inf"):
                    raise UsageError(f"{what} of {model!r} is {value}, it must be 0 or more")
        if not any(self.demand.values()):
            raise UsageError("no model is asked for: one needs a demand above 0")

    @property
    def wanted(self) -> tuple[str, ...]:
        """Models with demand, by name."""
        return tuple(sorted(name for name, rate in self.demand.items() if rate > 0))

    def server(self, name: str) -> Server:
        """One of the servers; a KeyError if there is none of this name."""
        for server in self.servers:
            if server.name == name:
                return server
        raise KeyError(name)


def sliced(forms: Forms) -> ModelCosts:
    """The form of a model in which it can be divided: the first."""
    assert forms[0].form == SLICED
    return forms[0]


def at_speed(costs: ModelCosts, speed: float) -> ModelCosts:
    """The same on a machine that computes so many times as fast."""
    if speed == 1.0:
        return costs
    slices = tuple(
        SliceCosts(one.weight_bytes, tuple(s / speed for s in one.compute_s), one.workspace_bytes)
        for one in costs.slices
    )
    return replace(costs, slices=slices)


@lru_cache(maxsize=4096)  # of equal parts what is worked out once serves all
def part_of(forms: Forms, first: int, last: int, speed: float = 1.0) -> Forms:
    """A part's costs, as of a model that begins and ends there.

    Its inputs and outputs are the tensors that cross its cuts, sealed. Only the whole model has
    the forms that are run in one piece.
    """
    whole = sliced(forms)
    assert 0 <= first < last <= len(whole.slices)
    if (first, last) == (0, len(whole.slices)):
        return tuple(at_speed(form, speed) for form in forms)
    part = replace(
        whole,
        slices=whole.slices[first:last],
        cut_bytes=whole.cut_bytes[first : last + 1],
        running_bytes=whole.running_bytes[first:last],
    )
    return (at_speed(part, speed),)


def carry_s(size: int, sender: Server | None, receiver: Server | None) -> float:
    """Seconds for so many bytes over links that nothing else uses; None for a client."""
    if sender is receiver:
        return 0.0
    if sender is None or receiver is None:
        end = receiver or sender
        assert end is not None
        return size / end.bandwidth + end.delay_s
    slowest = min(sender.bandwidth, receiver.bandwidth)
    return size / slowest + (sender.delay_s + receiver.delay_s)


def is_chain(parts: Sequence[Part], slices: int) -> bool:
    """Whether these take a request from the model's first slice through its last."""
    joined = all(a.last == b.first and a.model == b.model for a, b in pairwise(parts))
    return bool(parts) and joined and parts[0].first == 0 and parts[-1].last == slices


def forms_on(
    models: Mapping[str, Forms], parts: Iterable[Part], server: Server
) -> dict[str, Forms]:
    """What a server's scheduler knows of these parts, by their keys."""
    return {
        part.key: part_of(models[part.model], part.first, part.last, server.speed) for part in parts
    }
