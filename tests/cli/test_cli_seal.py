from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.cli.keygen import create_owner_key, owner_public_key
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import decode_model_keys


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["seal", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model ``net.onnx`` is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    onnx.save(network(["N", 40]), "net.onnx")
    return tmp_path


def network(x: list[Any]) -> onnx.ModelProto:
    weight = np.random.default_rng(7).standard_normal((40, 60)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x[:-1], 60])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(message: str, *arguments: str | Path, exit_code: int = 2) -> None:
    before = {path: path.read_bytes() for path in Path.cwd().iterdir() if path.is_file()}
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert message in result.stderr
    after = {path: path.read_bytes() for path in Path.cwd().iterdir() if path.is_file()}
    assert after == before  # not even an owner key was made


def test_package_and_key_open_each_other(folder: Path) -> None:
    result = run("net.onnx")

    assert result.exit_code == 0
    assert names(folder) == ["net.key", "net.lsg", "net.onnx", "owner.pem"]
    assert (mode(folder / "net.key"), mode(folder / "owner.pem")) == (0o600, 0o600)
    keys = decode_model_keys((folder / "net.key").read_bytes())
    with Package(folder / "net.lsg") as package:
        package.verify_signature(keys.owner_public_key)
        opened = OpenPackage(package, keys.content_key.reveal())
        assert opened.details(package.manifest.variants[0]).slices[0].layers[0].op == "FusedMatMul"
        assert package.manifest.name == "net"


def test_summary_tells_what_was_sealed_and_where_it_goes(folder: Path) -> None:
    result = run("net.onnx", "--no-profile")

    for text in (
        "portable",
        "9.60 kB",
        "takes batches: exported with a batch dimension",
        "net.lsg",
        "for any server",
        "net.key: for the key broker only",
        "self-check",
    ):
        assert text in result.stdout
    assert "made an owner key, owner.pem" in result.stderr


def test_json_is_all_there_is_on_stdout(folder: Path) -> None:
    result = run("net.onnx", "--json", "--name", "a net", "-o", "a.lsg", "--keys", "b.key")
    facts = json.loads(result.stdout)

    assert facts["name"] == "a net"
    assert (facts["package"], facts["keys"]) == ("a.lsg", "b.key")
    assert facts["file_bytes"] == (folder / "a.lsg").stat().st_size
    assert facts["batchable"] is True
    assert facts["variants"][0]["name"] == "portable"
    assert facts["variants"][0]["self_check"] < 1e-4
    with Package(folder / "a.lsg") as package:
        assert facts["model_digest"] == package.model_digest.hex()
        assert facts["package_id"] == package.manifest.package_id.hex()


def test_existing_owner_key_signs(folder: Path) -> None:
    public = owner_public_key(create_owner_key(folder / "mine.pem"))
    result = run("net.onnx", "--owner-key", "mine.pem", "--json", "--only", "portable")

    assert json.loads(result.stdout)["owner"] == public.hex()
    assert not (folder / "owner.pem").exists()
    with Package(folder / "net.lsg") as package:
        package.verify_signature(public)


def test_owner_key_that_anybody_can_read_is_refused(folder: Path) -> None:
    create_owner_key(folder / "owner.pem")
    (folder / "owner.pem").chmod(0o644)

    refused("chmod 600 owner.pem", "net.onnx")


def test_options_reach_the_sealing(folder: Path) -> None:
    result = run("net.onnx", "--json", "--slice-bytes", "4096", "--memory-bytes", "1MB")

    (variant,) = json.loads(result.stdout)["variants"]
    assert variant["slices"] >= 4
    assert variant["largest_slice_bytes"] <= 4096


def test_open_dimensions_are_fixed(folder: Path) -> None:
    onnx.save(network(["N", "words", 40]), "words.onnx")

    refused("open dimension 'words' of input 'x'", "words.onnx", exit_code=1)
    refused("no dimension 'word'", "words.onnx", "--dim", "word=7")
    result = run("words.onnx", "--dim", "words=7", "--json")
    assert result.exit_code == 0
    with Package(folder / "words.lsg") as package:
        assert package.manifest.inputs[0].row_shape == (1, 7, 40)


@pytest.mark.parametrize("text", ["words", "words=", "=7", "words=x", "words=-1", "words=²"])
def test_malformed_dimension(folder: Path, text: str) -> None:
    refused("does not fix a dimension: write --dim NAME=VALUE", "net.onnx", "--dim", text)


def test_model_of_the_zoo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasagna.models.zoo.catalog.load", lambda name: network([1, 40]))
    result = run("--zoo", "little", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["name"] == "little"
    assert (folder / "little.lsg").exists()


def test_unknown_model_of_the_zoo(folder: Path) -> None:
    refused("there is no model 'squeezenot' in the zoo", "--zoo", "squeezenot")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one model"),
        (["net.onnx", "--zoo", "squeezenet"], "give one model"),
        (["net.onnx", "--slice-bytes", "big"], "'big' is not a size"),
        (["net.onnx", "--slice-bytes", "1kB"], "are too small"),
        (["net.onnx", "--keys", "net.lsg"], "three different files"),
        (["net.onnx", "-o", "owner.pem"], "three different files"),
        (["net.onnx", "-o", "none/net.lsg"], "there is no directory none"),
        (["net.onnx", "-o", "."], ". is a directory"),
        (["net.onnx", "-o", ".", "--force"], ". is a directory"),
        (["net.onnx", "--name", ""], "1 to 256 characters"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: list[str], message: str) -> None:
    refused(message, *arguments)


def test_file_that_is_no_model(folder: Path) -> None:
    (folder / "net.onnx").write_bytes(b"no model")

    refused("net.onnx is not a valid ONNX model", "net.onnx", exit_code=1)
    refused("can't read none.onnx: No such file", "none.onnx", exit_code=1)


@pytest.mark.parametrize("existing", ["net.lsg", "net.key"])
def test_existing_files_are_kept_without_force(folder: Path, existing: str) -> None:
    (folder / existing).write_bytes(b"precious")

    refused(f"{existing} exists; --force replaces it", "net.onnx")


def test_force_replaces_both_files(folder: Path) -> None:
    run("net.onnx")
    before = (folder / "net.lsg").read_bytes()
    result = run("net.onnx", "--force")

    assert result.exit_code == 0
    assert (folder / "net.lsg").read_bytes() != before
    keys = decode_model_keys((folder / "net.key").read_bytes())
    with Package(folder / "net.lsg") as package:
        OpenPackage(package, keys.content_key.reveal()).read_section(0)
    assert mode(folder / "net.key") == 0o600


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_interrupt_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, force: list[str]
) -> None:
    run("net.onnx")
    if not force:
        (folder / "net.lsg").unlink()
        (folder / "net.key").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*arguments: object) -> bytes:
        assert len(names(folder)) > len(before)  # both files are begun
        raise KeyboardInterrupt

    monkeypatch.setattr("lasagna.models.seal.chunk_associated_data", interrupt)
    result = run("net.onnx", *force)

    assert result.exit_code == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_key_stands_in_what_is_shown(folder: Path) -> None:
    result = run("net.onnx", "--json")
    secret = decode_model_keys((folder / "net.key").read_bytes()).content_key.reveal()

    assert secret.hex() not in result.output
