"""Promise: whatever crosses a cut can be sealed in records; what can't is named when sealing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import ModelProto
from tests.models.test_models_seal import FAST, model_of, node, weight
from tests.models.test_models_shapes import measured

from lasagna.errors import ModelError
from lasagna.models.seal import seal
from lasagna.models.source import prepare
from lasagna.package.format import Details
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.records import MAX_NAME_BYTES


def sealed_details(model: ModelProto, path: Path) -> Details:
    keys, _ = seal(prepare(model), "model", Ed25519PrivateKey.generate(), path, FAST)
    with Package(path) as package:
        opened = OpenPackage(package, keys.content_key.reveal())
        return opened.details(package.manifest.variants[0])


def test_a_long_name_inside_the_network_is_shortened_and_stays_one_of_a_kind(
    tmp_path: Path,
) -> None:
    long = "layer/" * 60
    weights = {name: weight(64, 64) for name in ("u", "v", "w")}
    nodes = [
        node("MatMul", ["x", "u"], long + "1"),
        node("MatMul", [long + "1", "v"], long + "2"),
        node("MatMul", [long + "2", "w"], "y"),
    ]
    details = sealed_details(model_of(nodes, weights, ["N", 64]), tmp_path / "model.lsg")
    names = [spec.name for spec in details.tensors if "layer/" in spec.name]
    assert len(set(names)) == len(names) >= 2
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in names)


def test_a_long_name_of_an_input_is_refused(tmp_path: Path) -> None:
    """Clients call it by that name."""
    model = model_of([node("MatMul", ["x", "w"], "y")], {"w": weight(64, 64)}, ["N", 64])
    model.graph.input[0].name = model.graph.node[0].input[0] = "x" * (MAX_NAME_BYTES + 1)
    with pytest.raises(ModelError, match=r"input 'xxx.*can't be sealed in records: .* 256 bytes"):
        sealed_details(model, tmp_path / "model.lsg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [[-1, 0, 3], [-1, 1, 1, 1, 1, 1, 1, 1, 3]])
def test_a_tensor_that_no_record_carries_is_never_cut(shape: list[int]) -> None:
    width = 0 if 0 in shape else 3
    nodes = [
        node("Slice", ["x", "from", "to", "axis"], "a"),
        node("Reshape", ["a", "shape"], "b", allowzero=1),
        node("Sin", ["b"], "c"),
        node("ReduceSum", ["c"], "y", keepdims=0, noop_with_empty_axes=1),
    ]
    numbers = {
        "from": [0],
        "to": [width],
        "axis": [1],
        "shape": [1 if 0 in shape else -1, *shape[1:]],
    }
    weights = {name: np.array(value) for name, value in numbers.items()}
    tensors = measured(model_of(nodes, weights, [1 if 0 in shape else "N", 3]))
    assert tensors["a"].separable == (width == 3)
    assert not tensors["c"].separable
