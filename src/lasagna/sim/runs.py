"""What a run takes in virtual seconds: as ``policy.stages`` reckons, but for waits for weights.

A scheduler has to predict in microseconds, so it takes it that a slice's load overlaps that slice's
computing (``stages.exposed_s``). A real enclave looks ahead as far as its ring reaches, and threads
that wait for weights help to decrypt them. What is simulated is that: predictions are as wrong here
as there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from lasagna.policy.events import Run
from lasagna.policy.plan import MemoryPlan
from lasagna.policy.stages import (
    APART_LOSS,
    SLICE_S,
    Machine,
    copy_s,
    sealing_s,
)

IN_STEP: Final = 0.1
"""Share of a run, that loads no weights itself, in which others of its stage may begin and be in
step with it: the pages that the kernel loads for one are there for the other."""
_PASSES: Final = 3
"""After so many the ring's state at the end of a run is the one at its beginning, nearly."""


class Takes(NamedTuple):
    """What a run takes, the loads once for its gang."""

    total_s: float
    compute_s: float
    seal_s: float
    loads: int
    load_bytes: int
    load_s: float


class Gang:
    """Runs of one stage that share what is loaded; those may join that begin before ``until_s``."""

    __slots__ = ("begin_s", "paging_s", "total_s", "until_s")

    def __init__(self, begin_s: float, total_s: float, paging_s: float, share: float) -> None:
        self.begin_s = begin_s
        self.total_s = total_s
        self.paging_s = paging_s
        self.until_s = begin_s + share * total_s


class Span(NamedTuple):
    """A run under way.

    Attributes:
        begin_s: when it began; end_s: when it will end.
        factor: drawn for its time; None where it has that of a run that it is in step with.
    """

    begin_s: float
    end_s: float
    factor: float | None

    def has_just_begun(self, now_s: float, share: float) -> bool:
        """Whether less than a share of it is over."""
        return now_s - self.begin_s < share * (self.end_s - self.begin_s)

    def ends_soon(self, now_s: float, share: float) -> bool:
        """Whether less than a share of it is left."""
        return self.end_s - now_s < share * (self.end_s - self.begin_s)


def joining_share(plan: MemoryPlan, run: Run) -> float:
    """Share of a run, from its beginning, in which others of its stage join its gang.

    It ends when the ring no longer holds what was loaded first, or, where nothing is loaded, with
    `IN_STEP`.
    """
    pinned = plan.pinned[run.model]
    loads = sum(n not in pinned for n in range(run.first, run.last))
    return min(1.0, plan.slots / loads) if loads else IN_STEP


def reckon(
    plan: MemoryPlan,
    machine: Machine,
    run: Run,
    rows: int,
    factor: float,
    seal_factor: float,
    gang: int,
    idle: int,
) -> Takes:
    """What a run takes, with the loads that its gang shares.

    Args:
        plan: by which it runs.
        machine: in the plan's shape, with the measured loading rate and time of an entry.
        run: of slices.
        rows: in it.
        factor: measured over profiled computing times.
        seal_factor: the same of opening and sealing.
        gang: runs that share its loads, this one included.
        idle: lanes with nothing to do. Where computing takes all cores, the gang's threads and
            those of idle lanes load while it waits; who runs something else does not help.
    """
    costs, pinned = plan.costs[run.model], plan.pinned[run.model]
    first, last = run.first, run.last
    compute_s = machine.batch_s(
        costs.compute_at(first, last, rows), costs.compute_at(first, last, 1)
    )
    compute_s = factor * compute_s + copy_s(costs, first, rows) + SLICE_S * (last - first)
    sizes = [costs.slices[n].weight_bytes for n in range(first, last) if n not in pinned]
    load_s = sum(sizes) / machine.load_rate
    bare_s = load_s / min((gang + idle) * machine.width, machine.cores)
    if machine.spare_cores and sizes:
        steps = [
            (
                factor * machine.batch_s(one.compute_at(rows), one.compute_at(1)) + SLICE_S,
                0.0 if n in pinned else one.weight_bytes / machine.load_rate,
            )
            for n, one in enumerate(costs.slices[first:last], first)
        ]
        threads = min(machine.cores, machine.lanes + 1)  # the loader, and who waits for weights
        bare_s = stall_s(steps, plan.slots, threads)
    seal_s = seal_factor * sealing_s(costs, first, last, rows)
    # Threads with a batch each wait for each other where they share loads; they compute no more.
    lost_s = APART_LOSS * compute_s if gang > 1 and sizes else 0.0
    total_s = max(compute_s, compute_s + lost_s + seal_s + bare_s + machine.entry_s)
    return Takes(total_s, compute_s, seal_s, len(sizes), sum(sizes), load_s)


def stall_s(steps: Sequence[tuple[float, float]], slots: int, threads: int) -> float:
    """Seconds in which a run waits for weights, as one of many runs of the same stage.

    One loader fills the ring ahead; who waits for a slice decrypts along with it. It is DeepPlan's
    recursion (Jeong et al., EuroSys 2023) with a ring of finite length.

    Args:
        steps: of each slice, seconds of computing and of loading; 0 for a pinned one.
        slots: of the ring.
        threads: that decrypt while computing waits.
    """
    now_s = loaded_s = before_s = 0.0
    ends_s: deque[float] = deque([0.0] * slots, maxlen=slots)
    for _ in range(_PASSES):
        before_s = now_s
        for compute_s, load_s in steps:
            if load_s > 0.0:
                loaded_s = max(loaded_s, ends_s[0]) + load_s
                if loaded_s > now_s:
                    begin_s = max(now_s, loaded_s - load_s)  # nobody helps before it can begin
                    loaded_s = begin_s + (loaded_s - begin_s) / threads
                    now_s = max(now_s, loaded_s)
            now_s += compute_s
            if load_s > 0.0:
                ends_s.append(now_s)
    return now_s - before_s - sum(compute_s for compute_s, _ in steps)
