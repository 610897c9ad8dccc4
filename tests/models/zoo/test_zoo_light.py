"""The nine light networks: right with the published constants, lively with random weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lasagna.errors import UsageError
from lasagna.models.zoo.light import (
    LIGHT_NETWORKS,
    light_expected_output,
    light_input,
    light_model,
)

LARGE_MB = 40
ALL = [
    pytest.param(name, marks=pytest.mark.slow) if network.weight_mb > LARGE_MB else name
    for name, network in LIGHT_NETWORKS.items()
]


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def run(session: ort.InferenceSession, image: NDArray[np.float32]) -> NDArray[np.float64]:
    (value,) = session.get_inputs()
    (found,) = session.run(None, {value.name: image})
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("name", ALL)
def test_published_constants_give_the_published_output(name: str) -> None:
    model = light_model(name)
    onnx.checker.check_model(model)
    expected = light_expected_output(name)
    assert expected.size == 1000
    # The tolerance of onnx.backend.test.
    found = run(session_of(model), light_input(name))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_random_weights_are_lively(name: str) -> None:
    session = session_of(light_model(name, seed=1))
    random = np.random.default_rng(1)
    noise = random.standard_normal((2, 1, 3, 224, 224), np.float32)
    images = [light_input(name), random.random((1, 3, 224, 224), np.float32), *noise]
    rows = [run(session, image).reshape(-1) for image in images]
    if name == "densenet121":  # its answer is logits
        assert all(0.5 < row.std() < 8 for row in rows)
        rows = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]
    for row in rows:
        assert row.sum() == pytest.approx(1, abs=1e-5)
        assert 0.005 < row.max() < 0.99
        assert row.min() < 0.0005
    for first in range(len(rows)):
        for second in range(first):
            distance = np.abs(rows[first] - rows[second]).sum() / 2
            assert distance > 0.03, (first, second)


def test_weights_are_initializers_and_the_image_is_the_only_input() -> None:
    # resnet50 and zfnet512 come with a queue of training images as an input that nothing uses.
    model = light_model("resnet50")
    assert [value.name for value in model.graph.input] == ["gpu_0/data_0"]
    assert not any(node.op_type == "ConstantOfShape" for node in model.graph.node)
    used = {value for node in model.graph.node for value in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    assert model.ir_version >= 8


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "densenet121", "resnet50"])
def test_the_stated_size_is_that_of_the_weights(name: str) -> None:
    size = sum(
        len(tensor.raw_data)
        for tensor in light_model(name).graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    )
    assert size / 1e6 == pytest.approx(LIGHT_NETWORKS[name].weight_mb, abs=0.06)


def test_a_seed_fixes_the_weights() -> None:
    first, again, other = (light_model("squeezenet", seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_variances_are_positive_and_scales_near_one() -> None:
    graph = light_model("resnet50", seed=0).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    sums = {value for node in graph.node if node.op_type == "Sum" for value in node.input}
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            assert tensors[node.input[4]].min() > 0.5
            if node.output[0] not in sums:
                assert np.abs(tensors[node.input[1]] - 1).max() < 0.11


def test_names_the_networks_there_are() -> None:
    for function in (light_model, light_input, light_expected_output):
        with pytest.raises(UsageError, match="no light network 'lenet': alexnet, densenet121"):
            function("lenet")
