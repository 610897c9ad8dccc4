"""``lasagna simulate``: a cluster under load in virtual time, policy by policy."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from lasagna.cli.files import check_drawable, check_writable, write_figure, write_file
from lasagna.cli.plan import silent_library
from lasagna.cli.plan_drawing import plain
from lasagna.cli.scenario_file import Scenario, read_scenario
from lasagna.errors import LasagnaError
from lasagna.policy.placement import plan_cluster
from lasagna.policy.plan import Style
from lasagna.sim.arrivals import Arrival
from lasagna.sim.candidates import STYLES, Candidate, plan_or_best_effort
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.judging import plan_judged
from lasagna.sim.metrics import Figures, Outcome
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import Prepared, prepared, roomy
from lasagna.tee.epc_profiles import profile
from lasagna.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT: Final = 1
PAGING: Final = profile("sgx1-128")
"""Whose published costs a page that the kernel swaps is charged with."""


def simulate(
    path: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="What to simulate.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON into a file.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw how long requests take.")
    ] = None,
    *,
    json_: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
) -> None:
    """Simulate a cluster: the same requests for each policy, in virtual time.

    Everything it prints is simulated, from the profiles of the models; nothing is served.
    """
    scenario = read_scenario(path)
    check_writable(out)
    check_drawable(png)
    console = Console(stderr=True)
    quiet = json_ or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("planning", total=None)
        planner = Planner()
        chosen, other, throughput = _plan(scenario, planner)
        bar.remove_task(task)
        outcomes = _outcomes(scenario, chosen, other, throughput, planner, bar)
    report = msgspec.json.format(
        msgspec.json.encode(_report(scenario, chosen, throughput, outcomes))
    )
    if json_:
        typer.echo(report.decode())
    else:
        _show(Console(), scenario, chosen, throughput, outcomes)
    if out:
        write_file(out, report)
        typer.echo(f"wrote {out}", err=True)
    if png:
        _write_png(scenario, outcomes, png)
        typer.echo(f"wrote {png}", err=True)


def _plan(scenario: Scenario, planner: Planner) -> tuple[Candidate, Style, float]:
    """The plan that Lasagna runs; in which style others divide memory; most requests a second."""
    cluster, options = scenario.cluster, scenario.plan
    with silent_library():
        if not scenario.settings.plan.simulate:
            plan = plan_cluster(cluster, options, clock=time.monotonic)
            only = Candidate(f"plan for {options.objective}", plan, options.objective)
            return only, only.style, plan.throughput
        throughput = plan_or_best_effort(cluster, options, clock=time.monotonic).throughput
        scale = scenario.rate(throughput) / sum(cluster.demand.values())
        demand = {name: scale * rate for name, rate in cluster.demand.items()}
        if scenario.kind == "recorded":
            asked = Counter(one.model for one in scenario.arrivals(throughput))
            if asked:
                demand = {name: asked[name] / scenario.settings.seconds for name in cluster.models}
        judged = plan_judged(
            replace(cluster, demand=demand),
            replace(options, objective="latency"),
            clock=time.monotonic,
            seed=scenario.settings.seed,
            planner=planner,
            run=_run_options(scenario),
        )
    return judged.best, STYLES[judged.aim_of_whole_models("latency")], throughput


def _run_options(scenario: Scenario) -> Options:
    settings = scenario.settings
    return Options(
        balancers=settings.balancers,
        admission=settings.admission,
        report_s=settings.report_ms / 1000,
        detect_s=settings.detect_ms / 1000,
        noise=settings.noise,
    )


def _outcomes(
    scenario: Scenario,
    chosen: Candidate,
    other: Style,
    throughput: float,
    planner: Planner,
    bar: Progress,
) -> dict[str, Outcome]:
    costs = PAGING.costs()
    page_s = (costs.load_ns + costs.evict_ns) / 1e9
    options = replace(_run_options(scenario), rule=chosen.rule, replanning=scenario.replanning)
    outcomes: dict[str, Outcome] = {}
    for policy in scenario.policies:
        with silent_library():
            try:
                # The chosen style may suit the plan only: others are not to be worse for it.
                style = chosen.style if policy.placed == "plan" else other
                own = replace(options, settings=roomy(style))
                ready = prepared(policy, scenario.cluster, chosen.placement, own, page_s)
            except LasagnaError as error:
                raise type(error)(f"{policy.name}: {error}") from None
        task = bar.add_task(policy.name, total=scenario.settings.seconds)
        outcomes[policy.name] = _run(scenario, throughput, ready, planner, bar, task)
    return outcomes


def _run(
    scenario: Scenario,
    throughput: float,
    ready: Prepared,
    planner: Planner,
    bar: Progress,
    task: TaskID,
) -> Outcome:
    def load() -> Iterator[Arrival]:
        shown_s = 0.0
        for arrival in scenario.arrivals(throughput):
            if arrival.at_s - shown_s > scenario.settings.seconds / 200:
                shown_s = arrival.at_s
                bar.update(task, completed=shown_s)
            yield arrival

    virtual = VirtualCluster(
        ready.cluster, ready.placement, ready.options, seed=scenario.settings.seed, planner=planner
    )
    # Who can't keep up is not waited for: ten times as long says enough.
    return virtual.run(load(), scenario.troubles, until_s=10 * scenario.settings.seconds)


def _report(
    scenario: Scenario, chosen: Candidate, throughput: float, outcomes: Mapping[str, Outcome]
) -> Mapping[str, object]:
    since_s = scenario.settings.warm_up_s
    return {
        "format": FORMAT,
        "simulated": True,
        "scenario": msgspec.to_builtins(scenario.settings),
        "plan": chosen.name,
        "servers_work_for": chosen.aim,
        "routes": chosen.rule,
        "planned_requests_per_s": throughput,
        "policies": {
            name: {
                "all": _finite(asdict(outcome.requests.figures(since_s=since_s))),
                "models": {
                    model: _finite(asdict(figures))
                    for model, figures in outcome.figures(since_s=since_s).items()
                },
                "servers": {server: asdict(f) for server, f in outcome.servers.items()},
                "moves": asdict(outcome.moves),
            }
            for name, outcome in outcomes.items()
        },
    }


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _show(
    console: Console,
    scenario: Scenario,
    chosen: Candidate,
    throughput: float,
    outcomes: Mapping[str, Outcome],
) -> None:
    settings = scenario.settings
    rate = scenario.rate(throughput)
    at = "" if scenario.kind == "recorded" else f" at {rate:.3g}/s"
    head = f"Simulated: {settings.seconds:g} s of {scenario.kind} arrivals{at}"
    console.print(Text(f"{head}; a plan can have {throughput:.3g}/s", style="bold"))
    console.print(
        f"Lasagna has: {chosen.name}, servers' memory divided for {chosen.aim}, "
        f"routes: {chosen.rule}",
        highlight=False,
    )
    console.print(_table(console, outcomes, settings.warm_up_s))
    for name, outcome in outcomes.items():
        moves = outcome.moves
        if moves.looked:
            console.print(
                f"{name}: looked for another placement {moves.looked} times, applied "
                f"{moves.applied}, carried {format_bytes(moves.moved_bytes)} of weights",
                highlight=False,
            )


def _table(console: Console, outcomes: Mapping[str, Outcome], since_s: float) -> Table:
    every = {name: one.requests.figures(since_s=since_s) for name, one in outcomes.items()}
    left = any(map(_left, every.values()))
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    headings = ("policy", "answers/s", "in time", "refused", *(("undone",) if left else ()))
    for heading in (*headings, "mean", "p50", "p99", "busiest"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, figures in every.items():
        servers = outcomes[name].servers
        busiest = max(servers, key=lambda one: servers[one].utilisation)
        table.add_row(
            name,
            f"{figures.throughput:.3g}",
            _in_time(figures),
            f"{figures.refused:,}",
            *((f"{_left(figures):,}",) if left else ()),
            _seconds(figures.mean_s),
            _seconds(figures.p50_s),
            _seconds(figures.p99_s),
            Text(f"{plain(busiest)} {100 * servers[busiest].utilisation:.0f} %"),
        )
    if left:
        table.caption = "undone: unfinished when the simulation was over, or given up"
    unbounded = console.options.update(max_width=1000)
    if console.measure(table, options=unbounded).maximum > console.width:
        table.padding = (0, 1, 0, 0)
    return table


def _in_time(figures: Figures) -> str:
    """Of all requests, not of all answers: who answers few is not in time."""
    if not figures.count:
        return "-"
    return f"{100 * (figures.answered - figures.late) / figures.count:.0f} %"


def _left(figures: Figures) -> int:
    return figures.unfinished + figures.given_up


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _write_png(scenario: Scenario, outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draw into a file, whose ending chooses the format. Names are text, never formulas.

    Raises:
        UsageError: the file can't be written.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        write_figure(path, _figure(scenario, outcomes))


def _figure(scenario: Scenario, outcomes: Mapping[str, Outcome]) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        latencies = sorted(outcome.requests.latencies_s(since_s=scenario.settings.warm_up_s))
        if latencies:
            shares = [(n + 1) / len(latencies) for n in range(len(latencies))]
            axes.plot(latencies, shares, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("seconds from request to answer, simulated")
    axes.set_ylabel("share of answered requests")
    axes.set_ylim(0, 1)
    axes.grid(visible=True, alpha=0.3)
    if axes.lines:
        axes.legend()
    axes.set_title(plain(f"{scenario.path.stem}: the same requests for each policy"))
    return figure
