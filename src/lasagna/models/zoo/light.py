"""The nine classic image networks whose graphs the onnx package ships for its backend tests.

Their files are a few KB each because every weight is a ``ConstantOfShape``: the shapes are the
real networks', the values are all alike. Here each becomes an ordinary initializer, either with
the published value, for which the right output is published too, or with random values that
behave like a trained network's (``random_weights``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lasagna.errors import ModelError, UsageError
from lasagna.models.zoo.graph import IR_VERSION
from lasagna.models.zoo.random_weights import random_weights

_FOLDER: Final = "backend/test/data/light"


@dataclass(frozen=True, slots=True)
class LightNetwork:
    """One of the nine.

    Attributes:
        name: how Lasagna calls it.
        file: its file's name in the onnx package, without ``light_`` and ``.onnx``.
        title: its name for people.
        weight_mb: size of its float32 weights in 10^6 bytes.
        logit_gain: factor on the random weights of the last layer, measured so that logits of
            inputs of standard normal noise have a deviation of 2 to 4. Pooling is what makes the
            factors differ: it averages most of the signal away, or none.
    """

    name: str
    file: str
    title: str
    weight_mb: float
    logit_gain: float


_ALL: Final = (
    LightNetwork("alexnet", "bvlc_alexnet", "AlexNet", 243.9, 2.0),
    LightNetwork("densenet121", "densenet121", "DenseNet-121", 32.6, 8.0),
    LightNetwork("inception_v1", "inception_v1", "GoogLeNet (Inception v1)", 28.0, 4.0),
    LightNetwork("inception_v2", "inception_v2", "Inception v2", 44.9, 2.5),
    LightNetwork("resnet50", "resnet50", "ResNet-50", 102.4, 10.0),
    LightNetwork("shufflenet", "shufflenet", "ShuffleNet", 5.7, 1.5),
    LightNetwork("squeezenet", "squeezenet", "SqueezeNet", 4.9, 18.0),
    LightNetwork("vgg19", "vgg19", "VGG-19", 574.7, 1.5),
    LightNetwork("zfnet512", "zfnet512", "ZFNet-512", 349.0, 6.0),
)
LIGHT_NETWORKS: Final[Mapping[str, LightNetwork]] = MappingProxyType(
    {network.name: network for network in _ALL}
)
"""The networks by name."""


def light_model(name: str, *, seed: int | None = None) -> onnx.ModelProto:
    """A network as an ordinary model, for one image at a time as published.

    Args:
        name: a key of ``LIGHT_NETWORKS``.
        seed: of random weights (the same on every machine); None for the published constants.

    Returns:
        A model with one input, float32 [1, 3, 224, 224], and one output of 1000 numbers:
        probabilities, or logits from densenet121. Every weight is an initializer.

    Raises:
        UsageError: there is no such network.
        ModelError: the onnx package does not contain its file.
    """
    network = _network(name)
    try:
        model = onnx.load(_path(f"light_{network.file}.onnx"))
    except OSError as error:
        raise ModelError(f"the onnx package has no file for {name}: {error}") from error
    weights = _published_weights(model.graph)
    _keep_used(model.graph, weights)
    if seed is not None:
        shapes = {key: weight.shape for key, weight in weights.items()}
        weights = random_weights(model.graph, shapes, seed, network.logit_gain)
    for key, weight in weights.items():
        # Added in place, not by numpy_helper: VGG-19 has a weight of 411 MB, and every copy counts.
        model.graph.initializer.add(
            name=key,
            data_type=TensorProto.FLOAT,
            dims=weight.shape,
            raw_data=weight.astype("<f4", copy=False).tobytes(),
        )
    # From version 4 on an initializer need not be an input as well.
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def light_input(name: str) -> NDArray[np.float32]:
    """The input for which ``light_expected_output`` holds, [1, 3, 224, 224].

    A ramp from 0 to 1, ``generate_dummy_data`` of ``onnx.backend.test.runner``.

    Raises:
        UsageError: there is no such network.
    """
    _network(name)
    shape = (1, 3, 224, 224)
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) / count).astype(np.float32)


def light_expected_output(name: str) -> NDArray[np.float32]:
    """What a network with the published constants answers to ``light_input``.

    Raises:
        UsageError: there is no such network.
        ModelError: the onnx package does not contain its file.
    """
    network = _network(name)
    try:
        data = Path(_path(f"light_{network.file}_output_0.pb")).read_bytes()
    except OSError as error:
        raise ModelError(f"the onnx package has no output for {name}: {error}") from error
    return numpy_helper.to_array(TensorProto.FromString(data))


def _network(name: str) -> LightNetwork:
    network = LIGHT_NETWORKS.get(name)
    if network is None:
        raise UsageError(f"there is no light network {name!r}: {', '.join(LIGHT_NETWORKS)}")
    return network


def _path(file: str) -> Path:
    return Path(os.fspath(onnx.__path__[0]), _FOLDER, file)


def _published_weights(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Take the float weights out of a graph, with those that its ``ConstantOfShape`` nodes make."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if tensor.data_type == TensorProto.FLOAT
    }
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            value = numpy_helper.to_array(node.attribute[0].t)
            shape = numpy_helper.to_array(tensors[node.input[0]])
            weights[node.output[0]] = np.broadcast_to(value, tuple(shape.tolist()))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return weights


def _keep_used(graph: onnx.GraphProto, weights: dict[str, NDArray[Any]]) -> None:
    """Drop what no node uses: weights, initializers and inputs, zfnet512's data queue among them.

    Weights are no inputs any more, and are put back as initializers by the caller.
    """
    used = {value for node in graph.node for value in node.input}
    for name in weights.keys() - used:
        del weights[name]
    tensors = [
        tensor for tensor in graph.initializer if tensor.name in used and tensor.name not in weights
    ]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    constants = weights.keys() | {tensor.name for tensor in tensors}
    inputs = [value for value in graph.input if value.name in used - constants]
    del graph.input[:]
    graph.input.extend(inputs)
