"""Who is served next among tenants: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Every tenant has a virtual time: the work that it was given, divided by its weight. The one that is
furthest behind is next. A tenant that had nothing to do begins where the others are: what it did
not use is not saved up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

OUT_OF_TURN: Final = 16
"""Every so-many-th request may go first because it has waited too long. At saturation all have, and
shares and priorities would mean nothing if they all did."""
TENANTS_KEPT: Final = 1024
"""So many tenants are remembered at least: anybody may invent names."""


@dataclass(slots=True)
class Waiting:
    """A request outside the enclave, and its rows that nobody has taken.

    Attributes:
        request: its id.
        tenant: whose it is.
        priority: higher goes first.
        since_s: when it arrived.
        deadline_s: when its answer is worth nothing any more; infinity for never.
        first: the first row that is left.
        rows: that are left.
    """

    request: int
    tenant: str
    priority: int
    since_s: float
    deadline_s: float
    first: int
    rows: int


class Shares:
    """The tenants' virtual times, over all models of a server."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Tenants that are not named have weight 1; all weights are above 0."""
        assert all(weight > 0 for weight in weights.values())
        self._weights = dict(weights)
        self._times: dict[str, float] = {}
        self._most = TENANTS_KEPT
        self._now = 0.0

    def woke(self, tenant: str) -> None:
        """The tenant has something to do again."""
        self._times[tenant] = max(self._times.get(tenant, 0.0), self._now)

    def behind(self, tenant: str) -> float:
        """Its virtual time; the least is next."""
        return self._times.get(tenant, self._now)

    def served(self, tenant: str, work_s: float) -> None:
        """It was given so much work. Who waits keeps what it is behind by: batches are of one."""
        start = self._times.get(tenant, self._now)
        self._now = max(self._now, start)
        self._times[tenant] = start + work_s / self._weights.get(tenant, 1.0)
        if len(self._times) > self._most:  # one that is not ahead is as good as unknown
            self._times = {name: time for name, time in self._times.items() if time > self._now}
            self._most = max(TENANTS_KEPT, 2 * len(self._times))


class FairQueue:
    """Requests for one model that wait outside the enclave."""

    def __init__(self, shares: Shares) -> None:
        """Empty, with the shares of all models."""
        self._shares = shares
        self._lines: dict[int, OrderedDict[str, OrderedDict[int, Waiting]]] = {}
        self._oldest: OrderedDict[int, Waiting] = OrderedDict()
        self._in_turn = OUT_OF_TURN
        self.rows = 0

    def push(self, waiting: Waiting) -> None:
        """A request came in."""
        tenants = self._lines.setdefault(waiting.priority, OrderedDict())
        line = tenants.setdefault(waiting.tenant, OrderedDict())
        if not line:
            self._shares.woke(waiting.tenant)
        line[waiting.request] = waiting
        self._oldest[waiting.request] = waiting
        self.rows += waiting.rows

    def head(self, now_s: float, patience_s: float) -> Waiting | None:
        """Who is next: who has waited too long, else by priority and then by share."""
        if not self._oldest:
            return None
        if self.overdue(now_s, patience_s):
            return next(iter(self._oldest.values()))
        tenants = self._lines[max(self._lines)]
        tenant = min(tenants, key=self._shares.behind) if len(tenants) > 1 else next(iter(tenants))
        return next(iter(tenants[tenant].values()))

    def overdue(self, now_s: float, patience_s: float) -> bool:
        """Whether the oldest has waited too long, and may go before its turn."""
        if self._in_turn < OUT_OF_TURN:
            return False
        oldest = self.oldest()
        return oldest is not None and now_s - oldest.since_s >= patience_s

    def behind(self) -> float:
        """Virtual time of the tenant whose turn it is; the least of all models' goes first."""
        return min(map(self._shares.behind, self._lines[max(self._lines)]))

    def oldest(self) -> Waiting | None:
        """Who has waited longest."""
        return next(iter(self._oldest.values()), None)

    def left(self, request: int) -> int:
        """How many rows of a request wait here."""
        waiting = self._oldest.get(request)
        return waiting.rows if waiting is not None else 0

    def take(self, waiting: Waiting, rows: int, work_s: float) -> None:
        """So many rows of a request go into the enclave; its tenant is charged for the work."""
        assert 0 < rows <= waiting.rows
        first = self.oldest() is waiting and self._in_turn >= OUT_OF_TURN
        self._in_turn = 0 if first else self._in_turn + 1
        self._shares.served(waiting.tenant, work_s)
        waiting.first += rows
        waiting.rows -= rows
        self.rows -= rows
        if not waiting.rows:
            self._remove(waiting)

    def remove(self, request: int) -> None:
        """A request is gone; nothing happens if it is not here."""
        waiting = self._oldest.get(request)
        if waiting is not None:
            self.rows -= waiting.rows
            self._remove(waiting)

    def _remove(self, waiting: Waiting) -> None:
        del self._oldest[waiting.request]
        tenants = self._lines[waiting.priority]
        del tenants[waiting.tenant][waiting.request]
        if not tenants[waiting.tenant]:
            del tenants[waiting.tenant]
        if not tenants:
            del self._lines[waiting.priority]

    def __iter__(self) -> Iterator[Waiting]:
        """All that wait, in order of arrival."""
        return iter(tuple(self._oldest.values()))
