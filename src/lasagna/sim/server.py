"""A virtual server: an enclave with its scheduler, and the requests that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TypeAlias

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Part, Server
from lasagna.policy.costs import Forms
from lasagna.policy.events import Arrived, Cancelled, ModelAdded, ModelRemoved
from lasagna.policy.stages import Machine
from lasagna.sim.arrivals import Arrival
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import Counters, End, VirtualEnclave
from lasagna.sim.metrics import ServerFigures
from lasagna.sim.network import Network


class Flow:
    """A request on its way through the cluster.

    Attributes:
        request: its number.
        arrival: how it came in; asked_s: when; deadline_s: till when its answer is worth something.
        balancer: number of the one that it was sent to.
        route: that it takes; hop: number of the part where it is, or to which it is carried.
        attempt: how often it has begun. What was begun before is to be dropped.
        place: the server that has it, and the ticket there; nothing while it is carried.
    """

    __slots__ = (
        "arrival",
        "attempt",
        "balancer",
        "deadline_s",
        "hop",
        "place",
        "request",
        "route",
    )

    def __init__(self, request: int, arrival: Arrival, balancer: int) -> None:
        self.request = request
        self.arrival = arrival
        limit_s = arrival.limit_s
        self.deadline_s = None if limit_s is None else arrival.at_s + limit_s
        self.balancer = balancer
        self.route: tuple[Part, ...] = ()
        self.hop = 0
        self.attempt = 0
        self.place: tuple[VirtualServer, int] | None = None


MakeEnclave: TypeAlias = Callable[[int, Callable[[End], None], Callable[[], None]], VirtualEnclave]
"""Makes a server's enclave with as many bytes less of EPC, which calls these when a request leaves
and when runs are possible."""


class VirtualServer:
    """One server of a cluster.

    Attributes:
        server: what it has.
        models: its parts' costs, by their keys.
        enclave: the present one; after a loss another, with another scheduler.
        alive: whether requests that come in are taken.
        losses: how often it was lost. What it sent before a loss and did not arrive is lost, too.
        told_s: when balancers were told of its last loss, which comes before its return.
        taken_bytes: of its EPC that other tenants have.
    """

    def __init__(
        self,
        clock: Clock,
        server: Server,
        models: Mapping[str, Forms],
        make: MakeEnclave,
        left: Callable[[VirtualServer, Flow, End], None],
        opened: Callable[[VirtualServer], None],
    ) -> None:
        """Its first enclave is open at once, as soon as the clock runs.

        Args:
            clock: of everything that is simulated.
            server: what it has.
            models: of its parts; without any it idles.
            make: makes an enclave.
            left: is told of each request that leaves, and how.
            opened: is told when an enclave takes runs, the first one and those after losses.
        """
        self._clock = clock
        self.server = server
        self.models = models
        self._make = make
        self._left = left
        self._was_opened = opened
        self._before = Counters()
        self._tickets: dict[int, Flow] = {}
        self._last_ticket = 0
        self._factor = 1.0
        self.losses = 0
        self.alive = True
        self.told_s = 0.0
        self.taken_bytes = 0
        self._renew()
        self._started = bool(models)
        if models:
            self.enclave.start(models, prepared=True)

    @property
    def counters(self) -> Counters:
        """Of all enclaves that it has had."""
        now = self.enclave.counters
        names = [one.name for one in fields(Counters)]
        return Counters(*(getattr(self._before, n) + getattr(now, n) for n in names))

    @property
    def machine(self) -> Machine:
        """What other tenants leave of it."""
        machine = self.server.machine
        return replace(machine, budget=machine.budget - self.taken_bytes)

    def figures(self, network: Network, seconds: float) -> ServerFigures:
        """What it has done in so many seconds, over which links."""
        span_s = max(seconds, 1e-12)
        name, done = self.server.name, self.counters
        in_bytes, in_s = network.down[name].done(seconds)
        out_bytes, out_s = network.up[name].done(seconds)
        return ServerFigures(
            utilisation=done.busy_s / span_s,
            runs=done.runs,
            tasks=done.tasks,
            loads_per_task=done.loads / max(1, done.tasks),
            loaded_bytes=done.loaded_bytes,
            pages=done.pages,
            in_bytes=in_bytes,
            out_bytes=out_bytes,
            in_share=in_s / span_s,
            out_share=out_s / span_s,
        )

    def arrive(self, flow: Flow, key: str, admission: bool) -> None:
        """A request's input is there; who is lost loses it.

        Args:
            flow: the request.
            key: of the part that it is for.
            admission: whether the scheduler is told of its deadline.
        """
        if not self.alive:
            return
        self._last_ticket = ticket = self._last_ticket + 1
        self._tickets[ticket] = flow
        flow.place = self, ticket
        arrival = flow.arrival
        self.enclave.tell(
            Arrived(
                self._clock.now_s,
                ticket,
                key,
                arrival.rows,
                arrival.tenant,
                flow.deadline_s if admission else None,
                arrival.priority,
            )
        )

    def add(self, key: str, forms: Forms) -> bool:
        """Another part is here; requests for it wait until its memory is arranged.

        Returns:
            Whether there is room for it, beside what is here; if not, nothing has changed.
        """
        models = {**self.models, key: forms}
        if not self._fit(models):
            return False
        self.models = models
        if self._started:
            self.enclave.tell(ModelAdded(self._clock.now_s, key, forms))
        else:
            self._started = True
            self.enclave.start(self.models)
        return True

    def _fit(self, models: Mapping[str, Forms]) -> bool:
        """Whether its scheduler takes all of them, as its enclave is now."""
        try:
            self.enclave.scheduler.require_fits(models)
        except BudgetError:
            return False
        return True

    def forget(self, key: str) -> None:
        """A part is not to be served here any more."""
        if key in self.models:
            self.models = {name: forms for name, forms in self.models.items() if name != key}
            if self._started:
                self.enclave.tell(ModelRemoved(self._clock.now_s, key))

    def cancel(self, ticket: int) -> None:
        """A request that is here is served elsewhere."""
        if self._tickets.pop(ticket, None) is not None:
            self.enclave.tell(Cancelled(self._clock.now_s, ticket))

    def lose(self) -> None:
        """The whole server is gone, with its scheduler and its requests."""
        self._before = self.counters
        self.losses += 1
        self.alive = self._started = False
        self._tickets.clear()
        self.enclave.close()
        self._renew()

    def _renew(self) -> None:
        """The next enclave, which is not started; a lost one's plans don't open it."""
        losses = self.losses

        def opened() -> None:
            if losses == self.losses:
                self._opened()

        self.enclave = self._make(self.taken_bytes, self._ended, opened)
        self.enclave.slow(self._factor)

    def take_epc(self, taken_bytes: int, pause_s: float) -> None:
        """Others have so much of its EPC: it is lost, and starts again with the rest.

        Parts that don't fit any more it has on disk only.

        Args:
            taken_bytes: of its EPC.
            pause_s: until it starts again.
        """
        self.taken_bytes = taken_bytes
        runs = self.alive or self._started
        if runs:
            self.lose()
        else:  # it is to return at another time, or never
            self._renew()
        fitting: dict[str, Forms] = {}
        for key, forms in self.models.items():
            if self._fit({**fitting, key: forms}):
                fitting[key] = forms
        self.models = fitting
        if runs:
            self.return_after(pause_s)

    def die(self, restart_s: float) -> None:
        """Its enclave is lost, if it runs one, and there is another after so many seconds."""
        if self.alive and self._started:
            self.enclave.die(restart_s)

    def slow(self, factor: float) -> None:
        """From now on runs compute so many times as long as they did at first."""
        self._factor = factor
        self.enclave.slow(factor)

    def return_after(self, pause_s: float) -> None:
        """It is lost, and will start again then with nothing to do."""
        self._clock.at(self._clock.now_s + pause_s, self._start, self.losses)

    def _start(self, losses: int) -> None:
        if losses != self.losses:
            return
        self._started = bool(self.models)
        if self._started:
            self.enclave.start(self.models)
        else:
            self._opened()

    def _opened(self) -> None:
        self._was_opened(self)

    def _ended(self, end: End) -> None:
        flow = self._tickets.pop(end.request, None)
        if flow is None:
            return  # it was cancelled, and the answer was faster
        flow.place = None
        self._left(self, flow, end)
