"""A model that fails for some values of its input: rows of a table, looked up by number."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ENTRIES = 100
WIDTH = 16
TOKENS = 4
OUT_OF_RANGE = 31337
"""A value that must not be seen outside of the enclave."""


def lookup_model() -> onnx.ModelProto:
    """int64 [1, 4] to float32 [1, 8]: Gather, ReduceMean, MatMul; takes batches."""
    rng = np.random.default_rng(5)
    table = rng.standard_normal((ENTRIES, WIDTH)).astype(np.float32)
    last = rng.standard_normal((WIDTH, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"], axis=0),
        helper.make_node("ReduceMean", ["found"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "last"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", TOKENS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(last, "last")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
