"""Storing MatMul's weights the way its kernel reads them fastest.

An ordinary session packs constant weights when it opens. Weights that come and go can't be packed
ahead, and packing a [K, N] matrix at every run costs a fifth of a transformer's time. The same
matrix stored as [N, K] packs along memory: 2-7 % slower than packed ahead, instead of 19-21 %
(one thread of an EPYC 7003, docs/experiments/0001-matmul-layout.md).
"""

from __future__ import annotations

import numpy as np
import onnx

from lasagna.models.graph import Array, Graph, uses

MICROSOFT = "com.microsoft"


def transpose_matmul_weights(graph: Graph) -> Graph:
    """Turn every MatMul by a weight matrix into FusedMatMul by its transpose.

    Args:
        graph: an optimised graph.

    Returns:
        An equivalent graph; transposed weights are views, nothing is copied.
    """
    nodes, weights = [], dict(graph.weights)
    for node in graph.nodes:
        weight = _matrix(graph, node)
        if weight is None:
            nodes.append(node)
            continue
        name = f"{node.input[1]}__transposed"
        weights[name] = weight.T
        inputs = [node.input[0], name]
        twin = onnx.helper.make_node("FusedMatMul", inputs, node.output, node.name, transB=1)
        twin.domain = MICROSOFT
        nodes.append(twin)
    used = {name for node in nodes for name in uses(node)}
    opsets = list(graph.opsets)
    if not graph.opset(MICROSOFT):
        opsets.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    return Graph(
        nodes=tuple(nodes),
        weights={name: array for name, array in weights.items() if name in used},
        constants=graph.constants,
        inputs=graph.inputs,
        outputs=graph.outputs,
        opsets=tuple(opsets),
    )


def _matrix(graph: Graph, node: onnx.NodeProto) -> Array | None:
    """The weight of a MatMul by a matrix of float32, the only type that FusedMatMul takes."""
    if node.op_type != "MatMul" or node.domain or node.input[0] in graph.weights:
        return None
    weight = graph.weights.get(node.input[1])
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return None
    return weight
