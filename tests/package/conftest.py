"""Two small real packages, sealed once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.trust.model_keys import ModelKeys


@dataclass(frozen=True)
class Sealed:
    """A package and what its owner has."""

    path: Path
    keys: ModelKeys
    owner: Ed25519PrivateKey
    model: onnx.ModelProto

    @property
    def weights(self) -> list[bytes]:
        """The weights' bytes as they stand in the model."""
        return [numpy_helper.to_array(tensor).tobytes() for tensor in self.model.graph.initializer]


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """Conv, Relu, Conv, Gemm in both variants: some hundred KB in a few dozen sections."""
    rng = np.random.default_rng(1)
    weights = {
        "first": rng.standard_normal((16, 3, 3, 3)),
        "second": rng.standard_normal((24, 16, 3, 3)) / 12,
        "last": rng.standard_normal((24 * 64, 10)) / 40,
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], "trunk", pads=[1] * 4),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "last"], ["y"], "crown"),
    ]
    model = build(nodes, weights, [1, 3, 8, 8], [1, 10])
    return seal_model(model, "three layers", tmp_path_factory.mktemp("three"), slice_bytes=8192)


@pytest.fixture(scope="session")
def sealed_again(three_layers: Sealed, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """The same model, sealed a second time by the same owner: sections of the same sizes."""
    path = tmp_path_factory.mktemp("again") / "model.lsg"
    options = SealOptions(slice_bytes=8192, profile=False)
    keys, _ = seal(prepare(three_layers.model), "three layers", three_layers.owner, path, options)
    return Sealed(path, keys, three_layers.owner, three_layers.model)


@pytest.fixture(scope="session")
def one_gemm(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """One Gemm of 2.6 MB: a section of three chunks."""
    weight = np.random.default_rng(2).standard_normal((512, 1300))
    model = build([helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": weight}, [1, 512], [1, 1300])
    return seal_model(model, "one gemm", tmp_path_factory.mktemp("one"), slice_bytes=2**22)


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    shape_in: list[int],
    shape_out: list[int],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def seal_model(model: onnx.ModelProto, name: str, folder: Path, *, slice_bytes: int) -> Sealed:
    owner, path = Ed25519PrivateKey.generate(), folder / "model.lsg"
    options = SealOptions(slice_bytes=slice_bytes, profile=False)
    keys, _ = seal(prepare(model), name, owner, path, options)
    return Sealed(path, keys, owner, model)
