"""Promise: `lasagna plan` from files to tables: figures, overload, streams, and what can't be."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import pytest
from tests.policy.machine import MB, linear
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.policy.cluster import Cluster, Part
from lasagna.policy.costs import BATCHES, ModelCosts
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.placement import PlanOptions

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
NAME: Final = "big\x1b[2J"
CLUSTER: Final = """
[defaults]
epc_mb = 40
beside_mb = 0
[[server]]
name = "a"
[[server]]
name = "b"
[demand]
small = 4
"big\\u001b[2J" = 2
[limits_ms]
"big\\u001b[2J" = 100
"""
PLACEMENT: Final = Placement(
    parts={
        Part("small", 0, 2, "a"): PartCosts(0.05, 0.06, 1000, 500, 8.0),
        Part(NAME, 0, 2, "a"): PartCosts(0.1, 0.11, 1000, 500, 4.0),
        Part(NAME, 2, 4, "b"): PartCosts(0.2, 0.21, 500, 400, 4.0),
    },
    scale=2.0,
    throughput=12.0,
    latency_s={"small": 0.06, NAME: 0.13},
    bottleneck="b's processors",
    bound=Bound(2.5, "by hand"),
    ceiling=Bound(4.0, "by guess"),
)


def write_model(path: Path, name: str, costs: ModelCosts) -> Path:
    """A file of costs, as ``lasagna inspect --costs`` would write it."""
    facts = {"format": 1, "name": name, "variant": "portable", "measured_on": ""}
    path.write_text(json.dumps(facts | {"batches": BATCHES, "forms": [asdict(costs)]}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The command's arguments: two servers of 40 MB, a small model and one of 56 MB."""
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    small = linear([2 * MB, 2 * MB], [10_000] * 2, [0.01] * 2)
    big = linear([MB, 5 * MB, 20 * MB, 30 * MB], [100_000] * 4, [0.01] * 4)
    return [
        tmp_path / "cluster.toml",
        write_model(tmp_path / "small.json", "small", small),
        write_model(tmp_path / "big.json", NAME, big),
    ]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PlanOptions]:
    """Instead of planning: `PLACEMENT`; here is what the planner was asked for."""
    found: list[PlanOptions] = []

    def planned(cluster: Cluster, options: PlanOptions, **_: object) -> Placement:
        assert cluster.demand == {"small": 4.0, NAME: 2.0}
        found.append(options)
        return PLACEMENT

    monkeypatch.setattr("lasagna.cli.plan.plan_cluster", planned)
    monkeypatch.setenv("COLUMNS", "80")
    return found


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["plan", *map(str, arguments)])


def plan_instead(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    changed = replace(PLACEMENT, **changes)
    monkeypatch.setattr("lasagna.cli.plan.plan_cluster", lambda *_, **__: changed)


def test_tables_show_each_part_what_limits_and_how_good_it_is(files: list[Path]) -> None:
    """Promise: whoever plans sees where everything goes and what to expect, in 80 columns."""
    result = plan(*files)

    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    shown = NAME.replace("\x1b", "\ufffd")
    assert "12 requests/s, 2 times the demand, predicted" in result.stdout
    words = " ".join(result.stdout.split())
    assert "Bottleneck: b's processors. Bound: 15 requests/s, 2.5 times" in words
    assert "gap 20.0 %" in words
    assert "Ceiling: 24 requests/s (by guess)" in words
    assert ["a", f"{shown}[0:2]", "4", "6.00", "MB", "6.00", "MB", "40", "%"] in lines
    assert ["small[0:2]", "8", "4.00", "MB", "4.00", "MB", "40", "%"] in lines
    assert ["all", "80", "%"] in lines
    (part,) = [line for line in lines if f"{shown}[2:4]" in line]
    assert part[-2:] == ["80", "%"]
    assert ["small", "4", "8", "60.0", "ms"] in lines
    assert [shown, "2", "4", "130", "ms", "100", "ms"] in lines


def test_a_demand_that_is_too_high_is_said(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: nobody takes an overloaded plan for one that works."""
    plan_instead(monkeypatch, scale=0.5, latency_s={"small": float("inf"), NAME: float("inf")})

    result = plan(*files)
    assert result.exit_code == 0
    assert "The demand is more than these servers can take." in result.stdout
    assert result.stdout.count("no end") == 2
    assert json.loads(plan(*files, "--json").stdout)["latency_s"] == {"small": None, NAME: None}


def test_options_reach_the_planner(files: list[Path], asked: list[PlanOptions]) -> None:
    """Promise: objective and time limit are the planner's."""
    assert plan(*files, "--objective", "latency", "--time-limit", "3").exit_code == 0

    (options,) = asked
    assert (options.objective, options.time_limit_s) == ("latency", 3.0)


def test_pictures_are_written_and_named(files: list[Path], tmp_path: Path) -> None:
    """Promise: --png and --html write files and say so, where it does not disturb JSON."""
    png, html = tmp_path / "p.png", tmp_path / "p.html"
    result = plan(*files, "--png", png, "--html", html, "--json")

    assert png.read_bytes().startswith(b"\x89PNG")
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert result.stderr.split() == ["wrote", str(png), "wrote", str(html)]
    assert json.loads(result.stdout)["format"] == 1


def test_parts_that_do_not_fit_are_named_with_their_server(files: list[Path]) -> None:
    """Promise: a plan that a server would refuse is not drawn as if it worked."""
    files[0].write_text(CLUSTER.replace("epc_mb = 40", "epc_mb = 3"))
    result = plan(*files)

    assert result.exit_code == 1
    assert "server 'a': " in result.stderr
    assert "needs a budget of" in result.stderr


@pytest.mark.integration
def test_the_example_gives_clean_json_from_the_real_planner() -> None:
    """Promise: `lasagna plan ... --json | jq` works: nothing else is on standard output."""
    models = [EXAMPLES / f"costs/{name}.json" for name in ("vgg19", "resnet50", "minilm")]
    command: list[str | Path] = [sys.executable, "-m", "lasagna.cli.main", "plan"]
    done = subprocess.run(
        [*command, EXAMPLES / "cluster.toml", *models, "--time-limit", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )

    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["scale"] > 1
    assert all(server["used_bytes"] <= server["budget_bytes"] for server in found["servers"])
    assert {part["model"] for one in found["servers"] for part in one["parts"]} == {
        *("vgg19", "resnet50", "minilm")
    }


@pytest.mark.integration
def test_simulations_choose_among_plans_and_say_what_they_saw(tmp_path: Path) -> None:
    """In a process of its own, since HiGHS writes where it likes; the best plan is among them."""
    small = write_model(
        tmp_path / "small.json", "small", linear([MB] * 2, [50_000] * 2, [0.01] * 2)
    )
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        '[defaults]\nepc_mb = 40\n[[server]]\nname = "s-{}"\ncount = 2\n[demand]\nsmall = 20\n'
    )
    command = [sys.executable, "-m", "lasagna.cli.main", "plan", str(cluster), str(small)]
    options = ["--objective", "latency", "--simulate", "--time-limit", "2", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    seen = {
        (one["plan"], one["servers_work_for"], one["routes"]): one for one in report["simulated"]
    }
    best = seen[report["plan"], report["servers_work_for"], report["routes"]]
    assert ("whole models", "latency", "earliest") in seen
    last = [one for one in seen.values() if one["requests"] == best["requests"]]
    assert best["mean_s"] <= min(one["mean_s"] for one in last) / 0.96
    assert report["mean_s"] >= report["latency_bound"]["mean_s"] > 0
    assert best["in_time"] == 1.0
