"""A whole cluster in virtual time: requests, balancers, links, servers, and what goes wrong.

A request is asked of one balancer, by its number; that answers with a route, and the request's
bytes go from hop to hop over the links. Each balancer knows of its own requests, and of others'
only what servers report: after a while, and as it was then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from lasagna.errors import UsageError
from lasagna.policy.balancer import Balancer
from lasagna.policy.balancer_events import (
    Asked,
    BalancerCommand,
    BalancerEvent,
    Dispatch,
    Ended,
    Passed,
    Replaced,
    Reported,
    ServerBack,
    ServerLost,
)
from lasagna.policy.cluster import Cluster, Part, Server, forms_on
from lasagna.policy.events import Answer, Command, Event, GiveUp
from lasagna.policy.placed import Placement
from lasagna.sim.arrivals import Arrival, draws
from lasagna.sim.calibration import noise
from lasagna.sim.clock import NEVER, Clock
from lasagna.sim.enclave import End, VirtualEnclave
from lasagna.sim.metrics import Fate, Moves, Outcome, Requests
from lasagna.sim.network import Network
from lasagna.sim.options import EnclaveDies, EpcTaken, Options, ServerDies, ServerSlows, Trouble
from lasagna.sim.planner import Planner
from lasagna.sim.replacing import Replacing
from lasagna.sim.server import Flow, MakeEnclave, VirtualServer

Heard: TypeAlias = Callable[[str, Event | BalancerEvent, Sequence[Command | BalancerCommand]], None]
"""Is shown who was told what, and what that led to: a server's name, or ``balancer N``."""
_SPREAD: Final = 2654435761
"""Knuth's multiplicative hash: which balancer gets a request must not follow the mix's order."""


class VirtualCluster:
    """Servers, balancers and links, for one ``run``.

    Attributes:
        clock: of all of them.
        network: of all of them.
        servers: by name.
        balancers: in order of their numbers.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        options: Options | None = None,
        *,
        seed: int = 0,
        planner: Planner | None = None,
        heard: Heard | None = None,
    ) -> None:
        """Everything is in place, and every enclave open.

        Args:
            cluster: with every server that the placement names.
            placement: which parts are where.
            options: how it is run.
            seed: of noise, and of what balancers draw.
            planner: to share with other simulations of the same models.
            heard: is shown all events and commands.

        Raises:
            BudgetError: a server's parts don't fit it.
            UsageError: there is no such rule, no balancer, or no time between reports.
        """
        self._options = options = options or Options()
        if options.balancers < 1:
            raise UsageError(f"a cluster needs a balancer, not {options.balancers}")
        if options.report_s <= 0.0:
            raise UsageError(f"servers report each {options.report_s} s, it must be above 0")
        self._heard = heard
        self._events = 0
        self._open: dict[int, Flow] = {}
        self._asked = 0
        self._arrivals: Iterator[Arrival] = iter(())
        self._exhausted = False
        self._requests = Requests()
        self._parts = placement.parts
        self._draws = draws(np.random.default_rng((seed, 0)))
        self.clock = Clock()
        self.network = Network(self.clock, cluster.servers)
        self.balancers = [
            Balancer(cluster, placement, options.rule, balancers=options.balancers)
            for _ in range(options.balancers)
        ]
        planner = planner or Planner()
        self.servers = {
            server.name: VirtualServer(
                self.clock,
                server,
                forms_on(cluster.models, placement.on(server.name), server),
                self._maker(server, planner, np.random.default_rng((seed, 1, number))),
                self._left,
                self._opened,
            )
            for number, server in enumerate(cluster.servers)
        }
        self._replacing = (
            Replacing(
                self.clock,
                self.network,
                self.servers,
                cluster,
                placement,
                options.replanning,
                self.balancers[0].servers,
                self._replaced,
                self._used,
            )
            if options.replanning
            else None
        )

    def run(
        self,
        arrivals: Iterable[Arrival],
        troubles: Iterable[Trouble] = (),
        *,
        until_s: float = NEVER,
    ) -> Outcome:
        """Serve all of these, once.

        Args:
            arrivals: in order of time.
            troubles: that come over servers, in any order.
            until_s: what has not ended then is unfinished.
        """
        self._arrivals = iter(arrivals)
        for trouble in troubles:
            self.clock.at(trouble.at_s, self._strike, trouble)
        count = len(self.servers)
        for number, server in enumerate(self.servers.values()):
            self.clock.at(self._options.report_s * (number + 1) / count, self._report, server)
        self._await_next()
        self.clock.run(until_s)
        now_s = self.clock.now_s
        for flow in self._open.values():
            self._requests.end(flow.arrival.model, Fate.UNFINISHED, flow.arrival.at_s, now_s)
        runs = sum(server.counters.runs for server in self.servers.values())
        moves = Moves()
        if self._replacing is not None:
            done = self._replacing
            moves = Moves(done.looked, done.applied, done.moved_bytes)
        figures = {name: one.figures(self.network, now_s) for name, one in self.servers.items()}
        return Outcome(now_s, self._requests, figures, self._events + runs, moves)

    # Requests.

    def _await_next(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self.clock.at(arrival.at_s, self._ask, arrival)
        else:
            self._exhausted = True
            self._stop_if_done()

    def _ask(self, arrival: Arrival) -> None:
        self._asked = request = self._asked + 1
        if self._replacing is not None:
            self._replacing.asked(arrival.model)
        shard = (request * _SPREAD >> 16) % len(self.balancers)
        flow = self._open[request] = Flow(request, arrival, shard)
        limit_s = flow.deadline_s if self._options.admission else None
        asked = Asked(
            self.clock.now_s, request, arrival.model, next(self._draws), arrival.rows, limit_s
        )
        self._tell(shard, asked)
        self._await_next()

    def _tell(self, number: int, event: BalancerEvent) -> None:
        """Tell a balancer, and do what it says."""
        commands = self.balancers[number].handle(event)
        self._events += 1
        if self._heard is not None:
            self._heard(f"balancer {number}", event, commands)
        for command in commands:
            flow = self._open[command.request]
            self._withdraw(flow)
            if isinstance(command, Dispatch):
                flow.route, flow.hop = command.route, 0
                self._carry(flow, None)
            else:
                self._finish(flow, Fate.REJECTED)

    def _withdraw(self, flow: Flow) -> None:
        """Whatever was begun of it is to come to nothing."""
        flow.attempt += 1
        if flow.place is not None:
            server, ticket = flow.place
            flow.place = None
            server.cancel(ticket)

    def _carry(self, flow: Flow, sender: VirtualServer | None) -> None:
        """Carry it to its next hop."""
        part = flow.route[flow.hop]
        size = self._parts[part].in_bytes * flow.arrival.rows
        self._send(size, sender, part.server, self._carried, flow)

    def _send(
        self,
        size: int,
        sender: VirtualServer | None,
        receiver: str | None,
        arrived: Callable[[Any], None],
        flow: Flow,
    ) -> None:
        losses = 0 if sender is None else sender.losses
        name = None if sender is None else sender.server.name
        self.network.send(size, name, receiver, arrived, (flow, flow.attempt, sender, losses))

    def _carried(self, facts: tuple[Flow, int, VirtualServer | None, int]) -> None:
        """Its bytes are at the next hop; or with the sender that died meanwhile."""
        flow, attempt, sender, losses = facts
        if attempt != flow.attempt or (sender is not None and sender.losses != losses):
            return
        part = flow.route[flow.hop]
        server, key = self.servers[part.server], part.key
        if not server.alive or key not in server.models:
            return
        if flow.hop:
            due_s = self.clock.now_s + server.server.delay_s
            self.clock.at(due_s, self._passed, (flow, attempt, flow.hop - 1))
        server.arrive(flow, key, self._options.admission)

    def _left(self, server: VirtualServer, flow: Flow, end: End) -> None:
        """A server is done with a request."""
        hop = flow.hop
        if not isinstance(end, Answer):
            fate = Fate.GIVEN_UP if isinstance(end, GiveUp) else Fate.REFUSED
            due_s = self.clock.now_s + server.server.delay_s
            self.clock.at(due_s, self._over, (flow, flow.attempt, fate))
        elif hop + 1 == len(flow.route):
            size = self._parts[flow.route[hop]].out_bytes * flow.arrival.rows
            self._send(size, server, None, self._answered, flow)
        else:
            flow.hop = hop + 1
            self._carry(flow, server)

    def _passed(self, facts: tuple[Flow, int, int]) -> None:
        """Its balancer hears where it is. Until then the loss of the hop before begins it anew."""
        flow, attempt, hop = facts
        if attempt == flow.attempt:
            self._tell(flow.balancer, Passed(self.clock.now_s, flow.request, hop))

    def _answered(self, facts: tuple[Flow, int, VirtualServer, int]) -> None:
        """The answer is with the client, unless the sender died meanwhile."""
        flow, attempt, sender, losses = facts
        if sender.losses == losses:
            self._over((flow, attempt, Fate.ANSWERED))

    def _over(self, facts: tuple[Flow, int, Fate]) -> None:
        flow, attempt, fate = facts
        if attempt == flow.attempt:
            self._finish(flow, fate)
            self._tell(flow.balancer, Ended(self.clock.now_s, flow.request))

    def _finish(self, flow: Flow, fate: Fate) -> None:
        now_s, arrival = self.clock.now_s, flow.arrival
        if fate is Fate.ANSWERED and flow.deadline_s is not None and now_s > flow.deadline_s:
            fate = Fate.LATE
        flow.attempt += 1
        self._requests.end(arrival.model, fate, arrival.at_s, now_s)
        del self._open[flow.request]
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._exhausted and not self._open:
            self.clock.stop()

    # Servers.

    def _maker(self, server: Server, planner: Planner, rng: np.random.Generator) -> MakeEnclave:
        """What makes enclaves of this server."""
        options = self._options
        factors = noise(rng, options.noise) if options.noise else None
        heard = partial(self._hear, server.name)

        def make(
            taken: int, ended: Callable[[End], None], opened: Callable[[], None]
        ) -> VirtualEnclave:
            paging = options.paging.get(server.name)
            return VirtualEnclave(
                self.clock,
                replace(server.machine, budget=server.machine.budget - taken),
                options.settings,
                planner,
                ended,
                calibration=options.calibrations.get(server.name),
                noise=factors,
                paging=paging and replace(paging, epc_bytes=paging.epc_bytes - taken),
                heard=None if self._heard is None else heard,
                opened=opened,
            )

        return make

    def _hear(self, name: str, event: Event, commands: Sequence[Command]) -> None:
        assert self._heard is not None
        self._heard(name, event, commands)

    def _report(self, server: VirtualServer) -> None:
        now_s = self.clock.now_s
        if server.alive:
            scheduler = server.enclave.scheduler
            facts = (server, now_s, scheduler.backlog_s(now_s), scheduler.slowness)
            self.clock.at(now_s + server.server.delay_s, self._reported, facts)
        self.clock.at(now_s + self._options.report_s, self._report, server)

    def _reported(self, facts: tuple[VirtualServer, float, float, float]) -> None:
        server, measured_s, backlog_s, slowness = facts
        self._tell_all(
            Reported(self.clock.now_s, server.server.name, measured_s, backlog_s, slowness)
        )
        if self._replacing is not None:
            self._replacing.heard(server.server.name)

    def _tell_all(self, event: BalancerEvent) -> None:
        for number in range(len(self.balancers)):
            self._tell(number, event)

    def _strike(self, trouble: Trouble) -> None:
        server = self.servers[trouble.server]
        match trouble:
            case ServerSlows(_, _, factor):
                server.slow(factor)
            case EnclaveDies(_, _, restart_s):
                server.die(restart_s)
            case ServerDies(_, _, back_after_s):
                server.lose()
                self._tell_of(server)
                if back_after_s < NEVER:
                    server.return_after(back_after_s)
            case EpcTaken(_, _, taken_bytes, restart_s):
                was_alive = server.alive
                server.take_epc(taken_bytes, restart_s)
                if was_alive:
                    self._tell_of(server)
                self.clock.at(max(self.clock.now_s, server.told_s), self._drop, server)

    def _tell_of(self, server: VirtualServer) -> None:
        """Balancers will notice that it is lost."""
        server.told_s = self.clock.now_s + self._options.detect_s
        self.clock.at(server.told_s, self._lost, server)

    def _drop(self, server: VirtualServer) -> None:
        """Parts that its memory does not hold any more get no requests."""
        placement = self.balancers[0].placement
        gone = {p for p in placement.on(server.server.name) if p.key not in server.models}
        if self._replacing is not None:
            self._replacing.without(gone)
        else:
            left = {part: one for part, one in placement.parts.items() if part not in gone}
            self._replaced(Replaced(self.clock.now_s, replace(placement, parts=left)))

    def _lost(self, server: VirtualServer) -> None:
        self._tell_all(ServerLost(self.clock.now_s, server.server.name))
        if self._replacing is not None:
            self._replacing.noticed()

    def _replaced(self, event: Replaced) -> None:
        self._parts = {**self._parts, **event.placement.parts}
        self._tell_all(event)

    def _used(self, part: Part) -> bool:
        """Whether a request is on a part, or will come to it."""
        return any(part in flow.route[flow.hop :] for flow in self._open.values())

    def _opened(self, server: VirtualServer) -> None:
        """Its enclave takes runs; if it was lost, balancers are told of its return."""
        if not server.alive:
            server.alive = True
            due_s = max(self.clock.now_s + server.server.delay_s, server.told_s)
            self.clock.at(due_s, self._back, server)

    def _back(self, server: VirtualServer) -> None:
        if server.alive:
            self._tell_all(ServerBack(self.clock.now_s, server.server.name))
            if self._replacing is not None:
                self._replacing.noticed()
