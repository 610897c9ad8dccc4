"""The global task balancer: which servers a request goes through. Pure: events in, commands out.

A route is a chain of parts, from the model's first slice through its last. The ``earliest`` rule
takes the one whose answer is expected first: a dynamic program over the cuts at which parts begin,
in which a part takes

    carrying the request there + waiting for what is before it + going through

and carrying includes the wait for what is before it at the links. What the balancer believes of
servers and links is in ``policy.beliefs``.

A server's time is not all that is scarce: the cheapest route of one model may take the only server
on which another can live. The plan has reckoned with that. So each part has a bucket of its own as
well, which drains at the rate that the plan sends through it (less, if its server has slowed down):
who would use a part beyond its rate is ranked as if he had to wait for that. With little load the
bucket is empty, and the quickest route is taken; with much of it, flows are those of the plan.

The other rules are for comparison. They choose hop by hop, and know less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias, assert_never

from lasagna.errors import UsageError
from lasagna.policy.balancer_events import (
    Asked,
    BalancerCommand,
    BalancerEvent,
    Dispatch,
    Ended,
    Passed,
    Reject,
    Replaced,
    Reported,
    ServerBack,
    ServerLost,
)
from lasagna.policy.beliefs import Belief, Bucket, carried_s
from lasagna.policy.cluster import Cluster, Part, sliced
from lasagna.policy.placed import PartCosts, Placement, connected

COMPARED: Final = 16
"""Parts at one cut, beyond which only so many of them are looked at, others for each request. Two
that are drawn at random are nearly as good as all (Mitzenmacher, 2001). With 8 requests take 3 %
longer at the mean and 13 % at the 99th percentile (40 replicas), and are not decided faster."""


class _Hop(NamedTuple):
    """A part, what it costs, what is believed of its server, and what is used of its rate."""

    part: Part
    costs: PartCosts
    belief: Belief
    share: Bucket


@dataclass(slots=True, eq=False)
class _Network:
    """The parts of one model, by the cut at which they begin; cuts in order."""

    slices: int
    begins: dict[int, list[_Hop]] = field(default_factory=dict)

    def some(self, cut: int, draw: float) -> list[_Hop]:
        """Parts to look at for a request that drew this number."""
        hops = self.begins[cut]
        count = len(hops)
        if count <= COMPARED:
            return hops
        start = int(draw * count)
        return hops[start : start + COMPARED] + hops[: max(0, start + COMPARED - count)]


Route: TypeAlias = tuple[_Hop, ...]
Rule = Callable[["Balancer", _Network, Asked], Route | None]


class Balancer:
    """One balancer over a cluster. ``handle`` is the only thing that changes it."""

    def __init__(
        self, cluster: Cluster, placement: Placement, rule: str = "earliest", *, balancers: int = 1
    ) -> None:
        """Nothing is under way, and all servers are believed idle.

        Args:
            cluster: with every server that the placement names.
            placement: that is in force.
            rule: how routes are chosen, one of ``RULES``.
            balancers: that share the requests evenly, this one included: of a part's planned rate
                each has its share.

        Raises:
            UsageError: there is no such rule.
        """
        if rule not in RULES:
            raise UsageError(f"there is no rule {rule!r}; choose {', '.join(RULES)}")
        self._slices: dict[str, int] = {}
        self._choose = RULES[rule]
        self._balancers = balancers
        self.servers: dict[str, Belief] = {}
        self._meet(cluster)
        self._networks: dict[str, _Network] = {}
        self._turns: dict[tuple[str, int], int] = {}
        self._routes: dict[int, tuple[Route, int]] = {}
        self._asked: dict[int, Asked] = {}
        self._placement = placement
        self._shares: dict[Part, Bucket] = {}
        self._busy: dict[str, float] = {}
        self._take(placement)

    @property
    def placement(self) -> Placement:
        """That requests are sent by now."""
        return self._placement

    def handle(self, event: BalancerEvent) -> list[BalancerCommand]:
        """Take note of a fact; what has to be done now, in this order."""
        match event:
            case Asked():
                return [self._ask(event)]
            case Passed(_, request, hop):
                self._passed(request, hop + 1)
            case Ended(_, request):
                self._ended(request)
            case Reported():
                belief = self.servers[event.server]
                belief.report(event.measured_s, event.backlog_s, event.factor)
            case ServerLost():
                return self._lost(event)
            case ServerBack(_, server):
                self.servers[server].alive = True
                self._take(self._placement)
            case Replaced(_, placement, cluster):
                if cluster is not None:
                    self._meet(cluster)
                self._take(placement)
            case _:
                assert_never(event)
        return []

    def turn(self, model: str, cut: int) -> int:
        """Counts from 0, for each model and cut."""
        count = self._turns.get((model, cut), 0)
        self._turns[model, cut] = count + 1
        return count

    def _meet(self, cluster: Cluster) -> None:
        """Take note of servers and models; of those that it knows, its beliefs stay."""
        for server in cluster.servers:
            self.servers.setdefault(server.name, Belief(server))
        self._slices |= {name: len(sliced(forms).slices) for name, forms in cluster.models.items()}

    def _take(self, placement: Placement) -> None:
        self._placement = placement
        alive = [part for part in placement.parts if self.servers[part.server].alive]
        self._busy = dict.fromkeys(
            self.servers, 0.0
        )  # by the plan: what is left is all parts' alike
        for part, costs in placement.parts.items():
            self._busy[part.server] += costs.rate * costs.work_s
        self._networks = {}
        for model, parts in connected(alive, self._slices).items():
            network = self._networks[model] = _Network(self._slices[model])
            for part in sorted(parts, key=lambda one: one.first):
                share = self._shares.setdefault(part, Bucket())
                hop = _Hop(part, placement.parts[part], self.servers[part.server], share)
                network.begins.setdefault(part.first, []).append(hop)

    def _ask(self, event: Asked) -> BalancerCommand:
        network = self._networks.get(event.model)
        if network is None:
            return Reject(event.request, 0.0, f"no model {event.model!r} is served here")
        route = self._choose(self, network, event)
        if route is None:
            return Reject(event.request, 1.0, f"no servers have all of {event.model!r} now")
        if event.deadline_s is not None:
            late_s = self._times(event, route)[1] - event.deadline_s
            if late_s > 0.0 and self._choose is _earliest:
                # A part that is used beyond its rate may have time: then nobody is refused.
                route = _earliest(self, network, event, kept=False) or route
                late_s = self._times(event, route)[1] - event.deadline_s
            if late_s > 0.0:
                reason = f"it would be answered {late_s:.3g} s too late"
                return Reject(event.request, late_s, reason)
        self._asked[event.request] = event
        ends_s = self._note(event, route)
        return Dispatch(event.request, tuple([hop.part for hop in route]), ends_s)

    def _note(self, event: Asked, route: Route) -> float:
        """Believe what the route's servers and links will have to do; when the answer is there."""
        self._routes[event.request] = route, 0
        route[0].belief.outstanding += 1
        comes_s, ends_s = self._times(event, route, note=True)
        for (part, costs, belief, share), time_s in zip(route, comes_s, strict=True):
            belief.send(time_s, costs.work_s * belief.factor * event.rows)
            if costs.rate > 0.0:
                busy = min(1.0, self._busy[part.server])
                rate = costs.rate / busy / belief.factor / self._balancers
                share.fill(event.at_s, event.rows / rate)
        return ends_s

    def _times(
        self, event: Asked, route: Route, *, note: bool = False
    ) -> tuple[list[float], float]:
        """When a request is expected at each of its parts, and when its answer is.

        Args:
            event: the request.
            route: of it.
            note: believe of links that its bytes are on them.
        """
        others = self._balancers if note else 0
        comes_s: list[float] = []
        now_s, before = event.at_s, None
        for _, costs, belief, _ in route:
            now_s = carried_s(costs.in_bytes * event.rows, now_s, before, belief, others)
            comes_s.append(now_s)
            now_s += belief.backlog_s(now_s) + belief.through_s(costs, event.rows)
            before = belief
        size = route[-1].costs.out_bytes * event.rows
        return comes_s, carried_s(size, now_s, before, None, others)

    def _passed(self, request: int, hop: int) -> None:
        """The request is on its way to the part with this number."""
        if request not in self._routes:
            return
        route, at = self._routes[request]
        route[at].belief.outstanding -= 1
        if hop < len(route):
            self._routes[request] = route, hop
            route[hop].belief.outstanding += 1
        else:
            del self._routes[request], self._asked[request]

    def _ended(self, request: int) -> None:
        if request in self._routes:
            self._passed(request, len(self._routes[request][0]))

    def _lost(self, event: ServerLost) -> list[BalancerCommand]:
        """Requests that are there, or were to go there, are sent anew from the beginning."""
        belief = self.servers[event.server]
        belief.alive = False
        belief.empty()
        self._take(self._placement)
        again = [
            self._asked[request]
            for request, (route, at) in self._routes.items()
            if any(hop.part.server == event.server for hop in route[at:])
        ]
        for asked in again:
            self._ended(asked.request)
        return [
            self._ask(
                Asked(
                    event.at_s,
                    asked.request,
                    asked.model,
                    asked.draw,
                    asked.rows,
                    asked.deadline_s,
                )
            )
            for asked in again
        ]


def _earliest(
    balancer: Balancer, network: _Network, event: Asked, *, kept: bool = True
) -> Route | None:
    """The route that ends first, where shares are kept to; of all routes, if they are not.

    Ties go to the last server with fewest requests of this balancer, then to the part with more of
    the plan's flow. Labels are kept by the cut reached and the server that holds it: where a
    request is decides what carrying it on costs.
    """
    reached: dict[tuple[int, str], tuple[float, Route]] = {(0, ""): (event.at_s, ())}
    best: tuple[tuple[float, int, float], Route] | None = None
    now_s, rows = event.at_s, event.rows
    for cut in network.begins:
        here = [(server, *label) for (at, server), label in reached.items() if at == cut]
        if not here:
            continue
        first_s = min(time_s for _, time_s, _ in here)
        for hop in network.some(cut, event.draw):
            part, costs, belief, share = hop
            # Below 0 if nobody is before it.
            held_s = share.level_s + share.at_s - now_s if kept else 0.0
            through_s = belief.factor * (costs.through_s + (rows - 1) * costs.work_s)
            if best is not None:
                # Who comes later waits less, and is not done sooner. Written out: asked most often.
                work = belief.work
                wait_s = work.level_s - max(0.0, first_s - work.at_s)
                if first_s + max(0.0, wait_s, held_s) + through_s > best[0][0]:
                    continue  # no route through it ends sooner
            for server, time_s, route in here:
                before = balancer.servers[server] if server else None
                comes_s = carried_s(costs.in_bytes * rows, time_s, before, belief)
                wait_s = belief.backlog_s(comes_s)
                ends_s = comes_s + max(wait_s, held_s) + through_s
                if part.last == network.slices:
                    ends_s = carried_s(costs.out_bytes * rows, ends_s, belief, None)
                    rank = ends_s, belief.outstanding, -costs.rate
                    if best is None or rank < best[0]:
                        best = rank, (*route, hop)
                    continue
                known = reached.get((part.last, part.server))
                if known is None or ends_s < known[0]:
                    reached[part.last, part.server] = ends_s, (*route, hop)
    return None if best is None else best[1]


def _hop_by_hop(
    pick: Callable[[Balancer, list[_Hop], Asked, int], _Hop],
) -> Rule:
    """A rule that chooses among the parts at each cut, and looks no further."""

    def rule(balancer: Balancer, network: _Network, event: Asked) -> Route | None:
        route: list[_Hop] = []
        cut = 0
        while cut < network.slices:
            parts = network.begins.get(cut)
            if not parts:
                return None
            route.append(pick(balancer, parts, event, len(route)))
            cut = route[-1].part.last
        return tuple(route)

    return rule


def _in_turn(balancer: Balancer, parts: list[_Hop], event: Asked, _: int) -> _Hop:
    return parts[balancer.turn(event.model, parts[0].part.first) % len(parts)]


def _drawn(draw: float, hop: int, choices: int) -> int:
    """A choice for each hop from one draw: its digits in a number system of that base."""
    for _ in range(hop):
        draw = draw * choices % 1.0
    return int(draw * choices)


def _at_random(_: Balancer, parts: list[_Hop], event: Asked, hop: int) -> _Hop:
    return parts[_drawn(event.draw, hop, len(parts))]


def _least(_: Balancer, parts: list[_Hop], __: Asked, ___: int) -> _Hop:
    return min(parts, key=lambda one: one.belief.outstanding)


def _two_choices(balancer: Balancer, parts: list[_Hop], event: Asked, hop: int) -> _Hop:
    """The less busy of two drawn at random (Mitzenmacher, 2001)."""
    drawn = [parts[_drawn(event.draw, 2 * hop + n, len(parts))] for n in range(2)]
    return _least(balancer, drawn, event, hop)


RULES: Final[Mapping[str, Rule]] = {
    "earliest": _earliest,
    "round-robin": _hop_by_hop(_in_turn),
    "random": _hop_by_hop(_at_random),
    "least-outstanding": _hop_by_hop(_least),
    "power-of-two": _hop_by_hop(_two_choices),
}
"""How routes may be chosen."""
