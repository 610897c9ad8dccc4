"""One small real network, sealed once, for all tests that need an enclave with a model in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.models.graph import Array
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare
from lasagna.models.zoo.light import light_model
from lasagna.package.format import Manifest
from lasagna.trust.model_keys import ModelKeys


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed SqueezeNet with random weights, and the model in the clear to compare with."""

    path: Path
    keys: ModelKeys
    manifest: Manifest
    plain: ort.InferenceSession

    def inputs(self, rows: int, seed: int = 0) -> dict[str, Array]:
        """So many random images."""
        rng = np.random.default_rng(seed)
        shape = self.manifest.inputs[0].shape(rows)
        return {self.manifest.inputs[0].name: rng.standard_normal(shape, dtype=np.float32)}

    def expected(self, inputs: dict[str, Array]) -> Array:
        """What plain ONNX Runtime gives for them."""
        return np.asarray(self.plain.run(None, inputs)[0])

    def output(self, outputs: dict[str, Array]) -> Array:
        """The model's only output."""
        return outputs[self.manifest.outputs[0].name]


@pytest.fixture(scope="session")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """SqueezeNet in slices of at most 512 KiB of weights."""
    source = prepare(light_model("squeezenet", seed=3))
    path = tmp_path_factory.mktemp("squeezenet") / "squeezenet.lsg"
    options = SealOptions(slice_bytes=512 * 1024, profile=False, portable=False)
    keys, report = seal(source, "squeezenet", Ed25519PrivateKey.generate(), path, options)
    return Sealed(path, keys, report.manifest, open_session(source))
