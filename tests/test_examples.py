"""Promise: the examples work as their headers say, are short, and leave nothing running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.package.conftest import build
from tests.server.serving import serving

from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.models.zoo import catalog
from lasagna.models.zoo.photos import photo_path
from lasagna.trust.model_keys import encode_model_keys

FOLDER: Final = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES: Final = sorted(path.name for path in FOLDER.iterdir() if path.suffix in {".py", ".sh"})
MAX_LINES: Final = 60
PHOTO_MODEL: Final = "efficientnet-lite0"


def run(example: str, *arguments: str | Path, folder: Path, code: int = 0) -> str:
    """Run an example from ``folder``, with this Python's commands on the path; what it prints.

    It ends only when every process that it has started is gone, since those hold its output open.
    """
    interpreter: Sequence[str] = [sys.executable] if example.endswith(".py") else []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*interpreter, FOLDER / example, *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert text.count("\n") <= MAX_LINES
    assert f"examples/{name}" in text.partition("import ")[0].partition("set -e")[0]
    assert f"({name})" in (FOLDER / "README.md").read_text()


def test_there_is_a_test_of_every_example() -> None:
    assert set(re.findall(r'\brun\(\s*"(\w+\.\w+)"', Path(__file__).read_text())) == set(EXAMPLES)


@pytest.mark.integration
def test_seal_a_model_writes_a_package_and_shows_its_layers(tmp_path: Path) -> None:
    weights = {"k": np.ones((8, 3, 3, 3)), "w": np.ones((8 * 64, 10))}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "k"], ["a"], "edges", pads=[1] * 4),
        onnx.helper.make_node("Flatten", ["a"], ["b"]),
        onnx.helper.make_node("Gemm", ["b", "w"], ["y"], "classes"),
    ]
    onnx.save(build(nodes, weights, [1, 3, 8, 8], [1, 10]), str(tmp_path / "net.onnx"))

    said = run("seal_a_model.py", "net.onnx", folder=tmp_path)
    written = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert written.keys() == {"net.onnx", "net.lsg", "net.key", "owner.pem"}
    assert written["net.key"] == written["owner.pem"] == 0o600
    assert re.search(r"differs from ONNX Runtime by [0-9]e[-+][0-9]+ at most", said)
    assert re.search(r"digest [0-9a-f]{64}\n\d+ slices with \d+ bytes of weights\n", said)
    assert re.search(r"^slice \d+: .*Gemm classes", said, re.MULTILINE)
    again = run("seal_a_model.py", "net.onnx", folder=tmp_path, code=1)
    assert "FileExistsError" in again, "a key is never replaced"


@pytest.mark.integration
def test_serve_and_infer_goes_the_whole_path_and_cleans_up(tmp_path: Path) -> None:
    said = run("serve_and_infer.sh", folder=tmp_path)
    assert re.search(r"model squeezenet: ready: 4\.9\d MB of weights", said)
    assert re.search(r"softmaxout_1: float32 \[1, 1000, 1, 1\]\n  row 0, largest: \d+: ", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_the_client_classifies_a_photo(tmp_path: Path) -> None:
    package, key_file = tmp_path / "net.lsg", tmp_path / "net.key"
    options = SealOptions(slice_bytes=512 * 1024, profile=False, portable=False)
    source, owner = prepare(catalog.load(PHOTO_MODEL)), Ed25519PrivateKey.generate()
    keys, _ = seal(source, PHOTO_MODEL, owner, package, options)
    key_file.touch(mode=0o600)
    key_file.write_bytes(encode_model_keys(keys))
    broker = ("--insecure-local-broker", key_file, "--broker-state", tmp_path / "state")
    with serving(package, *broker) as server:
        trust = (server.url, server.measurement, server.broker_key)
        said = run("client.py", *trust, photo_path("cat"), folder=tmp_path)
        assert re.match(r" *\d+\.\d%  (tabby|tiger cat|Egyptian cat)\n", said), said
        assert len(said.splitlines()) == 5
        foreign = (server.url, "00" * 32, server.broker_key)
        said = run("client.py", *foreign, photo_path("cat"), folder=tmp_path, code=1)
        assert "is not allowed" in said, "an enclave with other code gets no photo"
