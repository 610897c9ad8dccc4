"""Stages, runs of slices with one largest batch each: what one takes of a machine."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

from lasagna.policy.costs import ModelCosts

ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Batch sizes to choose from."""
SLICE_S: Final = 0.00012
"""What calling a slice costs beside computing: binding, locks, and Python's threads in turn."""
COPY_RATE: Final = 4e9
"""Bytes a second that one thread copies."""
SEAL_RATE: Final = 2e9
"""Bytes a second that one thread opens or seals of rows, with their copies."""
RECORD_S: Final = 0.0001
"""What opening or sealing one row's records costs beside their bytes: keys, nonces, Python."""
TOGETHER_LOSS: Final = 0.15
"""Threads that compute one batch together wait for each other, as long as this share of a row takes
(docs/experiments/0005-local-scheduler.md)."""
APART_LOSS: Final = 0.12
"""Threads with a batch each wait for the slowest where they share loads: this share more."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the enclave has.

    Attributes:
        budget: bytes for everything that a plan names.
        lanes: batches that are computed at once.
        cores: processors for those and for loading.
        load_rate: bytes a second that one thread decrypts.
        entry_s: what a call into the enclave takes.
        chunk_bytes: largest piece of ciphertext that a thread decrypts at once.
        width: threads that compute one batch together; more than one only with one lane.
    """

    budget: int
    lanes: int
    cores: int
    load_rate: float
    entry_s: float
    chunk_bytes: int = 1 << 20
    width: int = 1

    def shapes(self) -> tuple[Machine, ...]:
        """The ways in which its threads may share the work: a batch each, or all on one batch.

        One batch takes the memory of one, so it can be twice as large with two threads, and a load
        of weights serves twice the rows. But threads wait for each other in every layer.
        """
        if self.lanes == 1:
            return (self,)
        return self, replace(self, lanes=1, width=self.lanes * self.width)

    @property
    def most_runs(self) -> int:
        """Runs that may be in the enclave: one on each lane, and the gang that follows them."""
        return 2 * self.lanes

    @property
    def spare_cores(self) -> int:
        """Processors that computing leaves to loading, and to opening requests."""
        return max(0, self.cores - self.lanes * self.width)

    def batch_s(self, compute_s: float, row_s: float) -> float:
        """Seconds that a batch takes on one lane.

        Args:
            compute_s: of one thread that has the machine to itself.
            row_s: the same of a batch of one row.
        """
        if self.width > 1:
            return (compute_s + TOGETHER_LOSS * row_s) / self.width
        return compute_s


@dataclass(frozen=True, slots=True)
class Stage:
    """Slices ``first`` to ``last``, exclusive, on up to ``rows`` rows at once."""

    first: int
    last: int
    rows: int


def copy_s(costs: ModelCosts, cut: int, rows: int) -> float:
    """Seconds of copying a batch's rows to a cut inside the model and from it again."""
    return 2 * rows * costs.cut_bytes[cut] / COPY_RATE if cut else 0.0


def sealing_s(costs: ModelCosts, first: int, last: int, rows: int) -> float:
    """Seconds of opening a batch that comes in at slice 0, and of sealing one that leaves."""
    ends = [costs.cut_bytes[0]] * (not first) + [costs.cut_bytes[-1]] * (last == len(costs.slices))
    return rows * sum(size / SEAL_RATE + RECORD_S for size in ends)


def alone_s(compute_s: float, load_s: float, exposed_s: float, machine: Machine) -> float:
    """Seconds of one run, from its entry to its end.

    Loading overlaps computing where a core is to spare; else all threads load while it pauses.

    Args:
        compute_s: of the threads that compute it together.
        load_s: decrypting its weights, on one thread.
        exposed_s: of that what does not overlap, see ``exposed_s``.
        machine: that it runs on.
    """
    if not machine.spare_cores:
        exposed_s = load_s / min(machine.lanes * machine.width, machine.cores)
    return compute_s + exposed_s + machine.entry_s


def visit_s(compute_s: float, load_s: float, exposed_s: float, machine: Machine) -> float:
    """Seconds of the server for one run: of its lanes, or of its cores if these are short.

    Runs go in gangs, one on each lane, and share what is loaded. Arguments as of ``alone_s``.
    """
    if machine.lanes > 1 and load_s > 0.0:
        compute_s *= 1 + APART_LOSS
    alone = alone_s(compute_s, load_s, exposed_s, machine)
    busy = machine.width * compute_s + load_s / machine.lanes + machine.entry_s
    return max(alone / machine.lanes, busy / machine.cores)


def exposed_s(
    costs: ModelCosts, first: int, last: int, rows: int, pinned: AbstractSet[int], machine: Machine
) -> float:
    """Seconds of a batch's loads that its computing does not hide.

    The ring is short, so a slice's load overlaps about one slice's computing: behind layers that
    have many weights and compute little, the ones that compute long do not help.
    """
    return sum(
        max(
            0.0,
            costs.slices[n].weight_bytes / machine.load_rate - _slice_s(costs, n, rows, machine),
        )
        for n in range(first, last)
        if n not in pinned
    )


def _slice_s(costs: ModelCosts, number: int, rows: int, machine: Machine) -> float:
    one = costs.slices[number]
    return machine.batch_s(one.compute_at(rows), one.compute_at(1)) + SLICE_S


def waiting_rows(before: Stage, after: Stage, lanes: int) -> int:
    """Rows that may be at the cut between two stages at once.

    A gang of the next stage runs, or is about to, another gathers, and one of the stage before
    arrives.
    """
    return lanes * (2 * after.rows + before.rows) - 1
