"""``lasagna epc``: any program in an emulated EPC."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lasagna.tee.epc import CANNOT_START, MIN_PAGES, emulator_environment, stats_folder
from lasagna.tee.epc_profiles import end_named, profile, profiles
from lasagna.tee.epc_stats import OTHERS, EpcStats, StatsFile, processes, stats_path
from lasagna.tee.footprint import OBSERVE_S, Footprint, Observer
from lasagna.units import PAGE, format_bytes, parse_bytes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run any program with an enclave's memory limit, and watch it page.",
)
WARNING: Final = "emulated EPC: real page traffic, charged as published; it protects nothing"
_THREADS_SHOWN: Final = 8
NOT_FOUND: Final = 127
NOT_RUNNABLE: Final = 126


@app.command("run", context_settings={"ignore_unknown_options": True})
def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after --.")],
    *,
    profile_name: Annotated[
        str, typer.Option("--profile", help="Whose limit and costs; see 'lasagna epc profiles'.")
    ] = "sgx1-128",
    end: Annotated[
        str, typer.Option(help="Of each published range: low, typical or high.")
    ] = "typical",
    limit: Annotated[
        str, typer.Option(help="Resident memory instead of the profile's, as 64MiB.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Report as JSON, on stderr.")] = False,
) -> None:
    """Run a program with the memory limit and the page costs of an enclave.

    Its large allocations share so many resident pages; beyond that, pages are encrypted and moved
    out, and decrypted, checked and moved in when touched. A report follows on standard error. The
    exit status is the program's; 125 if it can't run emulated.
    """
    costs = profile(profile_name).costs(end_named(end, "--end"))
    pages = parse_bytes(limit) // PAGE if limit else None
    folder = stats_folder()
    environment = os.environ | emulator_environment(costs, folder, pages, keep=True)
    begin = time.perf_counter()
    try:
        child = subprocess.Popen(command, env=environment)
    except FileNotFoundError:
        raise _Failed(f"there is no program {command[0]!r}", NOT_FOUND) from None
    except OSError as error:
        raise _Failed(f"{command[0]} can't be run: {error.strerror}", NOT_RUNNABLE) from None

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    # Ctrl-C reaches the program by itself: the terminal sends it to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    path = stats_path(folder, child.pid)
    limit_pages = costs.limit_pages if pages is None else pages
    observer = Observer(path, limit_pages)
    while (status := _wait(child)) is None:
        with contextlib.suppress(OSError):  # it is about to end
            observer.observe()
    seconds = time.perf_counter() - begin
    if status != CANNOT_START and not path.exists():
        raise _Failed(f"{command[0]} ran without the emulator: see above", CANNOT_START)
    if status != CANNOT_START:
        facts = summary(StatsFile(path).read(), seconds, limit_pages, observer.footprint)
        print_report(facts, as_json=as_json)
    path.unlink(missing_ok=True)
    raise typer.Exit(status if status >= 0 else 128 - status)


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """Its status; None if it has not ended for a while."""
    try:
        return child.wait(OBSERVE_S)
    except subprocess.TimeoutExpired:
        return None


class _Failed(typer.Exit):
    """Say why on standard error, and end with this status."""

    def __init__(self, message: str, status: int) -> None:
        typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
        super().__init__(status)


def summary(
    stats: EpcStats, seconds: float, limit_pages: int, footprint: Footprint | None
) -> Mapping[str, object]:
    """What a program did in the EPC, for people and for JSON.

    Args:
        stats: of its process, at its end.
        seconds: that it ran.
        limit_pages: that all of it might have resident.
        footprint: what it used outside the emulated region; None, or nothing in it, if it ended too
            soon to be measured.
    """
    measured = footprint if footprint is not None and footprint.hot_bytes else None
    latency = stats["own_latency_ns"] + stats["own_load_ns"]
    return {
        "emulated": True,
        "seconds": seconds,
        "limit_bytes": limit_pages * PAGE,
        "peak_resident_bytes": stats["peak_resident_pages"] * PAGE,
        "hot_outside_and_deducted_bytes": measured and measured.hot_bytes,
        "resident_outside_bytes": measured and measured.resident_bytes,
        "hot_outside_exceeds_the_limit": measured is not None and measured.exceeds_limit,
        "pages_added": stats["added"],
        "pages_loaded": stats["loaded"],
        "pages_brought_ahead": stats["ahead"],
        "pages_evicted": stats["evicted"],
        "second_chances": stats["second_chances"],
        "faults_that_waited_for_a_frame": stats["waits"],
        "waited_for_a_frame_s": stats["wait_ns"] / 1e9,
        "paging_s": stats["load_ns"] / 1e9,
        "reclaimer_s": stats["evict_ns"] / 1e9,
        "transitions": stats["entries"],
        "transitions_s": stats["entry_ns"] / 1e9,
        "charge_of_a_load_ns": stats["charge_load_ns"],
        "own_cost_of_a_load_ns": latency,
        "charge_of_an_eviction_ns": stats["charge_evict_ns"],
        "own_cost_of_an_eviction_ns": stats["own_evict_ns"],
        "loads_above_their_charge": stats["late_loads"],
        "evictions_above_their_charge": stats["late_evicts"],
        "not_made_good_s": stats["unpaid_ns"] / 1e9,
        "threads": _threads(stats),
    }


def _threads(stats: EpcStats) -> list[dict[str, object]]:
    """What each thread waited for, most first; its id is None for those that share an entry."""
    return [
        {
            "tid": None if thread.tid == OTHERS else thread.tid,
            "pages": thread.faults,
            "paging_s": thread.fault_ns / 1e9,
        }
        for thread in sorted(stats.threads, key=lambda thread: -thread.faults)
    ]


def print_report(facts: Mapping[str, object], *, as_json: bool) -> None:
    """Print what :func:`summary` says, on standard error."""
    if as_json:
        typer.echo(msgspec.json.encode(facts).decode(), err=True)
        return
    table = Table(title=Text(WARNING), title_justify="left", show_header=False)
    for name, value in facts.items():
        if name == "threads" or isinstance(value, bool):
            continue
        shown = f"{value:,}" if isinstance(value, int) else f"{value or 0.0:.3f}"
        if value is None:
            shown = "not measured"
        if name.endswith("_bytes") and isinstance(value, int):
            shown = format_bytes(value)
        label = name.removesuffix("_bytes").replace("_s", " s") if name.endswith("_s") else name
        table.add_row(label.removesuffix("_bytes").replace("_", " "), shown)
    threads = facts["threads"]
    assert isinstance(threads, list)
    for thread in threads[:_THREADS_SHOWN]:
        name = "other threads" if thread["tid"] is None else f"thread {thread['tid']}"
        table.add_row(name, f"{thread['pages']:,} pages, {thread['paging_s']:.3f} s")
    if len(threads) > _THREADS_SHOWN:
        table.add_row("more threads", f"{len(threads) - _THREADS_SHOWN} (--json lists them)")
    console = Console(stderr=True)
    console.print(table)
    _print_notes(console, facts)


def _print_notes(console: Console, facts: Mapping[str, object]) -> None:
    if facts["hot_outside_exceeds_the_limit"]:
        console.print(
            "note: what is hot outside the emulated region does not fit into the limit; the "
            f"program paged in {format_bytes(MIN_PAGES * PAGE)}, the least that the emulator can "
            "do with, so it had more memory than the limit",
            style="yellow",
        )
    late, loads, added = (
        facts[name] for name in ("loads_above_their_charge", "pages_loaded", "pages_added")
    )
    assert isinstance(late, int)
    assert isinstance(loads, int)
    assert isinstance(added, int)
    if late * 10 > loads + added:
        console.print(
            f"note: {late:,} of {loads + added:,} pages took longer here than the profile charges; "
            "later ones made that good, but for the time that was not made good",
            style="yellow",
        )


@app.command("top")
def top(
    *,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
) -> None:
    """Show what all emulated processes of yours do, once a second. Ctrl-C ends it."""
    folder = stats_folder()
    if as_json:
        found = {
            str(pid): {**stats.counters, "threads": _threads(stats)}
            for pid, stats in _sample(folder).items()
        }
        typer.echo(msgspec.json.encode(found).decode())
        return
    console = Console()
    before = _sample(folder)
    if once:
        console.print(_top(before, before, 1.0))
        return
    begin = time.monotonic()
    try:
        with Live(_top(before, before, 1.0), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1.0)
                now, end = _sample(folder), time.monotonic()
                live.update(_top(now, before, end - begin), refresh=True)
                before, begin = now, end
    except KeyboardInterrupt:
        return


def _sample(folder: Path) -> dict[int, EpcStats]:
    return {int(file.path.stem): file.read() for file in processes(folder)}


def _top(now: Mapping[int, EpcStats], before: Mapping[int, EpcStats], seconds: float) -> Table:
    table = Table(title=Text(WARNING), title_justify="left")
    for heading in ("pid", "program", "resident", "limit", "loads/s", "evictions/s", "paging"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for pid, stats in now.items():
        earlier = before.get(pid, stats)

        def rate(name: str, stats: EpcStats = stats, earlier: EpcStats = earlier) -> float:
            return (stats[name] - earlier[name]) / seconds

        table.add_row(
            str(pid),
            Text(_program(pid)),
            format_bytes(stats["resident_pages"] * PAGE),
            format_bytes(stats["limit_pages"] * PAGE),
            f"{rate('loaded') + rate('added'):,.0f}",
            f"{rate('evicted'):,.0f}",
            f"{rate('load_ns') / 1e7:.0f} %",
        )
    return table


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


@app.command("profiles")
def show_profiles(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False
) -> None:
    """Show the profiles: what is charged, its range, and where that is from."""
    if as_json:
        typer.echo(msgspec.json.encode(profiles()).decode())
        return
    console = Console()
    for name, one in profiles().items():
        table = Table(title=f"{name}: {one.summary}", title_justify="left")
        for heading in ("figure", "value", "low", "high", "grade", "source"):
            table.add_column(
                heading, justify="right" if heading in ("value", "low", "high") else "left"
            )
        for field in one.__struct_fields__[1:]:
            figure = getattr(one, field)
            ends = [
                f"{figure.at(end):,g}"
                if figure.at(end) < 1e6
                else format_bytes(int(figure.at(end)))
                for end in ("typical", "low", "high")
            ]
            table.add_row(field, *ends, figure.grade, figure.source)
        console.print(table)
