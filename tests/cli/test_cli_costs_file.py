"""Promise: a file of costs says exactly what the package says, and a malformed one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import helper
from tests.package.conftest import build
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.cli.costs_file import read_costs
from lasagna.errors import PackageError, UsageError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.package.reader import Package
from lasagna.server.costs import forms_of

EXAMPLES: Final = sorted((Path(__file__).resolve().parents[2] / "examples/costs").glob("*.json"))


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of three slices in both variants, without its key."""
    folder = tmp_path_factory.mktemp("costs")
    rng = np.random.default_rng(8)
    weights = {"k": rng.standard_normal((64, 16, 3, 3)), "w": rng.standard_normal((4096, 48))}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], "edges", pads=[1] * 4),
        helper.make_node("Flatten", ["a"], ["b"], "flat"),
        helper.make_node("Gemm", ["b", "w"], ["y"], "classes"),
    ]
    source = prepare(build(nodes, weights, [1, 16, 8, 8], [1, 48]))
    owner, options = Ed25519PrivateKey.generate(), SealOptions(slice_bytes=300_000)
    seal(source, "net", owner, folder / "net.lsg", options)
    return folder / "net.lsg"


@pytest.fixture
def costs(package: Path, tmp_path: Path) -> Path:
    """The package's costs, written by the command."""
    path = tmp_path / "net.json"
    result = inspect(package, "--costs", path, "--measured-on", "a test")
    assert result.exit_code == 0, result.output
    return path


def test_costs_come_back_as_they_were(package: Path, costs: Path) -> None:
    """Promise: planning from the file and from the package is the same, to the last digit."""
    with Package(package) as opened:
        manifest = opened.manifest
    name, forms = read_costs(costs)

    assert name == "net"
    assert len(forms[0].slices) == 3
    assert all(seconds > 0 for one in forms[0].slices for seconds in one.compute_s)
    assert forms == forms_of(manifest.variants[0], forms[0].max_rows)
    assert read_costs(package) == (name, forms), "the first variant is this processor's"


def test_another_variant_can_be_chosen(package: Path, tmp_path: Path) -> None:
    """Promise: --variant decides whose costs are written, as it decides what is shown."""
    path = tmp_path / "net.json"
    assert inspect(package, "--costs", path, "--variant", "portable").exit_code == 0

    assert json.loads(path.read_text())["variant"] == "portable"


def test_the_file_holds_public_facts_only(costs: Path) -> None:
    """Promise: it can be given to anybody: no layer's name, no key, no digest of either."""
    keys = set(re.findall(r'"(\w+)":', costs.read_text()))

    facts = "weight_bytes compute_s workspace_bytes cut_bytes running_bytes copies_bytes max_rows"
    about = "format name variant measured_on batches forms form slices"
    assert keys == {*facts.split(), *about.split()}
    assert "edges" not in costs.read_text()
    assert json.loads(costs.read_text())["measured_on"] == "a test"


def _change(*place: str | int, to: object) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for step in place[:-1]:
            tree = tree[step]
        tree[place[-1]] = to

    return change


_IDLE: Final = {"weight_bytes": 5, "compute_s": [0, 1, 1, 1], "workspace_bytes": [0] * 4}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (_change("format", to=2), "format: it is 2, expected 1"),
        (_change("batches", to=[1, 2]), r"batches: expected \[1, 2, 4, 8\], got \[1, 2\]"),
        (_change("name", to=""), "name: expected str of length >= 1"),
        (_change("forms", to=[]), "forms: expected array of length >= 1"),
        (_change("forms", 0, "form", to="whole"), 'forms: expected "sliced" first'),
        (_change("forms", 0, "form", to="boiled"), r"forms\[0\].form: 'boiled'; there are "),
        (_change("forms", 0, "cut_bytes", to=[1]), r"forms\[0\].cut_bytes: expected 4 values"),
        (_change("forms", 0, "running_bytes", to=[]), "running_bytes: expected 3 values for 3"),
        (_change("forms", 0, "slices", to=[]), r"slices: expected array of length >= 1"),
        (_change("forms", 0, "max_rows", to=0), "max_rows: expected int >= 1"),
        (_change("forms", 0, "copies_bytes", to=-1), "copies_bytes: expected int >= 0"),
        (
            _change("forms", 0, "slices", 1, "compute_s", to=[0.1]),
            r"forms\[0\].slices\[1\].compute_s: expected array of length 4|length >= 4",
        ),
        (_change("forms", 0, "slices", 1, "compute_s", 2, to=-0.1), "compute_s.*: expected float"),
        (_change("forms", 0, "slices", 1, "weight_bytes", to=0.5), "weight_bytes: expected int"),
        (_change("forms", 0, "slices", 1, "weights", to=1), "there is no key 'weights'"),
        (
            _change("forms", 0, "slices", to=[_IDLE] * 3),
            r"forms\[0\].slices: none takes time at every batch",
        ),
        (_change("more", to=1), "there is no key 'more'"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(
    costs: Path, change: Callable[[Any], None], wrong: str
) -> None:
    """Promise: no plan is made from lengths, signs or forms that can't be."""
    tree = json.loads(costs.read_text())
    change(tree)
    costs.write_text(json.dumps(tree))

    with pytest.raises(UsageError) as caught:
        read_costs(costs)
    assert str(costs) in str(caught.value)
    assert re.search(wrong, str(caught.value)), caught.value


def test_a_form_in_one_piece_has_one_slice(costs: Path) -> None:
    """Promise: only the sliced form is divided."""
    tree = json.loads(costs.read_text())
    whole = tree["forms"][1]
    whole["slices"] *= 2
    costs.write_text(json.dumps(tree))

    with pytest.raises(UsageError, match=r"the form whole has one, here are 2"):
        read_costs(costs)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b"LASAGN"])
def test_what_is_neither_package_nor_costs_is_refused(tmp_path: Path, content: bytes) -> None:
    """Promise: any other file is named as what it is not."""
    (tmp_path / "x").write_bytes(content)

    with pytest.raises(UsageError, match=r"x is neither a sealed package nor a file of costs"):
        read_costs(tmp_path / "x")


def test_a_package_that_is_cut_off_is_refused(tmp_path: Path, package: Path) -> None:
    """Promise: a package is read by the package's own reader, with its checks."""
    (tmp_path / "x").write_bytes(package.read_bytes()[:200])

    with pytest.raises(PackageError):
        read_costs(tmp_path / "x")


def test_a_package_for_other_processors_has_a_way_out(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Promise: where no variant fits, the error says to write the costs elsewhere."""
    import lasagna.cli.costs_file as module

    def none(variants: object, block: int) -> None:
        raise PackageError("no variant fits")

    monkeypatch.setattr(module, "choose_variant", none)
    with pytest.raises(PackageError, match=r"net\.lsg: no variant .* lasagna inspect --costs"):
        read_costs(package)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_can_be_read(path: Path) -> None:
    """Promise: examples/costs/ is what the current version writes, of eleven real networks."""
    name, forms = read_costs(path)

    assert name == path.stem
    assert [one.form for one in forms] == ["sliced", "whole", "frozen"]
    assert json.loads(path.read_text())["measured_on"]
    assert len(EXAMPLES) == 11
