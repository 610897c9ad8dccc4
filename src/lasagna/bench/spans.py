"""What a recording (``server.trace``) says: where time went, batches, page faults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lasagna.errors import UsageError
from lasagna.server.trace import Faults, Span, Trace

IDLE: Final = "idle"
WORDS: Final = {
    "compute": "computing",
    "stall": "stalled",
    "load": "loading",
    "open": "opening",
    "seal": "sealing",
    "gather": "gathering",
    "pin": "pinning",
    IDLE: IDLE,
}
"""The kinds as people read them, in the order in which they are shown."""

_THREADS: Final = ("compute", "loader", "main")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a thread's time that belongs to one span."""

    span: Span
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Page faults between two samples: pages a second, and how many threads they kept busy."""

    begin_s: float
    end_s: float
    pages: float
    threads: float


@dataclass(frozen=True, slots=True)
class SliceTotal:
    """What one slice took in a window.

    Attributes:
        model: whose slice.
        slice: its number.
        seconds: of all threads, by kind, each moment counted once.
        runs: how often it ran.
        mean_rows: in a batch; 0 if it never ran.
    """

    model: str
    slice: int
    seconds: Mapping[str, float]
    runs: int
    mean_rows: float


def threads(trace: Trace) -> tuple[str, ...]:
    """All threads, those that never did anything included: compute, loader, main, others."""
    found = {f"compute {number}" for number in range(trace.header.lanes)}
    found |= {span.thread for span in trace.spans}

    def place(thread: str) -> tuple[int, int, str]:
        word = thread.partition(" ")[0]
        return [*_THREADS, word].index(word), len(thread), thread

    return tuple(sorted(found, key=place))


def pieces(spans: Iterable[Span], begin_s: float, end_s: float) -> list[Piece]:
    """One thread's window, each moment given to the innermost span: the one that began last.

    Of spans that begin together the shortest is innermost. What is in no piece is idle.
    """
    touching = (one for one in spans if one.begin_s < end_s and one.end_s > begin_s)
    found: list[Piece] = []
    running: list[Span] = []
    at = begin_s

    def pass_until(until: float) -> None:
        nonlocal at
        while running and at < until:
            stop = min(running[-1].end_s, until)
            if stop > at:
                found.append(Piece(running[-1], at, stop))
                at = stop
            if running[-1].end_s <= at:
                running.pop()
        at = until

    for span in sorted(touching, key=lambda one: (one.begin_s, -one.end_s)):
        pass_until(max(begin_s, span.begin_s))
        running.append(span)
    pass_until(end_s)
    return found


def pieces_by_thread(trace: Trace, begin_s: float, end_s: float) -> dict[str, list[Piece]]:
    """The pieces of every thread.

    Raises:
        UsageError: the window is empty.
    """
    if not begin_s < end_s:
        raise UsageError(f"a window ends after it begins: not from {begin_s:g} s to {end_s:g} s")
    spans: dict[str, list[Span]] = {thread: [] for thread in threads(trace)}
    for span in trace.spans:
        spans[span.thread].append(span)
    return {thread: pieces(own, begin_s, end_s) for thread, own in spans.items()}


def shares(trace: Trace, begin_s: float, end_s: float) -> dict[str, dict[str, float]]:
    """Of each thread's time in a window, the share of each kind that occurs, and of being idle.

    Each moment counts once, for the innermost span; the shares of a thread add up to 1.

    Raises:
        UsageError: the window is empty.
    """
    return {
        thread: _shares(own, end_s - begin_s)
        for thread, own in pieces_by_thread(trace, begin_s, end_s).items()
    }


def _shares(own: Sequence[Piece], seconds: float) -> dict[str, float]:
    busy: defaultdict[str, float] = defaultdict(float)
    for piece in own:
        busy[piece.span.kind] += (piece.end_s - piece.begin_s) / seconds
    busy[IDLE] = max(0.0, 1.0 - sum(busy.values()))
    return {kind: busy[kind] for kind in WORDS if kind in busy}


def slice_totals(trace: Trace, begin_s: float, end_s: float) -> list[SliceTotal]:
    """What every slice took in a window, the one that took most first.

    Raises:
        UsageError: the window is empty.
    """
    seconds: defaultdict[tuple[str, int], defaultdict[str, float]]
    seconds = defaultdict(lambda: defaultdict(float))
    for own in pieces_by_thread(trace, begin_s, end_s).values():
        for piece in own:
            if piece.span.slice >= 0:
                place = seconds[piece.span.model, piece.span.slice]
                place[piece.span.kind] += piece.end_s - piece.begin_s
    rows = batches(trace.between(begin_s, end_s))
    found = []
    for (model, number), kinds in seconds.items():
        own_rows = rows.get((model, number), [])
        mean = sum(own_rows) / max(1, len(own_rows))
        found.append(SliceTotal(model, number, dict(kinds), len(own_rows), mean))
    return sorted(found, key=lambda one: (-sum(one.seconds.values()), one.model, one.slice))


def batches(trace: Trace) -> dict[tuple[str, int], list[int]]:
    """The rows of every batch, by model and slice."""
    found: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for span in trace.spans:
        if span.kind == "compute" and span.slice >= 0 and span.rows > 0:
            found[span.model, span.slice].append(span.rows)
    return found


def fault_rates(faults: Iterable[Faults], begin_s: float, end_s: float) -> list[Rate]:
    """Page faults as rates, cut to a window; the first sample counts from 0.

    A sample taken at the same time as the one before adds to the next.
    """
    found: list[Rate] = []
    ordered = sorted(faults, key=lambda one: one.at_s)
    pages, seconds, since = 0, 0.0, 0.0
    for sample in ordered:
        pages, seconds = pages + sample.pages, seconds + sample.seconds
        passed = sample.at_s - since
        if passed <= 0:
            continue
        begin, end = max(since, begin_s), min(sample.at_s, end_s)
        if begin < end:
            found.append(Rate(begin, end, pages / passed, seconds / passed))
        pages, seconds, since = 0, 0.0, sample.at_s
    return found


def models(trace: Trace) -> list[str]:
    """The header's models, and those that only spans name."""
    return list(dict.fromkeys([*trace.header.models, *(span.model for span in trace.spans)]))
