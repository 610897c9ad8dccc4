"""``lasagna trace``: what ran when inside an enclave, as tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lasagna.bench.spans import IDLE, WORDS, SliceTotal, shares, slice_totals
from lasagna.bench.timeline import (
    batch_growth_png,
    emulation_note,
    percent,
    shown,
    timeline_html,
    timeline_png,
)
from lasagna.errors import UsageError
from lasagna.server.trace import Trace, read_trace

TOP: Final = 10


def trace(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The recording.")],
    png: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw the timeline into a file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="The same as a page to zoom and pan.")
    ] = None,
    batches: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw how batches grow over the slices.")
    ] = None,
    from_: Annotated[
        float | None,
        typer.Option("--from", metavar="S", help="From this second. [default: the first span's]"),
    ] = None,
    to: Annotated[
        float | None,
        typer.Option(metavar="S", help="Until this second. [default: the last span's]"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Report as JSON, with all slices.")] = False,
) -> None:
    """Show what ran when inside an enclave.

    Without a picture to draw it prints where each thread's time went, and which slices took most.
    """
    recording = read_trace(path)
    begin_s, end_s = _window(recording, path, from_, to)
    written = []
    if png:
        timeline_png(recording, png, begin_s, end_s)
        written.append(png)
    if html:
        timeline_html(recording, html, begin_s, end_s)
        written.append(html)
    if batches:
        batch_growth_png(recording.between(begin_s, end_s), batches)
        written.append(batches)
    for file in written:
        typer.echo(f"wrote {file}", err=json_)
    if json_:
        typer.echo(msgspec.json.encode(_facts(recording, begin_s, end_s)).decode())
    elif not written:
        _show(Console(), recording, begin_s, end_s)


def _window(
    recording: Trace, path: Path, from_: float | None, to: float | None
) -> tuple[float, float]:
    """The window that was asked for, as far as there is a recording."""
    if not recording.spans:
        raise UsageError(
            f"{path} has no spans: nothing ran in the enclave while it was recorded; send it "
            "requests meanwhile"
        )
    first = min(span.begin_s for span in recording.spans)
    last = max(span.end_s for span in recording.spans)
    begin = first if from_ is None else max(from_, min(0.0, first))
    if from_ is not None and not from_ < last:
        raise UsageError(f"--from {from_:g} is not before the recording's end at {last:g} s")
    if to is not None and not to > begin:
        raise UsageError(f"--to {to:g} is not after the window's begin at {begin:g} s")
    end = last if to is None else min(to, last)
    if not begin < end:
        raise UsageError(f"{path} has only spans of no duration, at {begin:g} s")
    return begin, end


def _facts(recording: Trace, begin_s: float, end_s: float) -> Mapping[str, object]:
    """For JSON. Seconds of a slice are of all threads, by kind."""
    samples = recording.between(begin_s, end_s).faults
    return {
        "header": recording.header,
        "begin_s": begin_s,
        "end_s": end_s,
        "shares": shares(recording, begin_s, end_s),
        "slices": slice_totals(recording, begin_s, end_s),
        "faults": {
            "pages": sum(sample.pages for sample in samples),
            "seconds": sum(sample.seconds for sample in samples),
        },
    }


def _show(console: Console, recording: Trace, begin_s: float, end_s: float) -> None:
    header = recording.header
    if header.emulated:
        console.print(Text(emulation_note(recording), style="bold red"))
    names = ", ".join(map(shown, header.models))
    console.print(Text(f"{names}, policy {shown(header.policy)}, on {shown(header.machine)}"))
    console.print(_share_table(shares(recording, begin_s, end_s), begin_s, end_s))
    console.print()
    console.print(_slice_table(slice_totals(recording, begin_s, end_s)))
    samples = recording.between(begin_s, end_s).faults
    if samples:
        pages = sum(sample.pages for sample in samples)
        seconds = sum(sample.seconds for sample in samples)
        console.print(f"\n{pages:,} page faults, which took threads {seconds:.3f} s")


def _table(title: str) -> Table:
    # Narrow: all kinds fit into 80 columns.
    return Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _share_table(found: Mapping[str, Mapping[str, float]], begin_s: float, end_s: float) -> Table:
    table = _table(f"Share of time from {begin_s:.3f} to {end_s:.3f} s")
    table.add_column("thread", overflow="fold")
    kinds = [kind for kind in WORDS if any(kind in own for own in found.values())]
    for kind in kinds:
        table.add_column(WORDS[kind], justify="right")
    for thread, own in found.items():
        cells = [percent(own[kind]) if kind in own else "" for kind in kinds]
        table.add_row(Text(shown(thread)), *cells)
    return table


def _slice_table(totals: Sequence[SliceTotal]) -> Table:
    shortened = f", the {TOP} of {len(totals)} that took most" if len(totals) > TOP else ""
    table = _table(f"Milliseconds by slice{shortened}")
    table.add_column("model", overflow="fold")
    for heading in ("slice", "runs", "mean rows"):
        table.add_column(heading, justify="right")
    top = totals[:TOP]
    kinds = [kind for kind in WORDS if kind != IDLE and any(kind in one.seconds for one in top)]
    for kind in kinds:
        table.add_column(WORDS[kind], justify="right")
    for one in top:
        times = [f"{1000 * one.seconds[k]:.1f}" if k in one.seconds else "" for k in kinds]
        row = [str(one.slice), str(one.runs), f"{one.mean_rows:.1f}", *times]
        table.add_row(Text(shown(one.model)), *row)
    return table
