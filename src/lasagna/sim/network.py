"""Links between servers: a star of one uplink and one downlink each, which are queues.

Bytes go through a switch that forwards them as they come. A transfer takes its turn on the sender's
uplink, and, when its first byte is at the switch, on the receiver's downlink; on idle links it
takes ``policy.cluster.carry_s``. Clients' own links are never in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lasagna.policy.cluster import Server
from lasagna.sim.clock import Clock


class Link:
    """One direction of a server's link: who comes first is carried first."""

    __slots__ = ("_bandwidth", "_busy_s", "_bytes", "_free_s")

    def __init__(self, bandwidth: float) -> None:
        """Idle.

        Args:
            bandwidth: bytes a second.
        """
        self._bandwidth = bandwidth
        self._free_s = 0.0
        self._bytes = 0
        self._busy_s = 0.0

    def carry(self, size: int, now_s: float) -> tuple[float, float]:
        """Take so many bytes on; when the first one leaves, and when the last has left."""
        begin_s = max(now_s, self._free_s)
        takes_s = size / self._bandwidth
        self._free_s = begin_s + takes_s
        self._bytes += size
        self._busy_s += takes_s
        return begin_s, self._free_s

    def done(self, now_s: float) -> tuple[int, float]:
        """Bytes that it has carried by then, and seconds in which it did; not what still waits."""
        left_s = max(0.0, self._free_s - now_s)
        return self._bytes - round(left_s * self._bandwidth), self._busy_s - left_s


class Network:
    """The links of a cluster's servers.

    Attributes:
        up: each server's link to the switch, by name; down: from the switch.
    """

    def __init__(self, clock: Clock, servers: Iterable[Server]) -> None:
        """All idle.

        Args:
            clock: of everything that is simulated.
            servers: on the switch.
        """
        self._clock = clock
        self._servers = {server.name: server for server in servers}
        self.up = {name: Link(server.bandwidth) for name, server in self._servers.items()}
        self.down = {name: Link(server.bandwidth) for name, server in self._servers.items()}

    def send(
        self,
        size: int,
        sender: str | None,
        receiver: str | None,
        arrived: Callable[[Any], None],
        facts: Any = None,
    ) -> None:
        """Carry bytes, then call ``arrived(facts)``: never at once, at the earliest after this.

        Args:
            size: in bytes.
            sender: name of a server; None for a client.
            receiver: name of a server; None for a client.
            arrived: is called when the last byte is there.
            facts: for it.
        """
        clock = self._clock
        if sender == receiver:
            clock.at(clock.now_s, arrived, facts)
            return
        if sender is None:
            assert receiver is not None
            self._descend((size, receiver, clock.now_s, arrived, facts))
            return
        delay_s = self._servers[sender].delay_s
        begin_s, end_s = self.up[sender].carry(size, clock.now_s)
        if receiver is None:
            clock.at(end_s + delay_s, arrived, facts)
        else:
            last_s = end_s + delay_s
            clock.at(begin_s + delay_s, self._descend, (size, receiver, last_s, arrived, facts))

    def _descend(self, facts: tuple[int, str, float, Callable[[Any], None], Any]) -> None:
        """The first byte is at the switch, the last one will be at ``last_s``."""
        size, receiver, last_s, arrived, what = facts
        _, end_s = self.down[receiver].carry(size, self._clock.now_s)
        delay_s = self._servers[receiver].delay_s
        self._clock.at(max(end_s, last_s) + delay_s, arrived, what)
