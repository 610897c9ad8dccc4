"""Promise: plain ONNX Runtime computes the same in the emulated EPC, bit for bit, however small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from lasagna.models.source import prepare
from lasagna.models.zoo.catalog import load
from lasagna.tee.epc import emulator_environment, why_not
from lasagna.tee.epc_profiles import profile
from lasagna.units import MIB, PAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}"),
]

PLAIN = """
import hashlib, sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 2
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
shape = [size if isinstance(size, int) else 1 for size in entry.shape]
image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
(output, *_) = session.run(None, {entry.name: image})
print(hashlib.sha256(output.tobytes()).hexdigest(), float(np.ptp(output)) > 0)
"""


@pytest.fixture(scope="module", params=["resnet50", "vgg19"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / f"{request.param}.onnx"
    onnx.save(prepare(load(request.param, seed=1)).model, path)
    return path


def answers(network: Path, environment: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", PLAIN, str(network)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=110,
    ).stdout


def test_two_threads_compute_the_same_at_every_limit(network: Path) -> None:
    wanted = answers(network, {})
    assert wanted.endswith("True\n")
    for limit in (16.0, 32.0, 64.0, 93.5):
        pages = int(limit * MIB) // PAGE
        limited = emulator_environment(profile("none").costs(), limit_pages=pages)
        assert answers(network, limited) == wanted, f"{limit} MiB"
