from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.trust.model_keys import encode_model_keys


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``net.lsg`` in both variants, its ``net.key``, and ``other.key``."""
    folder = tmp_path_factory.mktemp("sealed")
    rng = np.random.default_rng(8)
    weights = {"k": rng.standard_normal((64, 16, 3, 3)), "w": rng.standard_normal((4096, 48))}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "k"], ["a"], "edges", pads=[1] * 4),
            helper.make_node("Relu", ["a"], ["b"], "rectifier"),
            helper.make_node("Flatten", ["b"], ["c"], "flat"),
            helper.make_node("Gemm", ["c", "w"], ["y"], "classes"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 48])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    source = prepare(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    for name in ("net", "other"):
        options = SealOptions(slice_bytes=300_000, profile=name == "net")
        owner = Ed25519PrivateKey.generate()
        keys, _ = seal(source, "net \x1b[2J[red]", owner, folder / f"{name}.lsg", options)
        (folder / f"{name}.key").touch(0o600)
        (folder / f"{name}.key").write_bytes(encode_model_keys(keys))
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def facts(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_public_facts_need_no_key(sealed: Path) -> None:
    result = run(sealed / "net.lsg")

    assert result.exit_code == 0
    for text in (
        "not checked: give --key",
        "takes batches: exported with a batch dimension",
        "x, float32 [1, 16, 8, 8], 4.10 kB",
        "y, float32 [1, 48], 192 B",
        "nchwc",
        "ms at 1",
        "ms at 8",
        "weights activations in and out, at batch 1",
    ):
        assert text in result.stdout


def test_layers_need_the_key(sealed: Path) -> None:
    public = run(sealed / "net.lsg", "--variant", "portable")
    owners = run(sealed / "net.lsg", "--variant", "portable", "--key", sealed / "net.key")

    for text in ("Conv", "Gemm", "edges", "tile 1/3"):
        assert text not in public.stdout
        assert text in owners.stdout
    assert "signature   the owner's" in owners.stdout


def test_table_has_a_line_and_a_bar_for_each_slice(sealed: Path) -> None:
    result = run(sealed / "net.lsg", "--variant", "portable")
    slices = facts(sealed / "net.lsg", "--variant", "portable")["variants"][0]["slices"]

    rows = [line for line in result.stdout.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert len(slices) == 3
    assert len(rows) == 4
    for row, one in zip(rows[2:], slices, strict=False):
        weights, activations = (part.count("█") for part in row.split("│"))
        assert weights > activations
        assert weights == round(28 * one["weight_bytes"] / slices[0]["weight_bytes"] - 0.25)


def test_name_from_the_file_can_not_steer_the_terminal(sealed: Path) -> None:
    result = run(sealed / "net.lsg")

    assert "\x1b" not in result.stdout
    assert "net \N{REPLACEMENT CHARACTER}[2J[red]" in result.stdout


def test_json_has_all_variants(sealed: Path) -> None:
    found = facts(sealed / "net.lsg")

    assert [one["name"] for one in found["variants"]][1] == "portable"
    assert found["name"] == "net \x1b[2J[red]"
    assert found["signature"] == "not checked"
    assert found["inputs"] == [
        {"name": "x", "dtype": "float32", "row_shape": [1, 16, 8, 8], "row_bytes": 4096}
    ]
    for variant in found["variants"]:
        assert sum(one["weight_bytes"] for one in variant["slices"]) == variant["weight_bytes"]
        assert variant["slices"][0]["in_bytes"] == 4096
        assert variant["slices"][-1]["out_bytes"] == 192
        assert set(variant["slices"][0]["compute_s"]) == {"1", "2", "4", "8"}
        assert "layer" not in variant["slices"][0]
        assert variant["whole"]["weight_bytes"] == variant["weight_bytes"]


def test_json_with_the_key_has_the_layers(sealed: Path) -> None:
    found = facts(sealed / "net.lsg", "--key", sealed / "net.key", "--variant", "portable")

    (variant,) = found["variants"]
    assert found["signature"] == "verified"
    layers = [layer for one in variant["slices"] for layer in one["layer"]]
    assert [layer["tile"] for layer in layers if layer["op"] == "Gemm"] == ["1/3", "2/3", "3/3"]
    assert variant["slices"][0]["inputs"][0]["row_shape"] == [1, 16, 8, 8]


def test_profile_may_be_missing(sealed: Path) -> None:
    result = run(sealed / "other.lsg")

    assert result.exit_code == 0
    assert "ms at" not in result.stdout
    assert facts(sealed / "other.lsg")["variants"][0]["slices"][0]["compute_s"] == {}


def test_verify_opens_every_section(sealed: Path) -> None:
    result = run(sealed / "net.lsg", "--key", sealed / "net.key", "--verify")

    assert result.exit_code == 0
    assert "every one opens" in result.stdout
    found = facts(sealed / "net.lsg", "--key", sealed / "net.key", "--verify")
    assert found["sections_verified"] is True


def test_verify_finds_a_changed_byte_at_the_end(sealed: Path, tmp_path: Path) -> None:
    data = bytearray((sealed / "net.lsg").read_bytes())
    data[-1] ^= 1
    changed = tmp_path / "changed.lsg"
    changed.write_bytes(data)

    result = run(changed, "--key", sealed / "net.key", "--verify")
    assert result.exit_code == 1
    assert "does not open: the package was changed" in result.stderr


def test_changed_manifest_is_found_with_the_key(sealed: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.lsg"
    changed.write_bytes((sealed / "net.lsg").read_bytes().replace(b"[red]", b"[Red]", 1))

    result = run(changed, "--key", sealed / "net.key")
    assert result.exit_code == 1
    assert "not signed by the owner's key" in result.stderr


def test_key_of_another_package_is_refused(sealed: Path) -> None:
    result = run(sealed / "net.lsg", "--key", sealed / "other.key")

    assert result.exit_code == 1
    assert "this key is for package" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--verify"], 2, "--verify opens every section, and that takes the package's --key"),
        (["--variant", "nchwc999"], 2, "no variant 'nchwc999': it has nchwc"),
        (["--key", "none.key"], 2, "can't read none.key"),
        (["--png", "none/net.png"], 2, "can't draw none/net.png"),
        (["--png", "net.unknown"], 2, "can't draw net.unknown"),
    ],
)
def test_wrong_arguments(sealed: Path, arguments: list[str], exit_code: int, message: str) -> None:
    result = run(sealed / "net.lsg", *arguments)

    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr


def test_key_that_anybody_can_read_is_refused(sealed: Path, tmp_path: Path) -> None:
    key = tmp_path / "net.key"
    key.write_bytes((sealed / "net.key").read_bytes())
    key.chmod(0o644)

    assert "chmod 600" in run(sealed / "net.lsg", "--key", key).stderr


def test_file_that_is_no_package(sealed: Path) -> None:
    result = run(sealed / "net.key")

    assert result.exit_code == 1
    assert "not a Lasagna package" in result.stderr


@pytest.mark.parametrize("with_key", [False, True])
def test_picture_is_drawn(sealed: Path, tmp_path: Path, with_key: bool) -> None:
    key = ["--key", str(sealed / "net.key")] if with_key else []
    result = run(sealed / "net.lsg", "--png", tmp_path / "net.png", *key)

    assert result.exit_code == 0
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
