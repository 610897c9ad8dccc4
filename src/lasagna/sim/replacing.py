"""Another placement while requests go on: looked for when servers change, brought about in steps.

A part that is added is carried to its server as sealed weights over the link that requests use, as
far as the server has not got them on its disk, and is used when it is there. A part that is given
up first gets no more requests, and goes when the last one has left it. A change in the middle of
that begins it anew, from what is there by then. Planning takes no time of the processor that
simulates: what it takes on a real one is given.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.balancer_events import Replaced
from lasagna.policy.beliefs import Belief
from lasagna.policy.cluster import Cluster, Part, part_of, sliced
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.placement import PlanOptions
from lasagna.policy.replan import HORIZON_S, Replanned, Step, replan, slices_of, steps
from lasagna.sim.clock import Clock
from lasagna.sim.network import Network
from lasagna.sim.server import VirtualServer

NODES: Final = 200
"""Of each integer program of a plan: most need a few."""

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
        mix: share of the requests that must be for other models than planned for; if nobody planned
            for a model at all, any request for it will do.
        mix_s: for so long requests are counted before they are compared with the plan's mix.
        horizon_s: for how long a change is expected to last.
        options: of the planner. Its clock stands still, and its integer programs end after so many
            nodes, so that simulations are the same each time: what it takes is not limited.
    """

    after_s: float = 2.0
    slower: float = 1.3
    mix: float = 0.2
    mix_s: float = 5.0
    horizon_s: float = HORIZON_S
    options: PlanOptions = field(default_factory=PlanOptions)


@dataclass(slots=True)
class _Load:
    """A part that is being carried: slices, and bytes of each that have not left yet."""

    turn: int
    part: Part
    losses: int
    left: deque[tuple[int, int]]


Told: TypeAlias = Callable[[Replaced], None]
"""Tells all balancers."""

COUNTED: Final = 50
"""Requests that say what the mix is; fewer may be chance."""
RARE: Final = 0.05
"""Of its planned rate, that a model keeps which nobody has asked for of late; without room for all
models it keeps nothing."""


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
        beliefs: Mapping[str, Belief],
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
            beliefs: of a balancer, of each server.
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
        self._beliefs = beliefs
        self._counts: Counter[str] = Counter()
        self._since_s = 0.0
        self._idle: frozenset[str] = frozenset()  # models of which the last mix had none
        self._factors = dict.fromkeys(servers, 1.0)
        self._steps: deque[Step] = deque()
        self._turn = 0  # counts plans: what an earlier one had under way comes to nothing
        self._leaving: dict[Part, int] = {}  # given up by that plan, until unused
        there = slices_of(placement.parts)
        self._stored = {name: there.get(name, set()) for name in servers}
        self._goal = placement
        self.placement = placement
        self.looked = 0
        self.applied = 0
        self.moved_bytes = 0

    def noticed(self) -> None:
        """Balancers know of a change: of a server that is lost, back or slower, or of the mix."""
        if not self._due:
            self._due = True
            self._clock.at(self._clock.now_s + self._how.after_s, self._look)

    def without(self, parts: Collection[Part]) -> None:
        """A server has other memory: these parts are gone, and steps that reckoned with it."""
        self._turn += 1
        self._steps.clear()
        self._put({p: costs for p, costs in self.placement.parts.items() if p not in parts})
        self.noticed()

    def heard(self, server: str) -> None:
        """A server has reported."""
        ratio = self._beliefs[server].factor / self._factors[server]
        if not 1.0 / self._how.slower < ratio < self._how.slower:
            self.noticed()

    def asked(self, model: str) -> None:
        """A request came in, whether it can be served or not."""
        if not self._counts:
            self._since_s = self._clock.now_s
            self._clock.at(self._since_s + self._how.mix_s, self._compare)
        self._counts[model] += 1

    def _compare(self, _: None) -> None:
        """Plan for what is asked for, if that is not what was planned for."""
        if self._counts.total() < COUNTED:
            self._clock.at(self._clock.now_s + self._how.mix_s, self._compare)
            return
        lasted_s = self._clock.now_s - self._since_s
        counts, self._counts = self._counts, Counter()
        total, models = counts.total(), self._cluster.models
        self._idle = frozenset(m for m in models if not counts[m])
        planned = {model: self._cluster.demand.get(model, 0.0) for model in models}
        whole = sum(planned.values())
        others = sum(max(0.0, counts[m] / total - planned[m] / whole) for m in models)
        if others > self._how.mix or any(counts[m] and not planned[m] for m in models):
            rates = {m: max(counts[m] / lasted_s, RARE * planned[m]) for m in models}
            self._cluster = replace(self._cluster, demand=rates)
            self.noticed()

    def _look(self, _: None) -> None:
        self._due = False
        cluster = self._known()
        if cluster is None:
            return
        there = [part for part in self.placement.parts if self._servers[part.server].alive]
        self.looked += 1
        self._factors = {name: belief.factor for name, belief in self._beliefs.items()}
        found = self._found(cluster, there)
        asked = {m: 0.0 if m in self._idle else rate for m, rate in cluster.demand.items()}
        if found is None and self._idle and any(asked.values()):
            cluster = replace(cluster, demand=asked)
            found = self._found(cluster, there)
        if found is None:
            return  # the servers that are left can't serve all models: what they can goes on
        self._cluster = replace(self._cluster, demand=cluster.demand)
        self._turn += 1
        self._steps.clear()
        if not found.worth_it or set(found.best.parts) == set(there):
            return
        self.applied += 1
        self._goal = self._at_full_speed(found.best)
        self._steps.extend(steps(cluster, there, found.best.parts, self._stored))
        for part in sorted(set(self.placement.parts) - set(there)):
            self._servers[part.server].forget(part.key)
        self._put({part: self.placement.parts[part] for part in there})
        self._next(self._turn)

    def _found(self, cluster: Cluster, there: Collection[Part]) -> Replanned | None:
        """Another placement; None if there is no room for all models."""
        how = self._how
        options = replace(how.options, nodes=NODES)
        for limits_s in (cluster.limits_s, {}):  # late answers are better than none
            known = replace(cluster, limits_s=limits_s)
            try:
                return replan(known, there, options, horizon_s=how.horizon_s, stored=self._stored)
            except BudgetError:
                if not limits_s:
                    break
        return None

    def _known(self) -> Cluster | None:
        """The cluster as balancers believe it is."""
        alive = tuple(
            replace(
                server,
                speed=server.speed / self._beliefs[server.name].factor,
                machine=self._servers[server.name].machine,
            )
            for server in self._cluster.servers
            if self._beliefs[server.name].alive
        )
        return replace(self._cluster, servers=alive) if alive else None

    def _at_full_speed(self, placement: Placement) -> Placement:
        """Balancers reckon with the slowness that servers report: here it was planned with."""
        parts = {}
        for part, costs in placement.parts.items():
            slower = self._factors[part.server]
            parts[part] = replace(
                costs,
                work_s=costs.work_s / slower,
                through_s=costs.through_s / slower,
                rate=costs.rate * slower,
            )
        return replace(placement, parts=parts)

    def _put(self, parts: dict[Part, PartCosts]) -> None:
        """These parts are in force from now on."""
        self.placement = replace(self._goal, parts=dict(sorted(parts.items())))
        self._tell(Replaced(self._clock.now_s, self.placement))

    def _next(self, turn: int) -> None:
        if turn != self._turn or not self._steps:
            return
        part, server = self._steps[0].part, self._servers[self._steps[0].part.server]
        if not server.alive:
            self._done()
        elif not self._steps[0].add:
            self._put({p: costs for p, costs in self.placement.parts.items() if p != part})
            self._leaving[part] = turn
            self._give_up((turn, part))
        elif part in self._leaving:  # it is wanted again before it has gone
            del self._leaving[part]
            self._use(part)
        elif any(one.server == part.server for one in self._leaving):
            self._clock.at(self._clock.now_s + LOOK_S, self._next, turn)
        else:
            has = self._stored[part.server]
            slices = sliced(self._cluster.models[part.model]).slices
            left = deque(
                (number, slices[number].weight_bytes)
                for number in range(part.first, part.last)
                if (part.model, number) not in has
            )
            self._carry(_Load(turn, part, server.losses, left))

    def _carry(self, load: _Load) -> None:
        """Carry what is left of a part's weights, a piece at a time: requests go between."""
        part, server = load.part, self._servers[load.part.server]
        while load.left and not load.left[0][1]:
            number, _ = load.left.popleft()
            self._stored[part.server].add((part.model, number))
        if load.turn != self._turn:
            return
        if not server.alive or server.losses != load.losses:
            self._done()
        elif load.left:
            number, left = load.left[0]
            size = min(left, PIECE_BYTES)
            load.left[0] = number, left - size
            self.moved_bytes += size
            self._network.send(size, None, part.server, self._carry, load)
        else:
            forms = self._cluster.models[part.model]
            own = part_of(forms, part.first, part.last, server.server.speed)
            if server.add(part.key, own):
                self._use(part)
            else:  # its memory, or its way to divide it, is not what was planned for
                self._done()

    def _use(self, part: Part) -> None:
        self._put({**self.placement.parts, part: self._goal.parts[part]})
        self._done()

    def _give_up(self, facts: tuple[int, Part]) -> None:
        turn, part = facts
        if self._leaving.get(part) != turn:
            return
        server = self._servers[part.server]
        if server.alive and self._used(part):
            self._clock.at(self._clock.now_s + LOOK_S, self._give_up, facts)
            return
        del self._leaving[part]
        server.forget(part.key)
        if turn == self._turn:
            self._done()

    def _done(self) -> None:
        self._steps.popleft()
        if self._steps:
            self._next(self._turn)
        else:
            known = self._goal.parts
            self._put({p: known.get(p, costs) for p, costs in self.placement.parts.items()})
