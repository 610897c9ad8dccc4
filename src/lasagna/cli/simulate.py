"""``lasagna simulate``: a cluster under load in virtual time, policy by policy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from lasagna.cli.plan import silent_library, write_file
from lasagna.cli.plan_drawing import plain
from lasagna.cli.scenario_file import Scenario, read_scenario
from lasagna.errors import LasagnaError
from lasagna.sim.arrivals import Arrival
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.judging import Candidate, plan_judged
from lasagna.sim.metrics import Outcome
from lasagna.sim.options import Options
from lasagna.sim.planner import Planner
from lasagna.sim.policies import Prepared, prepared, roomy
from lasagna.tee.epc_profiles import profile
from lasagna.units import format_bytes

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
    console = Console(stderr=True)
    quiet = json_ or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("planning", total=None)
        planner = Planner()
        chosen, throughput = _plan(scenario, planner)
        bar.remove_task(task)
        outcomes = _outcomes(scenario, chosen, throughput, planner, bar)
    report = msgspec.json.format(
        msgspec.json.encode(_report(scenario, chosen, throughput, outcomes))
    )
    if out:
        write_file(out, report)
    if png:
        _draw(scenario, outcomes).savefig(png, dpi=120)
    for file in filter(None, (out, png)):
        typer.echo(f"wrote {file}", err=True)
    if json_:
        typer.echo(report.decode())
    else:
        _show(Console(), scenario, chosen, throughput, outcomes)


def _plan(scenario: Scenario, planner: Planner) -> tuple[Candidate, float]:
    """The plan that Lasagna runs; and requests a second that the most throughput is."""
    from lasagna.policy.placement import plan_cluster  # with a solver of some size
    from lasagna.policy.replan import kept

    cluster, options = scenario.cluster, scenario.plan
    with silent_library():
        plan = plan_cluster(cluster, options, clock=time.monotonic)
        throughput = plan.throughput
        if options.objective == "latency":  # planned for the demand, and sustains more
            _, most = kept(cluster, plan.parts)
            throughput = plan.throughput if most is None else most.throughput
        if not scenario.settings.plan.simulate:
            return Candidate(f"plan for {options.objective}", plan, options.objective), throughput
        scale = 1.0
        if scenario.settings.arrivals.kind != "recorded":
            scale = scenario.rate(throughput) / sum(cluster.demand.values())
        demand = {name: scale * rate for name, rate in cluster.demand.items()}
        judged = plan_judged(
            replace(cluster, demand=demand),
            replace(options, objective="latency"),
            clock=time.monotonic,
            seed=scenario.settings.seed,
            planner=planner,
            admission=scenario.settings.admission,
        )
    return judged.best, throughput


def _outcomes(
    scenario: Scenario, chosen: Candidate, throughput: float, planner: Planner, bar: Progress
) -> dict[str, Outcome]:
    costs = PAGING.costs()
    page_s = (costs.load_ns + costs.evict_ns) / 1e9
    settings = scenario.settings
    options = Options(
        balancers=settings.balancers,
        settings=roomy(chosen.style),
        admission=settings.admission,
        report_s=settings.report_ms / 1000,
        detect_s=settings.detect_ms / 1000,
        noise=settings.noise,
        replanning=scenario.replanning,
    )
    outcomes: dict[str, Outcome] = {}
    for policy in scenario.policies:
        with silent_library():
            try:
                ready = prepared(policy, scenario.cluster, chosen.placement, options, page_s)
            except LasagnaError as error:
                raise type(error)(f"{policy.name}: {error}") from None
        task = bar.add_task(policy.name, total=settings.seconds)
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
    at = "" if settings.arrivals.kind == "recorded" else f" at {rate:.3g}/s"
    head = f"Simulated: {settings.seconds:g} s of {settings.arrivals.kind} arrivals{at}"
    console.print(Text(f"{head}; a plan can have {throughput:.3g}/s", style="bold"))
    console.print(
        f"Lasagna has: {chosen.name}, servers' memory divided for {chosen.aim}", highlight=False
    )
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("policy", "answers/s", "in time", "refused", "mean", "p50", "p99", "busiest"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, outcome in outcomes.items():
        figures = outcome.requests.figures(since_s=settings.warm_up_s)
        busiest = max(outcome.servers, key=lambda one: outcome.servers[one].utilisation)
        share = outcome.servers[busiest].utilisation
        table.add_row(
            name,
            f"{figures.throughput:.3g}",
            f"{100 * figures.goodput / max(figures.throughput, 1e-12):.0f} %",
            f"{figures.refused:,}",
            _seconds(figures.mean_s),
            _seconds(figures.p50_s),
            _seconds(figures.p99_s),
            f"{plain(busiest)} {100 * share:.0f} %",
        )
    console.print(table)
    for name, outcome in outcomes.items():
        moves = outcome.moves
        if moves.looked:
            console.print(
                f"{name}: looked for another placement {moves.looked} times, applied "
                f"{moves.applied}, carried {format_bytes(moves.moved_bytes)} of weights",
                highlight=False,
            )


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _draw(scenario: Scenario, outcomes: Mapping[str, Outcome]) -> Figure:
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
    axes.legend()
    axes.set_title(plain(f"{scenario.path.stem}: the same requests for each policy"))
    return figure
