"""What a balancer believes of servers and links: leaky buckets, filled by what it sends.

A bucket drains by a second each second. A server's is filled by the work that each request means
when batches are full, and every report of the server sets it right. So that belief is wrong by what
others have sent to the server since it was measured: no more than arrives in the reporting period
and the delay of a report, and no more than that much time can drain. Of links there are no reports:
other balancers are believed to send as much as this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from lasagna.policy.cluster import Server
from lasagna.policy.placed import PartCosts

SENDS_KEPT: Final = 10_000
"""Requests of a server that are remembered until its next report."""


@dataclass(slots=True, eq=False)
class Bucket:
    """Seconds until something is free that serves one thing after the other."""

    level_s: float = 0.0
    at_s: float = 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds from then on."""
        left_s = self.level_s
        if now_s > self.at_s:
            left_s -= now_s - self.at_s
        return max(0.0, left_s)

    def fill(self, at_s: float, work_s: float) -> None:
        """So much more from then on."""
        self.level_s = self.wait_s(at_s) + work_s
        self.at_s = max(self.at_s, at_s)

    def fill_all(self, works: Iterable[tuple[float, float]]) -> None:
        """As ``fill`` with each of these times and works, but quicker.

        Over slow links many requests are on their way whenever a server reports.
        """
        level_s, last_s = self.level_s, self.at_s
        for at_s, work_s in works:
            if at_s > last_s:
                level_s -= at_s - last_s
                last_s = at_s
                if level_s < 0.0:
                    level_s = 0.0
            level_s += work_s
        self.level_s, self.at_s = level_s, last_s


@dataclass(slots=True, eq=False)
class Belief:
    """What is believed of one server.

    Attributes:
        server: that it is about.
        alive: whether requests may be sent there.
        outstanding: requests that are on their way to it or in it.
        factor: by which it is slower than predicted.
        measured_s: when the last report was measured.
        down: its link towards it; up: from it.
        work: that it has to do.
    """

    server: Server
    alive: bool = True
    outstanding: int = 0
    factor: float = 1.0
    measured_s: float = float("-inf")
    down: Bucket = field(default_factory=Bucket)
    up: Bucket = field(default_factory=Bucket)
    work: Bucket = field(default_factory=Bucket)
    _sends: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SENDS_KEPT))

    def backlog_s(self, now_s: float) -> float:
        """Seconds of work before a request that comes in then."""
        return self.work.wait_s(now_s)

    def through_s(self, costs: PartCosts, rows: int) -> float:
        """Seconds of a request in it, when its turn has come."""
        return self.factor * (costs.through_s + (rows - 1) * costs.work_s)

    def send(self, arrives_s: float, work_s: float) -> None:
        """A request will come in there, and mean so much work."""
        self._sends.append((arrives_s, work_s))
        self.work.fill(arrives_s, work_s)

    def report(self, measured_s: float, backlog_s: float, factor: float) -> None:
        """It was so; what was sent since then comes on top."""
        if measured_s < self.measured_s:
            return  # overtaken on its way
        self.measured_s, self.factor = measured_s, factor
        # A request sent later may arrive earlier, by a shorter way: so not only the first are over.
        coming = [send for send in self._sends if send[0] > measured_s]
        if len(coming) < len(self._sends):
            self._sends.clear()
            self._sends.extend(coming)
        self.work = Bucket(backlog_s, measured_s)
        self.work.fill_all(coming)

    def empty(self) -> None:
        """It has begun anew."""
        self.work, self.down, self.up = Bucket(), Bucket(), Bucket()
        self._sends.clear()


def carried_s(
    size: int, now_s: float, sender: Belief | None, receiver: Belief | None, senders: int = 0
) -> float:
    """When bytes that are sent then are expected to be there.

    Links carry one thing after the other. What comes over two of them is on both at once: the
    second begins as soon as the first byte is at the switch.

    Args:
        size: bytes.
        now_s: when they are sent.
        sender: whose link they leave by; None for a client.
        receiver: whose link they come by; None for a client.
        senders: who sends as much at the same time, this one included: so many times is noted on
            the links. 0 for a question only.
    """
    if sender is receiver:
        return now_s
    first_s = last_s = now_s
    if sender is not None:
        takes_s = size / sender.server.bandwidth
        begin_s = now_s + sender.up.wait_s(now_s)
        if senders:
            sender.up.fill(now_s, senders * takes_s)
        first_s = begin_s + sender.server.delay_s
        last_s = first_s + takes_s
    if receiver is not None:
        takes_s = size / receiver.server.bandwidth
        ends_s = first_s + receiver.down.wait_s(first_s) + takes_s
        if senders:
            receiver.down.fill(first_s, senders * takes_s)
        last_s = max(ends_s, last_s) + receiver.server.delay_s
    return last_s
