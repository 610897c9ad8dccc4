"""Folding per-channel scales and shifts into the BatchNormalization before them.

Networks that came through Caffe carry a Scale layer after every normalisation, which ONNX shows as
``BatchNormalization -> Mul -> Add``. ONNX Runtime folds such a chain into a convolution before it,
but not where the normalisation comes first, as in DenseNet: there it makes three passes over the
largest tensors of the network, and three copies of them in enclave memory. One is enough:
``m (g x' + b) + a = (m g) x' + (m b + a)``.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from lasagna.models.graph import Array, uses

_SMALL: Final = 1024
"""Elements of an initializer that may tell a shape: targets, axes, scales of a Resize."""


def fold_channel_affine(model: onnx.ModelProto) -> int:
    """Fold every Mul and Add of one value a channel into the normalisation that feeds it.

    Args:
        model: changed in place. Initializers in external files are left alone.

    Returns:
        How many nodes went.
    """
    values = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    }
    made = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in uses(node))
    readers.update(value.name for value in model.graph.output)
    scale_of: dict[str, onnx.NodeProto] = {}
    folded: list[onnx.NodeProto] = []
    ranks: dict[str, int] = {}
    for node in model.graph.node:
        if _normalisation(node, values):
            scale_of[node.output[0]] = node
            continue
        if node.op_type not in ("Mul", "Add") or node.domain:
            continue
        source = next((name for name in node.input if name in scale_of), None)
        if source is None or readers[source] != 1:
            continue
        other = node.input[1 - list(node.input).index(source)]
        norm = scale_of[source]
        operand = _per_channel(other, values, made, _value(values, norm.input[1]).size)
        if operand is None:
            continue
        ranks = ranks or _ranks(model)
        if ranks.get(norm.input[0]) != 4:  # elsewhere [C, 1, 1] is not along the channels
            continue
        scale, shift = _value(values, norm.input[1]), _value(values, norm.input[2])
        if node.op_type == "Mul":
            scale, shift = scale * operand, shift * operand
        else:
            shift = shift + operand
        for position, array in ((1, scale), (2, shift)):
            name = f"{node.output[0]}__folded_{position}"
            values[name] = numpy_helper.from_array(np.asarray(array), name)
            model.graph.initializer.append(values[name])
            norm.input[position] = name
        norm.output[0] = node.output[0]
        scale_of[norm.output[0]] = norm
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)
    return len(folded)


def _normalisation(node: onnx.NodeProto, values: dict[str, onnx.TensorProto]) -> bool:
    """Inference-mode BatchNormalization of one output with known scale and shift."""
    training = any(a.name == "training_mode" and a.i for a in node.attribute)
    return (
        node.op_type == "BatchNormalization"
        and not node.domain
        and not training
        and len([name for name in node.output if name]) == 1
        and node.input[1] in values
        and node.input[2] in values
    )


def _value(values: dict[str, onnx.TensorProto], name: str) -> Array:
    return np.asarray(numpy_helper.to_array(values[name]))


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Dimensions of every tensor, where ONNX's shape inference can tell; weights are not copied."""
    graph = onnx.GraphProto(name="ranks", node=model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != tensor.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    light = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, graph=graph
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(light).graph
    except onnx.shape_inference.InferenceError:
        return {}
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }


def _per_channel(
    name: str,
    values: dict[str, onnx.TensorProto],
    made: dict[str, onnx.NodeProto],
    channels: int,
) -> Array | None:
    """The operand as one value a channel, or None when it is something else.

    It must broadcast along axis 1 of [N, C, H, W]: [C, 1, 1] or [1, C, 1, 1], given as such or
    made so by Unsqueeze.
    """
    if name in values:
        array = _value(values, name)
    else:
        node = made.get(name)
        if node is None or node.op_type != "Unsqueeze" or node.input[0] not in values:
            return None
        axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
        if axes is None and len(node.input) > 1 and node.input[1] in values:
            axes = [int(axis) for axis in _value(values, node.input[1])]
        if axes is None:
            return None
        array = np.expand_dims(_value(values, node.input[0]), tuple(axes))
    trailing = array.shape[1:] if array.ndim == 4 and array.shape[0] == 1 else array.shape
    return array.reshape(-1) if trailing == (channels, 1, 1) else None
