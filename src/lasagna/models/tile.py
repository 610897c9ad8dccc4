"""Tiling: a layer whose weights exceed the limit becomes several, each with a part of them.

Every tile computes some of the layer's output channels (Conv), columns (Gemm, MatMul) or embedding
columns (Gather) and a Concat joins them, so each number is computed by the same kernel from the
same operands as before. Tiling works on the optimised graph: in the NCHWc layout channels lie in
blocks, outermost, so a cut at a multiple of the block is a cut of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from lasagna.models.graph import Array, Graph, uses

TILE_MARK: Final = "__tile_"
"""Tile k of n of layer L is the node ``L__tile_k_of_n``."""
COLUMN_ALIGNMENT: Final = 16
"""Columns of a Gemm, MatMul or Gather are split in multiples of a cache line of float32."""


@dataclass(slots=True)
class _Tiling:
    """The graph under construction."""

    graph: Graph
    limit: int
    block: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def part(self, name: str, array: Array, axis: int, start: int, stop: int) -> str:
        """Keep ``start..stop`` of an axis of a weight or bias, lifted however small it is.

        A part that stayed a constant would make the graphs of equal tiles differ.
        """
        index = [slice(None)] * array.ndim
        index[axis] = slice(start, stop)
        part = f"{name}{TILE_MARK}axis{axis % array.ndim}_{start}_{stop}"
        self.weights[part] = array[tuple(index)]
        return part

    def channels(self, tensor: str, start: int, stop: int, name: str) -> onnx.NodeProto:
        """A node that takes channels (axis 1) start..stop of a computed tensor; gives ``name``."""
        if self.graph.opset() >= 10:
            inputs = [tensor]
            for part, value in (("from", start), ("to", stop), ("axis", 1)):
                constant = onnx.numpy_helper.from_array(
                    np.array([value], dtype=np.int64), f"{name}_{part}"
                )
                self.constants[constant.name] = constant
                inputs.append(constant.name)
            return onnx.helper.make_node("Slice", inputs, [name], name=name)
        return onnx.helper.make_node(
            "Slice", [tensor], [name], name=name, starts=[start], ends=[stop], axes=[1]
        )

    def join(self, layer: onnx.NodeProto, parts: list[list[onnx.NodeProto]], axis: int) -> None:
        """Append the tiles and the Concat that makes the layer's output of theirs.

        Args:
            layer: the layer as it was.
            parts: for each tile the nodes that prepare its inputs, and itself at the end.
            axis: along which the tiles' outputs lie.
        """
        outputs = []
        for number, (*before, part) in enumerate(parts):
            self.nodes.extend(before)  # just before their use: what waits takes memory
            part.name = f"{layer.name or layer.output[0]}{TILE_MARK}{number}_of_{len(parts)}"
            part.output[0] = f"{layer.output[0]}{TILE_MARK}{number}"
            outputs.append(part.output[0])
            self.nodes.append(part)
        name = f"{layer.name or layer.output[0]}{TILE_MARK}join"
        self.nodes.append(
            onnx.helper.make_node("Concat", outputs, [layer.output[0]], name=name, axis=axis)
        )


def tile_graph(graph: Graph, limit: int, block: int) -> Graph:
    """Split every layer with more than ``limit`` bytes of weights that can be split.

    Args:
        graph: an optimised graph.
        limit: bytes of weights a tile may have. The smallest tile may exceed it: one channel
            (one block of them in the NCHWc layout) or 16 columns.
        block: channels per block of the NCHWc layout, 0 for none.

    Returns:
        An equivalent graph. Layers of other kinds stay whole, however large they are.
    """
    tiling = _Tiling(graph, limit, block)
    for node in graph.nodes:
        size = sum(graph.weights[name].nbytes for name in node.input if name in graph.weights)
        split = _SPLITTERS.get(node.op_type)
        if size <= limit or split is None or not split(tiling, node):
            tiling.nodes.append(node)
    used = {name for node in tiling.nodes for name in uses(node)}
    weights = {**graph.weights, **tiling.weights}
    return Graph(
        nodes=tuple(tiling.nodes),
        weights={name: array for name, array in weights.items() if name in used},
        constants={**graph.constants, **tiling.constants},
        inputs=graph.inputs,
        outputs=graph.outputs,
        opsets=graph.opsets,
    )


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    return twin


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _ranges(total: int, unit_bytes: int, limit: int, align: int) -> Iterator[tuple[int, int]]:
    """Cut ``total`` units into equal runs of at most ``limit`` bytes, at multiples of ``align``.

    Equal runs make equal graphs, which then share one session in the enclave.
    """
    most = max(align, limit // max(1, unit_bytes) // align * align)
    count = -(-total // most)
    step = -(-total // count // align) * align
    for start in range(0, total, step):
        yield start, min(total, start + step)


def _columns(
    tiling: _Tiling, node: onnx.NodeProto, weight: int, axis: int, bias: int | None
) -> bool:
    """Tile by output columns: ``axis`` of input ``weight``, last axis of input ``bias``."""
    name = node.input[weight]
    array = tiling.graph.weights.get(name)
    if array is None or any(n in tiling.graph.weights for n in node.input[:weight]):
        return False
    total = array.shape[axis]
    bias_name = node.input[bias] if bias is not None and len(node.input) > bias else ""
    bias_array = tiling.graph.array(bias_name) if bias_name else None
    if bias_name and bias_array is None:
        return False
    a_column = array.nbytes // total
    if bias_array is not None and _spans(bias_array, total):
        a_column += bias_array.nbytes // total
    else:
        bias = None
    parts = []
    for start, stop in _ranges(total, a_column, tiling.limit, COLUMN_ALIGNMENT):
        part = _copy(node)
        part.input[weight] = tiling.part(name, array, axis, start, stop)
        if bias is not None and bias_array is not None:
            part.input[bias] = tiling.part(bias_name, bias_array, -1, start, stop)
        parts.append([part])
    if len(parts) < 2:
        return False
    tiling.join(node, parts, axis=-1)
    return True


def _spans(bias: Array, columns: int) -> bool:
    """Whether a bias has one value a column (else it is broadcast and stays whole)."""
    return bool(bias.ndim) and bias.shape[-1] == columns


def _gemm(tiling: _Tiling, node: onnx.NodeProto) -> bool:
    transposed = _attribute(node, "transB", 0)
    return _columns(tiling, node, weight=1, axis=0 if transposed else 1, bias=2)


def _matmul(tiling: _Tiling, node: onnx.NodeProto) -> bool:
    array = tiling.graph.weights.get(node.input[1])
    if array is None or array.ndim < 2 or _attribute(node, "transBatchB", 0):
        return False
    axis = -2 if _attribute(node, "transB", 0) else -1
    return _columns(tiling, node, weight=1, axis=axis + array.ndim, bias=None)


def _gather(tiling: _Tiling, node: onnx.NodeProto) -> bool:
    array = tiling.graph.weights.get(node.input[0])
    if array is None or array.ndim != 2 or _attribute(node, "axis", 0) != 0:
        return False
    return _columns(tiling, node, weight=0, axis=1, bias=None)


def _conv(tiling: _Tiling, node: onnx.NodeProto) -> bool:
    weight = tiling.graph.weights.get(node.input[1])
    bias_name = node.input[2] if len(node.input) > 2 else ""
    bias = tiling.graph.array(bias_name) if bias_name else None
    if weight is None or (bias_name and bias is None):
        return False
    groups = _attribute(node, "group", 1)
    outputs = weight.shape[0]
    a_channel = (weight.nbytes + (0 if bias is None else bias.nbytes)) // outputs
    outs, ins = outputs // groups, weight.shape[1]
    align = tiling.block if node.domain.endswith("nchwc") else 1
    layer = node.output[0]
    parts = []

    def tile(first: int, last: int, groups_in: tuple[int, int] | None) -> None:
        nodes, part = [], _copy(node)
        part.input[1] = tiling.part(node.input[1], weight, 0, first, last)
        if bias is not None:
            part.input[2] = tiling.part(bias_name, bias, 0, first, last)
        if len(node.input) > 3 and node.input[3]:  # a fused residual is added to these channels
            part.input[3] = f"{layer}{TILE_MARK}sum_{first}"
            nodes.append(tiling.channels(node.input[3], first, last, part.input[3]))
        if groups_in is not None:
            start, stop = groups_in
            part.input[0] = f"{layer}{TILE_MARK}in_{first}"
            nodes.append(tiling.channels(node.input[0], start * ins, stop * ins, part.input[0]))
            for attribute in part.attribute:
                if attribute.name == "group":
                    attribute.i = stop - start
        parts.append([*nodes, part])

    if groups == 1:
        for first, last in _ranges(outputs, a_channel, tiling.limit, align):
            tile(first, last, None)
    elif outs * a_channel <= tiling.limit:
        whole = 1 if outs % align == 0 and ins % align == 0 else align
        for start, stop in _ranges(groups, outs * a_channel, tiling.limit, whole):
            tile(start * outs, stop * outs, (start, stop))
    else:
        for group in range(groups):
            for first, last in _ranges(outs, a_channel, tiling.limit, align):
                tile(group * outs + first, group * outs + last, (group, group + 1))
    if len(parts) < 2:
        return False
    tiling.join(node, parts, axis=1)
    return True


_SPLITTERS: Final[dict[str, Callable[[_Tiling, onnx.NodeProto], bool]]] = {
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "Gather": _gather,
    "Conv": _conv,
    "FusedConv": _conv,
}
