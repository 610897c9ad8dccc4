"""What a placement puts where, byte by byte: what the pictures of a plan are drawn from.

A placement says which slices are on a server. Which of them stay in its memory the server's own
planner decides (``policy.memory``), so it is asked here, as the server will ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, Server, forms_on, sliced
from lasagna.policy.costs import SLICED
from lasagna.policy.memory import divide_best
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.plan import MemoryPlan, Style

Progress: TypeAlias = Callable[[int, int], None]
"""Told of servers that are done, and of all."""


@dataclass(frozen=True, slots=True)
class Block:
    """Slices of a part that are all pinned or all streamed; ``sizes`` are bytes of weights."""

    part: Part
    pinned: bool
    slices: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all slices."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Lane:
    """One server.

    Attributes:
        server: the server.
        parts: on it.
        blocks: the weights of the parts, pinned ones first.
        ring_bytes: of memory, that streamed weights pass through.
        running_bytes: of memory, for activations, workspace and ciphertext on its way.
        busy: share of its time that it works at the plan's rates.
        link_in: share of its link that is in use towards it.
        link_out: share of its link that is in use from it.
    """

    server: Server
    parts: Mapping[Part, PartCosts]
    blocks: tuple[Block, ...]
    ring_bytes: int
    running_bytes: int
    busy: float
    link_in: float
    link_out: float

    @property
    def pinned_bytes(self) -> int:
        """Weights that stay in its memory."""
        return sum(block.size for block in self.blocks if block.pinned)

    @property
    def streamed_bytes(self) -> int:
        """Weights that are outside and loaded for use."""
        return sum(block.size for block in self.blocks if not block.pinned)

    @property
    def used_bytes(self) -> int:
        """Of its memory."""
        return self.pinned_bytes + self.ring_bytes + self.running_bytes


def lanes_of(
    cluster: Cluster,
    placement: Placement,
    progress: Progress = lambda done, total: None,
    *,
    style: Style | None = None,
) -> list[Lane]:
    """All servers, in the cluster's order. Takes up to seconds for a large model.

    Raises:
        BudgetError: the parts of a server don't fit it.
    """
    found: list[Lane] = []
    known: dict[object, MemoryPlan] = {}  # replicas on servers of one kind are planned once
    for server in cluster.servers:
        parts = {part: placement.parts[part] for part in placement.on(server.name)}
        rates = {part.key: costs.rate for part, costs in parts.items()}
        key = (server.machine, server.speed, tuple(rates.items()))
        if parts and key not in known:
            known[key] = _plan(cluster, server, parts, style or Style())
        found.append(_lane(cluster, server, parts, known.get(key)))
        progress(len(found), len(cluster.servers))
    return found


def _plan(
    cluster: Cluster, server: Server, parts: Mapping[Part, PartCosts], style: Style
) -> MemoryPlan:
    forms = forms_on(cluster.models, parts, server)
    rates = {part.key: costs.rate for part, costs in parts.items()}
    try:
        return divide_best(forms, rates, style.shapes(server.machine), style)
    except BudgetError as error:
        raise BudgetError(f"server {server.name!r}: {error}") from None


def _lane(
    cluster: Cluster, server: Server, parts: Mapping[Part, PartCosts], plan: MemoryPlan | None
) -> Lane:
    blocks = [
        block
        for pinned in (True, False)
        for part in parts
        if plan is not None and (block := _block(cluster, part, plan, pinned=pinned)).slices
    ]
    every = parts.values()
    return Lane(
        server=server,
        parts=parts,
        blocks=tuple(blocks),
        ring_bytes=plan.ring_bytes if plan else 0,
        running_bytes=plan.total_bytes - plan.ring_bytes - plan.pinned_bytes if plan else 0,
        busy=sum(one.rate * one.work_s for one in every),
        link_in=sum(one.rate * one.in_bytes for one in every) / server.bandwidth,
        link_out=sum(one.rate * one.out_bytes for one in every) / server.bandwidth,
    )


def _block(cluster: Cluster, part: Part, plan: MemoryPlan, *, pinned: bool) -> Block:
    whole = plan.costs[part.key].form != SLICED  # then its one slice is all of them, and pinned
    stays = plan.pinned[part.key]
    slices = tuple(
        number
        for number in range(part.first, part.last)
        if (whole or number - part.first in stays) is pinned
    )
    costs = sliced(cluster.models[part.model])
    return Block(part, pinned, slices, tuple(costs.slices[n].weight_bytes for n in slices))
