"""Promise: real networks run sealed, in slices, in an enclave far smaller than their weights, and
give what plain ONNX Runtime gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare, random_inputs
from lasagna.models.zoo.light import light_expected_output, light_input, light_model

SMALL = ("densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet")
LARGE = ("alexnet", "vgg19", "zfnet512")
ALL = (*SMALL, *LARGE)
CIPHERTEXT = 1_000_000
"""Of a request on its way in."""

pytestmark = pytest.mark.slow


def enclave_budget(weights: int) -> int:
    """A quarter of the weights or 8 MB, whichever is larger."""
    return max(weights // 4, 8_000_000)


@pytest.mark.parametrize("seed", [None, 1], ids=["published", "random"])
@pytest.mark.parametrize("name", ALL)
def test_light_network(name: str, seed: int | None, tmp_path: Path) -> None:
    model = light_model(name, seed=seed)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    budget = enclave_budget(weights)
    source = prepare(model)
    options = SealOptions(
        slice_bytes=min(budget // 64, 8 * 2**20),
        memory_bytes=max(budget // 32, 256 * 1024),
        profile=False,
        portable=False,
    )
    path = tmp_path / "model.lsg"
    keys, report = seal(source, name, Ed25519PrivateKey.generate(), path, options)
    manifest = report.manifest
    if seed is None:
        values = {manifest.inputs[0].name: light_input(name)}
        expected = [light_expected_output(name)]
    else:
        plain = open_session(source)
        values = random_inputs(plain, 1, np.random.default_rng(7))
        expected = plain.run(None, values)
    budget += CIPHERTEXT
    with InsecureDirectEnclave(path, keys, budget) as enclave:
        outputs = enclave.infer(manifest.inputs, manifest.outputs, values)
        again = enclave.infer(manifest.inputs, manifest.outputs, values)
        assert enclave.plan.total_bytes <= budget
        assert enclave.plan.pinned_bytes < enclave.plan.weight_bytes, "some must be streamed"
        stats = enclave.stats()
        assert stats.pool_high_water + stats.workspace_bytes <= budget
        assert stats.slice_runs == 2 * enclave.plan.slices
    for spec, want in zip(manifest.outputs, expected, strict=True):
        np.testing.assert_allclose(outputs[spec.name], want, rtol=1e-4, atol=1e-4)
        scale = np.abs(want).max()
        assert np.abs(outputs[spec.name] - want).max() <= 1e-4 * scale
        np.testing.assert_array_equal(outputs[spec.name], again[spec.name])
