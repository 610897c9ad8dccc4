"""Promise: `lasagna simulate` runs scenario files, says that it simulates, and names mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.cli.costs_file import read_costs
from lasagna.cli.scenario_file import read_scenario
from lasagna.errors import UsageError
from lasagna.sim.policies import CLUSTER_POLICIES, one_piece

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
SCENARIOS: Final = sorted((EXAMPLES / "scenarios").glob("*.toml"))
CLUSTER: Final = """
[[server]]
name = "s-{}"
count = 2
epc = "sgx1-128"
threads = 2
[demand]
inception_v2 = 10
[limits_ms]
inception_v2 = 500
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, ["simulate", *arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small cluster, and the costs of one model that fits its servers."""
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "costs.json").write_bytes((EXAMPLES / "costs/inception_v2.json").read_bytes())
    return tmp_path


def scenario(folder: Path, *lines: str) -> str:
    path = folder / "scenario.toml"
    head = ['cluster = "cluster.toml"', 'models = ["costs.json"]', "seconds = 4", "warm_up_s = 1"]
    path.write_text("\n".join([*head, *lines, "[plan]", "time_limit_s = 0.5"]))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_examples_run_and_no_request_is_lost(path: Path) -> None:
    """Every policy of every example: each request has ended in one way."""
    result = run(str(path), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["simulated"] is True
    for name, policy in report["policies"].items():
        one = policy["all"]
        ends = [one[end] for end in ("answered", "refused", "given_up", "unfinished")]
        assert sum(ends) == one["count"] > 100, name
        assert one["answered"] > 0, name


def test_every_policy_gets_the_same_requests(folder: Path) -> None:
    """The same scenario gives the same figures, whatever else was simulated beside it."""
    rate = "requests_per_s = 50"  # a share of the plan's would depend on the search's luck
    both = run(scenario(folder, rate, 'policies = ["lasagna", "vanilla"]'), "--json")
    assert both.exit_code == 0, both.output
    alone = run(scenario(folder, rate, 'policies = ["vanilla"]'), "--json")
    found, again = json.loads(both.stdout)["policies"], json.loads(alone.stdout)["policies"]
    assert found["vanilla"] == again["vanilla"]
    assert found["lasagna"]["all"]["count"] == found["vanilla"]["all"]["count"]


def test_the_table_and_the_files(folder: Path) -> None:
    """A person sees what was simulated; the report and the picture are written."""
    out, png = folder / "report.json", folder / "latency.png"
    result = run(scenario(folder, 'policies = ["on-demand"]'), "--out", str(out), "--png", str(png))
    assert result.exit_code == 0, result.output
    assert "Simulated: 4 s of poisson arrivals" in result.stdout
    assert "on-demand" in result.stdout
    assert "undone" not in result.stdout
    assert json.loads(out.read_text())["policies"]["on-demand"]["all"]["answered"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_is_left_unfinished_is_not_in_time(folder: Path) -> None:
    """Of all requests, a small share is answered in time; the table has room for both figures."""
    out = folder / "report.json"
    path = scenario(folder, "requests_per_s = 1000", 'policies = ["on-demand", "whole-model"]')
    result = run(path, "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    columns = next(line for line in lines if line.startswith("policy")).split("  ")
    heads = [head.strip() for head in columns if head]
    assert heads[1:5] == ["answers/s", "in time", "refused", "undone"]
    assert max(map(len, lines)) <= 80
    for name, policy in json.loads(out.read_text())["policies"].items():
        figures = policy["all"]
        share = (figures["answered"] - figures["late"]) / figures["count"]
        row = next(line for line in lines if line.startswith(name)).split()
        assert row[2:6] == [f"{100 * share:.0f}", "%", "0", f"{figures['unfinished']:,}"]
    assert "undone: unfinished when the simulation was over, or given up" in result.stdout


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--png", "x.txt", "x.txt: it must end with one of"),
        ("--png", "absent/x.png", "absent/x.png: there is no folder"),
        ("--png", ".", "it is a folder"),
        ("--out", "absent/x.json", "absent/x.json: there is no folder"),
    ],
)
def test_files_that_can_not_be_written_are_named_before_anything_is_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, option: str, file: str, words: str
) -> None:
    """Simulations may take minutes."""
    monkeypatch.setattr("lasagna.cli.simulate._plan", lambda *_: pytest.fail("it plans"))
    result = run(scenario(folder), option, str(folder / file))
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(("option", "verb"), [("--out", "write"), ("--png", "draw")])
def test_the_table_is_there_when_a_file_can_not_be_written(
    folder: Path, option: str, verb: str
) -> None:
    """A disk may be full: what was simulated is not lost."""
    result = run(scenario(folder, 'policies = ["on-demand"]'), option, "/dev/full")
    assert result.exit_code == 2, result.output
    assert f"can't {verb} /dev/full: " in result.stderr
    assert "No space left on device" in result.stderr
    assert "Simulated: 4 s" in result.stdout


def test_names_are_neither_formulas_nor_markup(folder: Path) -> None:
    """In the picture and in the table, whatever a file or a server is called."""
    (folder / "cluster.toml").write_text(CLUSTER.replace("s-{}", "[red]{}"))
    path = Path(scenario(folder, 'policies = ["on-demand"]')).rename(folder / "$x_$.toml")
    png = folder / "latency"
    result = run(str(path), "--png", str(png))
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "[red]" in result.stdout


@pytest.mark.parametrize("kind", ["poisson", "gamma", "mmpp", "diurnal"])
def test_arrivals_have_the_load_that_is_asked_for(folder: Path, kind: str) -> None:
    """The mean rate is a share of the plan's throughput, whatever the arrivals look like."""
    path = scenario(folder, "seed = 3", "load = 0.5", f'arrivals = {{ kind = "{kind}" }}')
    text = Path(path).read_text().replace("seconds = 4", "seconds = 4000")
    Path(path).write_text(text)
    times = np.array([arrival.at_s for arrival in read_scenario(Path(path)).arrivals(40.0)])
    assert len(times) / 4000 == pytest.approx(20.0, rel=0.06)
    assert (np.diff(times) >= 0).all()


def test_the_mix_shifts_when_it_is_to_and_the_rate_stays(folder: Path) -> None:
    (folder / "other.json").write_bytes((EXAMPLES / "costs/alexnet.json").read_bytes())
    (folder / "cluster.toml").write_text(CLUSTER.replace("[limits", "alexnet = 0\n[limits"))
    path = Path(scenario(folder, "mix = [{ at_s = 2, demand = { alexnet = 1 } }]"))
    path.write_text(path.read_text().replace('"costs.json"', '"costs.json", "other.json"'))
    arrivals = list(read_scenario(path).arrivals(500.0))
    assert {one.model for one in arrivals if one.at_s <= 2.0} == {"inception_v2"}
    assert {one.model for one in arrivals if one.at_s > 2.0} == {"alexnet"}
    early = sum(one.at_s <= 2.0 for one in arrivals)
    assert early == pytest.approx(len(arrivals) / 2, rel=0.15)


@pytest.mark.slow
def test_simulations_choose_the_plan_if_they_are_to(folder: Path) -> None:
    """Two equal servers and a model that fits both: nothing is better than the simplest."""
    path = Path(scenario(folder, 'policies = ["lasagna", "whole-model"]'))
    path.write_text(path.read_text() + "\nsimulate = true\n")
    result = run(str(path), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["plan"] == "whole models"
    policies = report["policies"]
    assert policies["lasagna"]["all"]["mean_s"] <= policies["whole-model"]["all"]["mean_s"]


def test_recorded_arrivals_are_taken_as_they_are(folder: Path) -> None:
    """Lines of JSON, relative to the scenario."""
    (folder / "load.jsonl").write_text('{"at_s": 0.5, "model": "inception_v2"}\n')
    path = scenario(folder, 'arrivals = { kind = "recorded", file = "load.jsonl" }')
    (arrival,) = read_scenario(Path(path)).arrivals(1.0)
    assert (arrival.at_s, arrival.model) == (0.5, "inception_v2")


def test_recorded_arrivals_end_and_have_limits_as_others(folder: Path) -> None:
    """After ``seconds``; an answer's limit is the cluster's where the line has none."""
    own = {"model": "inception_v2"}
    lines = [{"at_s": 2, **own}, {"at_s": 3, "limit_s": 9, **own}, {"at_s": 5, **own}]
    (folder / "load.jsonl").write_text("\n".join(map(json.dumps, lines)))
    described = read_scenario(
        Path(scenario(folder, 'arrivals = { kind = "recorded", file = "load.jsonl" }'))
    )
    limit_s = described.cluster.limits_s["inception_v2"]
    found = [(one.at_s, one.limit_s) for one in described.arrivals(1.0)]
    assert found == [(2, limit_s), (3, 9.0)]


def test_recorded_arrivals_are_read_before_anything_is_planned(folder: Path) -> None:
    """The line and the name that was meant; or that there is no such file."""
    path = Path(scenario(folder, 'arrivals = { kind = "recorded", file = "load.jsonl" }'))
    with pytest.raises(UsageError, match=r"can't read arrivals from .*load\.jsonl: No such file"):
        read_scenario(path)
    (folder / "load.jsonl").write_text('{"at_s": 1, "model": "inception_v3"}\n')
    with pytest.raises(UsageError, match=r"load\.jsonl, line 1: .*did you mean 'inception_v2'"):
        read_scenario(path)


def test_load_is_a_share_of_what_a_plan_for_latency_sustains_too(folder: Path) -> None:
    """Such a plan is for the demand, here 10 requests a second."""
    path = Path(scenario(folder))
    text, sustained = path.read_text(), []
    for objective in ("throughput", "latency"):
        path.write_text(f'{text}\nobjective = "{objective}"\n')
        result = run(str(path), "--json")
        assert result.exit_code == 0, result.output
        sustained.append(json.loads(result.stdout)["planned_requests_per_s"])
    assert sustained[0] > 15.0
    assert sustained[1] > 0.8 * sustained[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('policies = ["lasagne"]', "did you mean 'lasagna'"),
        ("second = 3", "did you mean 'seconds'"),
        ("load = -1", "load"),
        ('arrivals = { kind = "steady" }', "arrivals.kind: 'steady'; there are "),
        ('arrivals = { kind = "recorded" }', "arrivals: the key 'file' is missing"),
        ('arrivals = { file = "x" }', "arrivals: the key 'kind' is missing"),
        ('arrivals = { kind = "gamma", cv = 1e9 }', "cv: expected float <= 100"),
        ('arrivals = { kind = "mmpp", cv = 3 }', "arrivals: there is no key 'cv'"),
        ('trouble = [{ kind = "server-dies", server = "s-3", at_s = 1 }]', "no server 's-3'"),
        (
            'trouble = [{ kind = "epc-taken", server = "s-1", at_s = 1 }]',
            "key 'taken_mb' is missing",
        ),
        (
            'trouble = [{ kind = "server-dies", server = "s-1", at_s = 1, factor = 3 }]',
            "trouble[0]: there is no key 'factor'",
        ),
        (
            'trouble = [{ kind = "server-sleeps", server = "s-1", at_s = 1 }]',
            "did you mean 'server-slows'?",
        ),
        (
            'trouble = [{ kind = "epc-taken", server = "s-1", at_s = 1, taken_mb = 90 }]',
            "MB of EPC that 's-1' has for models",
        ),
        ("mix = [{ at_s = 1, demand = { inception_v3 = 1 } }]", "did you mean 'inception_v2'"),
        ("mix = [{ at_s = 1, demand = { inception_v2 = 0 } }]", "one demand must be above 0"),
        (
            "mix = [{ at_s = 2, demand = { inception_v2 = 1 } },"
            " { at_s = 2, demand = { inception_v2 = 2 } }]",
            "at_s must rise",
        ),
        ("load = ", "is no TOML"),
    ],
)
def test_mistakes_are_named(folder: Path, line: str, words: str) -> None:
    """The file, the key, and what would be right."""
    with pytest.raises(UsageError, match=r"scenario\.toml.*") as caught:
        read_scenario(Path(scenario(folder, line)))
    assert words in str(caught.value)


def test_a_warm_up_that_leaves_nothing_is_refused(folder: Path) -> None:
    """Figures of no requests would mean nothing."""
    path = Path(scenario(folder))
    path.write_text(path.read_text().replace("warm_up_s = 1", "warm_up_s = 4"))
    with pytest.raises(UsageError, match="warm_up_s must be less than seconds"):
        read_scenario(path)


def test_vanilla_runs_a_model_in_one_piece() -> None:
    """As ONNX Runtime alone does: one slice with all weights, and no call between slices."""
    _, forms = read_costs(EXAMPLES / "costs/resnet50.json")
    (whole,) = one_piece(forms)
    assert len(whole.slices) == 1
    assert whole.weight_bytes == pytest.approx(forms[0].weight_bytes, rel=0.01)
    assert whole.form == forms[0].form
    assert {"lasagna", "vanilla", "on-demand", "whole-model"} <= CLUSTER_POLICIES.keys()
