"""EfficientNet-Lite0: the graph has the published size and answers as the torch network does."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from lasagna.errors import ModelError
from lasagna.models.zoo import catalog
from lasagna.models.zoo.efficientnet import build_efficientnet_lite0
from lasagna.models.zoo.installed import package_file
from lasagna.models.zoo.torch_checkpoint import read_torch_checkpoint

# As the TensorFlow implementation writes them: repeats, kernel, strides, expansion, in, out.
BLOCKS = [
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
]


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, *shape: int) -> None:
        found[f"{name}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = shape[:1]
        found[f"{norm}.num_batches_tracked"] = ()

    convolution("_conv_stem", "_bn0", 32, 3, 3, 3)
    index = 0
    for text in BLOCKS:
        part = {field[0]: int(field[1:]) for field in text.split("_")}
        for repeat in range(part["r"]):
            fan_in = part["o"] if repeat else part["i"]
            name, wide = f"_blocks.{index}", fan_in * part["e"]
            if part["e"] > 1:
                convolution(f"{name}._expand_conv", f"{name}._bn0", wide, fan_in, 1, 1)
            kernel = (part["k"], part["k"])
            convolution(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, *kernel)
            convolution(f"{name}._project_conv", f"{name}._bn2", part["o"], wide, 1, 1)
            index += 1
    convolution("_conv_head", "_bn1", 1280, 320, 1, 1)
    found["_fc.weight"], found["_fc.bias"] = (1000, 1280), (1000,)
    return found


@pytest.fixture
def random_checkpoint() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    return {
        name: random.uniform(0.5, 1, shape).astype(np.int64 if "num_" in name else np.float32)
        for name, shape in shapes().items()
    }


@pytest.fixture(scope="module")
def trained() -> dict[str, NDArray[Any]]:
    entry = catalog.CATALOG["efficientnet-lite0"]
    file = "models/efficientnet-lite0-57934424.pth"
    try:
        return read_torch_checkpoint(package_file(entry.package, file, needs=entry.needs))
    except ModelError as error:
        pytest.skip(str(error))


def test_has_the_published_size(random_checkpoint: dict[str, NDArray[Any]]) -> None:
    model = onnx.shape_inference.infer_shapes(build_efficientnet_lite0(random_checkpoint))
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert set(weights) - {"zero", "six"} == {name for name in shapes() if "num_" not in name}
    values = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    outputs = {name: [dim.dim_value for dim in shape.dim] for name, shape in values.items()}
    additions = sum(
        prod(weights[node.input[1]]) * prod(outputs[node.output[0]][2:])
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    )
    trainable = [shape for name, shape in weights.items() if "running" not in name]
    # README of the official implementation: 4.7M parameters and 407M multiply-adds; among these it
    # counts more than the convolutions, whose sum is 385M.
    assert sum(prod(shape) for shape in trainable) - 2 == 4_652_008
    assert additions == pytest.approx(407e6, rel=0.06)


def test_pads_as_tensorflow_does(random_checkpoint: dict[str, NDArray[Any]]) -> None:
    model = build_efficientnet_lite0(random_checkpoint)
    pads = {
        node.name: list(attribute.ints)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "pads"
    }
    assert pads["_conv_stem"] == [0, 0, 1, 1]  # 3x3 at stride 2 on 224
    assert pads["_blocks.3._depthwise_conv"] == [1, 1, 2, 2]  # 5x5 at stride 2 on 56
    assert pads["_blocks.4._depthwise_conv"] == [2, 2, 2, 2]  # 5x5 at stride 1
    assert pads["_conv_head"] == [0, 0, 0, 0]


def test_the_batch_is_free_and_images_do_not_mix(trained: dict[str, NDArray[Any]]) -> None:
    session = ort.InferenceSession(build_efficientnet_lite0(trained).SerializeToString())
    images = np.random.default_rng(0).standard_normal((3, 3, 224, 224), np.float32)
    (together,) = session.run(["probabilities"], {"image": images})
    assert together.shape == (3, 1000)
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    (alone,) = session.run(None, {"image": images[1:2]})
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_answers_as_the_torch_network(trained: dict[str, NDArray[Any]]) -> None:
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict({key: torch.tensor(value) for key, value in trained.items()})
    images = np.random.default_rng(1).standard_normal((2, 3, 224, 224), np.float32)
    with torch.no_grad():
        expected = torch.softmax(network(torch.from_numpy(images)), dim=1).numpy()
    session = ort.InferenceSession(build_efficientnet_lite0(trained).SerializeToString())
    (found,) = session.run(None, {"image": images})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_refuses_a_missing_tensor(random_checkpoint: dict[str, NDArray[Any]]) -> None:
    del random_checkpoint["_blocks.7._bn1.running_var"]
    with pytest.raises(ModelError, match=r"no tensor '_blocks\.7\._bn1\.running_var'"):
        build_efficientnet_lite0(random_checkpoint)


def test_refuses_another_shape(random_checkpoint: dict[str, NDArray[Any]]) -> None:
    random_checkpoint["_fc.bias"] = np.zeros(10, np.float32)
    with pytest.raises(ModelError, match=r"'_fc\.bias' is float32\[10\], not float32\[1000\]"):
        build_efficientnet_lite0(random_checkpoint)


def test_refuses_a_deeper_network(random_checkpoint: dict[str, NDArray[Any]]) -> None:
    random_checkpoint["_blocks.16._bn1.bias"] = np.zeros(10, np.float32)
    with pytest.raises(ModelError, match="for another network"):
        build_efficientnet_lite0(random_checkpoint)
