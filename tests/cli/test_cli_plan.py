"""Promise: `lasagna plan` shows and writes what the planner found, and draws each part to scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
from matplotlib.patches import Rectangle
from tests.policy.machine import MB, linear
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.cli import plan as plan_module
from lasagna.cli.plan_drawing import plan_figure
from lasagna.cli.plan_lanes import lanes_of
from lasagna.policy.cluster import Cluster, Part, Server
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.stages import Machine
from lasagna.sim.candidates import Candidate
from lasagna.sim.judging import Judged

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
MACHINE: Final = Machine(40 * MB, 1, 1, 3e9, 0.0003)
BIG: Final = "big </script>$x_1$\x1b[2J"
SMALL: Final = Part("small", 0, 2, "a")
HEAD: Final = Part(BIG, 0, 2, "a")
TAIL: Final = Part(BIG, 2, 6, "b")
TAIL_AGAIN: Final = Part(BIG, 2, 6, "c")
SPARE: Final = "spare"


def costs(rate: float) -> PartCosts:
    return PartCosts(0.05, 0.06, 1_000_000, 500_000, rate)


@pytest.fixture
def cluster() -> Cluster:
    """Servers a to c of 40 MB and a spare one; a small model, and one of 86 MB."""
    big = linear([MB, 5 * MB, *[20 * MB] * 4], [100_000] * 6, [0.01] * 6)
    small = linear([2 * MB, 2 * MB], [10_000] * 2, [0.01] * 2)
    servers = tuple(Server(name, MACHINE, bandwidth=10e6) for name in ("a", "b", "c", SPARE))
    models = {"small": (small,), BIG: (big,)}
    return Cluster(servers, models, {"small": 4.0, BIG: 2.0}, {BIG: 0.1})


@pytest.fixture
def placement() -> Placement:
    """Hand-made: two replicas of the big model's tail."""
    return Placement(
        parts={SMALL: costs(8.0), HEAD: costs(4.0), TAIL: costs(2.0), TAIL_AGAIN: costs(2.0)},
        scale=2.0,
        throughput=12.0,
        latency_s={"small": 0.06, BIG: 0.13},
        bottleneck="a's processors",
        bound=Bound(2.5, "by hand"),
        ceiling=Bound(4.0, "by guess"),
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, ["plan", *arguments])


@pytest.fixture
def files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster, placement: Placement
) -> list[str]:
    """Arguments of the command, for which the hand-made cluster and placement are found."""
    judged = Judged(Candidate("by hand", placement, "throughput"), (), placement)
    monkeypatch.setattr(plan_module, "_cluster", lambda *_: cluster)
    monkeypatch.setattr(plan_module, "_judged", lambda *_, **__: judged)
    monkeypatch.setenv("COLUMNS", "100")
    return [str(tmp_path / "cluster.toml"), "costs.json"]


def test_the_report_says_where_each_slice_is(files: list[str], tmp_path: Path) -> None:
    """--json and --out give the same, and every part's slices are pinned or streamed."""
    out = tmp_path / "plan.json"
    result = run(*files, "--json", "--out", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads(out.read_text())
    assert report["requests_per_s"] == 12.0
    assert report["gap"] == pytest.approx(0.2)
    parts = {server["name"]: server["parts"] for server in report["servers"]}
    assert [(one["model"], one["first"], one["last"]) for one in parts["a"]] == [
        (BIG, 0, 2),
        ("small", 0, 2),
    ]
    assert parts[SPARE] == []
    (tail,) = parts["b"]
    assert tail["weight_bytes"] == 80 * MB
    assert len(tail["pinned"]) < 4  # 80 MB in a server of 40
    assert parts["a"][1]["pinned"] == [0, 1]
    for server in report["servers"]:
        assert server["used_bytes"] <= server["budget_bytes"]


def test_the_table_names_servers_models_and_the_bottleneck(files: list[str]) -> None:
    """What a person sees; names from files can't steer the terminal."""
    result = run(*files)
    assert result.exit_code == 0, result.output
    assert "12.0 requests/s" in result.stdout or "12 requests/s" in result.stdout
    assert "a's processors" in result.stdout
    assert "20 %" in result.stdout
    assert "nothing" in result.stdout  # on the spare server
    assert "\x1b[2J" not in result.stdout


def test_pictures_show_each_part(
    files: list[str], tmp_path: Path, cluster: Cluster, placement: Placement
) -> None:
    """The PNG is written; the page has all blocks, and a model's name can't end its script."""
    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    result = run(*files, "--png", str(png), "--html", str(html))
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    assert page.count("</script>") == page.count("<script")
    assert "[2:6]" in page
    figure = plan_figure(cluster, placement, lanes_of(cluster, placement))
    hatched = [
        patch
        for axes in figure.axes
        for patch in axes.patches
        if isinstance(patch, Rectangle) and patch.get_hatch()
    ]
    assert len(hatched) >= 2  # what two replicas of 80 MB stream


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--png", "x.txt", "x.txt: it must end with one of"),
        ("--html", "absent/x.html", "absent/x.html: there is no folder"),
        ("--out", ".", "it is a folder"),
    ],
)
def test_files_that_can_not_be_written_are_named_before_anything_is_planned(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    file: str,
    words: str,
) -> None:
    """A search may take minutes."""
    monkeypatch.setattr("lasagna.cli.plan._judged", lambda *_, **__: pytest.fail("it plans"))
    result = run(*files, option, str(tmp_path / file))
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_real_plan_of_the_example(tmp_path: Path) -> None:
    """The example cluster, real costs of two models, and the real planner, without a terminal."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        '[[server]]\nname = "s-{}"\ncount = 2\nepc = "sgx1-128"\nthreads = 2\ncores = 2\n'
        "[demand]\nalexnet = 20\ninception_v2 = 10\n"
    )
    costs = [str(EXAMPLES / f"costs/{name}.json") for name in ("alexnet", "inception_v2")]
    result = run(str(cluster), *costs, "--time-limit", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["scale"] > 1
    models = {part["model"] for server in report["servers"] for part in server["parts"]}
    assert models == {"alexnet", "inception_v2"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    """No such objective; a model twice; a demand for a model that was not given."""
    example, costs = str(EXAMPLES / "cluster.toml"), str(EXAMPLES / "costs/vgg19.json")
    for arguments, words in (
        ([example, costs, "--objective", "speed"], "throughput, latency"),
        ([example, costs, costs], "both of the model 'vgg19'"),
        ([example, costs], "'resnet50'"),
        ([str(tmp_path / "none.toml"), costs], "none.toml"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0
        said = result.output + str(result.exception or "")
        assert words in said, said
