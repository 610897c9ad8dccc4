"""Another placement while requests go on: looked for when servers change, brought about in steps.

A part that is added is carried to its server as sealed weights over the link that requests use, and
is used when it is there. A part that is given up first gets no more requests, and goes when the
last one has left it. Planning takes no time of the processor that simulates: what it takes on a
real one is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.balancer import Belief
from lasagna.policy.balancer_events import Replaced
from lasagna.policy.cluster import Cluster, Part, part_of, sliced
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.placement import PlanOptions
from lasagna.policy.replan import HORIZON_S, Step, replan, steps
from lasagna.sim.clock import Clock
from lasagna.sim.network import Network
from lasagna.sim.server import VirtualServer

LOOK_S: Final = 0.1
"""Between two looks at whether a part has been left by its last request."""

PIECE_BYTES: Final = 1 << 20
"""Of weights that are carried at once: a request's bytes wait for one of them at most."""


@dataclass(frozen=True, slots=True)
class Replanning:
    """When and how another placement is looked for.

    Attributes:
        after_s: from a change that balancers have noticed until there is a plan.
        slower: factor by which a server's speed must have changed since the last plan.
        horizon_s: for how long a change is expected to last.
        options: of the planner. Its clock stands still, so that simulations are the same each time:
            what it takes is not limited by them, only what each of its programs may take.
    """

    after_s: float = 2.0
    slower: float = 1.3
    horizon_s: float = HORIZON_S
    options: PlanOptions = field(default_factory=PlanOptions)


Told: TypeAlias = Callable[[Replaced], None]
"""Tells all balancers."""


class Replacing:
    """Looks for placements, and brings them about one step at a time.

    Attributes:
        placement: in force.
        looked: how often another one was looked for; applied: how often it was worth it.
        moved_bytes: of weights that were carried.
    """

    def __init__(
        self,
        clock: Clock,
        network: Network,
        servers: dict[str, VirtualServer],
        cluster: Cluster,
        placement: Placement,
        replanning: Replanning,
        tell: Told,
        used: Callable[[Part], bool],
    ) -> None:
        """Nothing has changed yet.

        Args:
            clock: of everything that is simulated.
            network: that weights are carried over.
            servers: by name.
            cluster: as it was planned for.
            placement: in force.
            replanning: when and how.
            tell: tells all balancers.
            used: whether a request is on a part, or will come to it.
        """
        self._clock = clock
        self._network = network
        self._servers = servers
        self._cluster = cluster
        self._how = replanning
        self._tell = tell
        self._used = used
        self._due = False
        self._beliefs: dict[str, Belief] = {}
        self._factors = dict.fromkeys(servers, 1.0)
        self._steps: deque[Step] = deque()
        self._goal = placement
        self.placement = placement
        self.looked = 0
        self.applied = 0
        self.moved_bytes = 0

    def noticed(self, beliefs: dict[str, Belief]) -> None:
        """Balancers know of a change: a server is lost, or back, or slower.

        Args:
            beliefs: what they believe of each server.
        """
        self._beliefs = beliefs
        if not self._due:
            self._due = True
            self._clock.at(self._clock.now_s + self._how.after_s, self._look)

    def heard(self, server: str, belief: Belief, beliefs: dict[str, Belief]) -> None:
        """A server has reported."""
        ratio = belief.factor / self._factors[server]
        if not 1.0 / self._how.slower < ratio < self._how.slower:
            self.noticed(beliefs)

    def _look(self, _: None) -> None:
        if self._steps:  # one thing after the other
            self._clock.at(self._clock.now_s + self._how.after_s, self._look)
            return
        self._due = False
        cluster = self._known()
        if cluster is None:
            return
        there = [part for part in self.placement.parts if self._servers[part.server].alive]
        self.looked += 1
        try:
            found = replan(cluster, there, self._how.options, horizon_s=self._how.horizon_s)
        except BudgetError:
            return  # the servers that are left can't serve all models: what they can goes on
        self._factors |= {name: belief.factor for name, belief in self._beliefs.items()}
        if not found.worth_it or set(found.best.parts) == set(there):
            return
        self.applied += 1
        self._goal = found.best
        self._steps = deque(steps(cluster, there, found.best.parts))
        for part in set(self.placement.parts) - set(there):
            self._servers[part.server].forget(part.key)
        self._put({part: self.placement.parts[part] for part in there})
        self._next()

    def _known(self) -> Cluster | None:
        """The cluster as balancers believe it is."""
        alive = tuple(
            replace(server, speed=server.speed / self._beliefs[server.name].factor)
            for server in self._cluster.servers
            if self._beliefs[server.name].alive
        )
        return replace(self._cluster, servers=alive) if alive else None

    def _put(self, parts: dict[Part, PartCosts]) -> None:
        """These parts are in force from now on."""
        self.placement = replace(self._goal, parts=dict(sorted(parts.items())))
        self._tell(Replaced(self._clock.now_s, self.placement))

    def _next(self) -> None:
        if not self._steps:
            return
        step = self._steps[0]
        server = self._servers[step.part.server]
        if not server.alive:
            self._done(None)
        elif step.add:
            self._carry((sum(self._missing(step.part)), server.losses))
        else:
            parts = {p: costs for p, costs in self.placement.parts.items() if p != step.part}
            self._put(parts)
            self._give_up(None)

    def _carry(self, facts: tuple[int, int]) -> None:
        """Carry what is left of a part's weights, a piece at a time: requests go between."""
        left, losses = facts
        server = self._steps[0].part.server
        if left <= 0 or not self._servers[server].alive:
            self._carried(losses)
            return
        size = min(left, PIECE_BYTES)
        self.moved_bytes += size
        self._network.send(size, None, server, self._carry, (left - size, losses))

    def _carried(self, losses: int) -> None:
        part = self._steps[0].part
        server = self._servers[part.server]
        if server.alive and server.losses == losses:
            forms = self._cluster.models[part.model]
            server.add(part.key, part_of(forms, part.first, part.last, server.server.speed))
            costs = self._goal.parts[part]
            self._put({**self.placement.parts, part: costs})
        self._done(None)

    def _give_up(self, _: None) -> None:
        part = self._steps[0].part
        server = self._servers[part.server]
        if server.alive and self._used(part):
            self._clock.at(self._clock.now_s + LOOK_S, self._give_up)
            return
        server.forget(part.key)
        self._done(None)

    def _done(self, _: None) -> None:
        self._steps.popleft()
        if self._steps:
            self._next()
        else:
            known = self._goal.parts
            self._put({p: known.get(p, costs) for p, costs in self.placement.parts.items()})

    def _missing(self, part: Part) -> Iterator[int]:
        """Bytes of slices that the server has not got."""
        has = {
            number
            for one in self.placement.parts
            if one.server == part.server and one.model == part.model
            for number in range(one.first, one.last)
        }
        slices = sliced(self._cluster.models[part.model]).slices
        for number in range(part.first, part.last):
            if number not in has:
                yield slices[number].weight_bytes
