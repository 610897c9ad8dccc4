"""``lasagna plan``: which slices of which models on which servers, and what that promises."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lasagna.cli.cluster_file import read_cluster
from lasagna.cli.costs_file import read_costs
from lasagna.cli.files import check_drawable, check_writable, write_file
from lasagna.cli.plan_drawing import headline, plain, plan_html, plan_png, subtitles
from lasagna.cli.plan_lanes import Lane, lanes_of
from lasagna.errors import UsageError
from lasagna.policy.cluster import Cluster, Part
from lasagna.policy.costs import Forms
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.plan import Objective, objective_named
from lasagna.sim.candidates import EARLIEST, Candidate
from lasagna.sim.judging import Judged, plan_judged, promised
from lasagna.units import format_bytes

FORMAT: Final = 1


def plan(
    *,
    path: Annotated[
        Path, typer.Argument(metavar="CLUSTER.toml", help="Servers, links and demand.")
    ],
    models: Annotated[
        list[Path],
        typer.Argument(help="Sealed packages, or their costs (lasagna inspect --costs)."),
    ],
    objective: Annotated[
        str, typer.Option(help="What counts most: throughput or latency.")
    ] = "throughput",
    time_limit: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="Seconds after which the search ends.")
    ] = 10.0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Let simulations choose among several plans.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write the plan into a file.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the servers' memory into a file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same as a page to zoom.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
) -> None:
    """Plan which slices of models live on which servers of a cluster.

    Nothing is sent to any server: it reads files, and predicts from sizes and measured times.
    """
    wanted = objective_named(objective)
    cluster = _cluster(path, models)
    check_writable(out, html)
    check_drawable(png)
    console = Console(stderr=True)
    quiet = json_ or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        bar.add_task("planning", total=None)
        judged = _judged(cluster, wanted, time_limit, simulate=simulate)
    placement = judged.best.placement
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("memory of each server", total=len(cluster.servers))
        lanes = lanes_of(
            cluster,
            placement,
            lambda done, total: bar.update(task, completed=done, total=total),
            style=judged.best.style,  # as ``policy.settle`` has reckoned
        )
    report = msgspec.json.format(msgspec.json.encode(report_of(cluster, judged, lanes)))
    if json_:
        typer.echo(report.decode())
    else:
        _show(Console(), cluster, judged, lanes)
    if out:
        write_file(out, report)
        typer.echo(f"wrote {out}", err=True)
    if png:
        plan_png(cluster, placement, lanes, png)
        typer.echo(f"wrote {png}", err=True)
    if html:
        plan_html(cluster, placement, lanes, html)
        typer.echo(f"wrote {html}", err=True)


def _cluster(path: Path, models: Sequence[Path]) -> Cluster:
    return read_cluster(path).cluster(read_models(models))


def read_models(paths: Sequence[Path]) -> dict[str, Forms]:
    """Costs of models, by their names.

    Raises:
        UsageError: a file is no costs, or two are of models of one name.
        PackageError: a package is malformed, or not for this processor.
    """
    found: dict[str, Forms] = {}
    origins: dict[str, Path] = {}
    for path in paths:
        name, forms = read_costs(path)
        if name in found:
            raise UsageError(f"{origins[name]} and {path} are both of the model {name!r}")
        found[name], origins[name] = forms, path
    return found


def _judged(
    cluster: Cluster, objective: Objective, time_limit_s: float, *, simulate: bool
) -> Judged:
    options = PlanOptions(objective=objective, time_limit_s=time_limit_s)
    with silent_library():
        if simulate:
            judged = plan_judged(cluster, options, clock=time.monotonic)
            promise = promised(cluster, judged, objective)
            return replace(judged, best=replace(judged.best, placement=promise))
        placement = plan_cluster(cluster, options, clock=time.monotonic)
    return Judged(Candidate(f"plan for {objective}", placement, objective), (), placement)


@contextmanager
def silent_library() -> Iterator[None]:
    """HiGHS writes a banner to standard output, which no option prevents and no JSON survives."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def report_of(cluster: Cluster, judged: Judged, lanes: Sequence[Lane]) -> Mapping[str, object]:
    """A plan as JSON. Sizes in bytes, times in seconds; a latency that has no end is null."""
    placement = judged.best.placement
    bound, ceiling = placement.bound, placement.ceiling
    return {
        "format": FORMAT,
        "plan": judged.best.name,
        "servers_work_for": judged.best.aim,
        "routes": judged.best.rule,
        "simulated": [
            {
                "plan": one.candidate.name,
                "servers_work_for": one.candidate.aim,
                "routes": one.candidate.rule,
                "requests": one.requests,
                "answered": one.answered,
                "in_time": one.in_time,
                "carried": one.carried,
                "answers_per_s": one.throughput,
                "mean_s": one.mean_s if math.isfinite(one.mean_s) else None,
            }
            for one in judged.verdicts
        ],
        "scale": placement.scale,
        "requests_per_s": placement.throughput,
        "demand": cluster.demand,
        "limits_s": cluster.limits_s,
        "latency_s": {
            name: seconds if math.isfinite(seconds) else None
            for name, seconds in placement.latency_s.items()
        },
        "bottleneck": placement.bottleneck,
        "bound": {"scale": bound.value, "how": bound.how},
        "ceiling": {"scale": ceiling.value, "how": ceiling.how},
        "gap": placement.gap,
        "mean_s": placement.mean_s if math.isfinite(placement.mean_s) else None,
        "latency_bound": None
        if placement.latency_bound is None
        else {"mean_s": placement.latency_bound.value, "how": placement.latency_bound.how},
        "servers": [_server_report(lane) for lane in lanes],
    }


def _server_report(lane: Lane) -> Mapping[str, object]:
    return {
        "name": lane.server.name,
        "budget_bytes": lane.server.machine.budget,
        "used_bytes": lane.used_bytes,
        "ring_bytes": lane.ring_bytes,
        "running_bytes": lane.running_bytes,
        "busy": lane.busy,
        "link_in": lane.link_in,
        "link_out": lane.link_out,
        "parts": [_part_report(lane, part, costs) for part, costs in lane.parts.items()],
    }


def _part_report(lane: Lane, part: Part, costs: PartCosts) -> Mapping[str, object]:
    own = [block for block in lane.blocks if block.part == part]
    return {
        "model": part.model,
        "first": part.first,
        "last": part.last,
        "requests_per_s": costs.rate,
        "work_s": costs.work_s,
        "through_s": costs.through_s,
        "in_bytes": costs.in_bytes,
        "out_bytes": costs.out_bytes,
        "weight_bytes": sum(block.size for block in own),
        "pinned": [number for block in own if block.pinned for number in block.slices],
    }


def _show(console: Console, cluster: Cluster, judged: Judged, lanes: Sequence[Lane]) -> None:
    placement = judged.best.placement
    console.print(Text(plain(headline(placement)), style="bold"))
    if placement.scale < 1:
        console.print(
            "The demand is more than these servers can take.", style="bold red", highlight=False
        )
    for line in subtitles(cluster, placement):
        console.print(Text(plain(line)))
    console.print()
    console.print(_server_table(lanes))
    console.print()
    console.print(_model_table(cluster, placement))
    if judged.verdicts:
        if judged.best.rule != EARLIEST:
            console.print(f"\nRoutes: {judged.best.rule}", highlight=False)
        console.print()
        console.print(_verdict_table(judged))


def _server_table(lanes: Sequence[Lane]) -> Table:
    table = _table("server", "part", "requests/s", "weights", "pinned", "server busy")
    for lane in lanes:
        name = plain(lane.server.name)
        if not lane.parts:
            table.add_row(Text(name), Text("nothing", style="dim"), "", "", "", "0 %")
        for part, costs in lane.parts.items():
            own = [block for block in lane.blocks if block.part == part]
            table.add_row(
                Text(name),
                Text(plain(part.key)),
                f"{costs.rate:.3g}",
                format_bytes(sum(block.size for block in own)),
                format_bytes(sum(block.size for block in own if block.pinned)),
                f"{100 * costs.rate * costs.work_s:.0f} %",
            )
            name = ""
        if len(lane.parts) > 1:
            table.add_row("", Text("all", style="dim"), "", "", "", f"{100 * lane.busy:.0f} %")
    return table


def _model_table(cluster: Cluster, placement: Placement) -> Table:
    table = _table("model", "demand/s", "sustainable/s", "latency", "limit")
    for name in cluster.wanted:
        seconds, limit = placement.latency_s[name], cluster.limits_s.get(name)
        late = limit is not None and seconds > limit
        table.add_row(
            Text(plain(name)),
            f"{cluster.demand[name]:.3g}",
            f"{cluster.demand[name] * placement.scale:.3g}",
            Text(_milliseconds(seconds), style="red" if late else ""),
            "" if limit is None else _milliseconds(limit),
        )
    return table


def _verdict_table(judged: Judged) -> Table:
    table = _table("plan", "servers work for", "requests", "in time", "answers/s", "mean")
    best = judged.best
    for one in judged.verdicts:
        own = one.candidate
        taken = (own.name, own.aim, own.rule) == (best.name, best.aim, best.rule)
        name = own.name if own.rule == EARLIEST else f"  {own.rule}"
        table.add_row(
            Text(name, style="bold" if taken else ""),
            own.aim,
            f"{one.requests:,}",
            f"{100 * one.in_time:.0f} %",
            f"{one.throughput:.3g}",
            _milliseconds(one.mean_s),
        )
    table.caption = "simulated; the plan in bold is the one above"
    return table


def _milliseconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "no end"
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def _table(*headings: str) -> Table:
    # Narrow: it fits into 80 columns.
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, heading in enumerate(headings):
        names = heading in ("server", "part", "model", "plan") and number < 2
        table.add_column(heading, justify="left" if names else "right", overflow="fold")
    return table
