"""A model's graph with its weights beside it: what tiling, cutting and slicing work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from lasagna.errors import ModelError

LIFT_BYTES: Final = 1024
"""Initializers of this size and more become graph inputs; smaller ones stay in the graph
(DESIGN.md, fact 1). Shapes, axes and scales, which kernels want as constants, are smaller."""

_BLOCK: Final = 256
_ADDEND: Final = 3
"""Which input they add; the standard's own Conv has three in all."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """An optimised graph whose weights are graph inputs.

    Attributes:
        nodes: in an order in which they can run.
        weights: what was lifted, by tensor name; may be memory-mapped.
        constants: initializers that stay, by tensor name.
        inputs: the model's own inputs, in order.
        outputs: the model's outputs, in order.
        opsets: operator set versions the nodes are written against.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: Mapping[str, Array]
    constants: Mapping[str, onnx.TensorProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opsets: tuple[onnx.OperatorSetIdProto, ...]

    def array(self, name: str) -> Array | None:
        """The value of a weight or constant, or None for a computed tensor."""
        if name in self.weights:
            return self.weights[name]
        if name in self.constants:
            return np.asarray(onnx.numpy_helper.to_array(self.constants[name]))
        return None

    def opset(self, domain: str = "") -> int:
        """The operator set version of a domain (0 when the graph does not use it)."""
        return next((entry.version for entry in self.opsets if entry.domain == domain), 0)


def addend(node: onnx.NodeProto) -> str | None:
    """The tensor that ONNX Runtime's own convolutions add to their result, if there is one."""
    fused = node.op_type in ("Conv", "FusedConv") and len(node.input) > _ADDEND
    return (node.input[_ADDEND] or None) if fused else None


def copy_into(target: Array, source: Array) -> None:
    """Copy an array of the same shape; transposed matrices three times as fast as NumPy does.

    NumPy reads one element a cache line of a transposed matrix. In blocks the lines stay cached.
    """
    if source.ndim != 2 or source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for row in range(0, source.shape[0], _BLOCK):
        for column in range(0, source.shape[1], _BLOCK):
            block = slice(row, row + _BLOCK), slice(column, column + _BLOCK)
            target[block] = source[block]


def contiguous(array: Array) -> Array:
    """The array itself if its rows follow each other in memory, or else a copy."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy


def uses(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names a node reads, those that its subgraphs take from outside included; no duplicates."""
    names = dict.fromkeys(name for name in node.input if name)
    for attribute in node.attribute:
        for graph in _subgraphs(attribute):
            names.update(dict.fromkeys(_outer_names(graph)))
    return tuple(names)


def has_subgraph(node: onnx.NodeProto) -> bool:
    """Whether the node is control flow (If, Loop, Scan)."""
    return any(True for attribute in node.attribute for _ in _subgraphs(attribute))


def _subgraphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.type == onnx.AttributeProto.GRAPH:
        yield attribute.g
    elif attribute.type == onnx.AttributeProto.GRAPHS:
        yield from attribute.graphs


def _outer_names(graph: onnx.GraphProto) -> Iterator[str]:
    known = {value.name for value in graph.input} | {init.name for init in graph.initializer}
    for node in graph.node:
        for name in uses(node):
            if name not in known:
                yield name
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            yield value.name


def read_graph(path: Path) -> Graph:
    """Read an optimised model and lift its weights; large ones stay mapped in their file.

    Nodes and weights that no output depends on are dropped.

    Raises:
        ModelError: an initializer has an element type that NumPy lacks.
    """
    model = onnx.load(str(path), load_external_data=False)
    nodes = _needed(model.graph)
    used = {name for node in nodes for name in uses(node)}
    weights: dict[str, Array] = {}
    constants: dict[str, onnx.TensorProto] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in used:
            continue
        array = tensor_array(tensor, path.parent)
        if array.nbytes >= LIFT_BYTES:
            weights[tensor.name] = array
        else:
            constants[tensor.name] = onnx.numpy_helper.from_array(array, tensor.name)
    return Graph(
        nodes=nodes,
        weights=weights,
        constants=constants,
        inputs=tuple(v.name for v in model.graph.input),
        outputs=tuple(v.name for v in model.graph.output),
        opsets=tuple(model.opset_import),
    )


def _needed(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, ...]:
    """The nodes that an output depends on: ONNX Runtime keeps others, which could fill a slice."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(uses(node))
            kept.append(node)
    return tuple(reversed(kept))


def tensor_array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """An initializer's value; external data is mapped, not copied.

    Raises:
        ModelError: NumPy has no such element type, or the external file is too short.
    """
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError):
        raise ModelError(f"initializer {tensor.name!r} has an unknown element type") from None
    if dtype.kind not in "fiub":
        raise ModelError(
            f"initializer {tensor.name!r} has element type {dtype}, which can't be sealed"
        )
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    entry = {item.key: item.value for item in tensor.external_data}
    shape = tuple(tensor.dims)
    try:
        return np.memmap(
            folder / entry["location"],
            dtype=dtype,
            mode="r",
            offset=int(entry.get("offset", "0")),
            shape=shape,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"external data of {tensor.name!r} can't be read: {error}") from None
