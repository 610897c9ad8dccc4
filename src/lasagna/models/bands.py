"""Splitting layers whose kernel needs scratch space, not weights: they run band by band.

ONNX Runtime's LRN keeps two copies of its whole input beside input and output. Over bands of rows
of the image it computes the same numbers with scratch space for one band at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx

from lasagna.models.graph import Graph
from lasagna.models.shapes import TensorInfo
from lasagna.models.tile import TILE_MARK

BANDS: Final = 4
SMALLEST_ROW_BYTES: Final = 1024 * 1024
"""Below this the scratch space is not worth a copy."""


def split_bands(graph: Graph, tensors: Mapping[str, TensorInfo]) -> Graph:
    """Split every large LRN along the height of its image.

    Args:
        graph: an optimised graph.
        tensors: its shapes.

    Returns:
        An equivalent graph; the shapes of its new tensors must be measured.
    """
    nodes: list[onnx.NodeProto] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        spec = tensors[node.input[0]].spec if node.op_type == "LRN" else None
        if spec is None or spec.row_bytes < SMALLEST_ROW_BYTES or len(spec.row_shape) != 4:
            nodes.append(node)
            continue
        heights = [len(part) for part in np.array_split(np.arange(spec.row_shape[2]), BANDS)]
        layer = node.name or node.output[0]
        bands = [f"{layer}{TILE_MARK}in_{k}" for k in range(BANDS)]
        if graph.opset() >= 13:
            sizes = f"{layer}{TILE_MARK}heights"
            constants[sizes] = onnx.numpy_helper.from_array(np.array(heights, np.int64), sizes)
            split = onnx.helper.make_node("Split", [node.input[0], sizes], bands, axis=2)
        else:
            split = onnx.helper.make_node("Split", [node.input[0]], bands, axis=2, split=heights)
        split.name = f"{layer}{TILE_MARK}split"
        nodes.append(split)
        results = []
        for number, band in enumerate(bands):
            part = onnx.NodeProto()
            part.CopyFrom(node)
            part.name = f"{layer}{TILE_MARK}{number}_of_{BANDS}"
            part.input[0] = band
            part.output[0] = f"{layer}{TILE_MARK}out_{number}"
            results.append(part.output[0])
            nodes.append(part)
        name = f"{layer}{TILE_MARK}join"
        nodes.append(onnx.helper.make_node("Concat", results, [node.output[0]], name=name, axis=2))
    return Graph(
        nodes=tuple(nodes),
        weights=graph.weights,
        constants=constants,
        inputs=graph.inputs,
        outputs=graph.outputs,
        opsets=graph.opsets,
    )
