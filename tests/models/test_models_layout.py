"""MatMul's weights transposed, and LRN in bands: the same numbers in another form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lasagna.models.bands import BANDS, split_bands
from lasagna.models.cut import Cuts
from lasagna.models.graph import Array, Graph
from lasagna.models.layout import transpose_matmul_weights
from lasagna.models.optimise import compile_variant
from lasagna.models.shapes import measure_shapes, open_bare, run_bare
from lasagna.models.slices import make_slices
from lasagna.models.source import Source, prepare
from lasagna.models.tile import tile_graph


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def weight(*shape: int, dtype: Any = np.float32) -> Array:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 3).astype(dtype)


def source_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    x: list[Any],
    *,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
) -> Source:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return prepare(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def compiled(source: Source) -> Graph:
    """Its graph; the weights are copied out of their file."""
    with tempfile.TemporaryDirectory() as folder:
        graph = compile_variant(source, Path(folder), portable=True).graph
        weights = {name: np.array(array) for name, array in graph.weights.items()}
    return Graph(graph.nodes, weights, graph.constants, graph.inputs, graph.outputs, graph.opsets)


def answers(graph: Graph, source: Source) -> list[Array]:
    """The outputs for the source's first reference, run as one slice."""
    rows = source.references[0].inputs
    tensors = measure_shapes(graph, rows, rows, batchable=False)
    (whole,) = make_slices(graph, tensors, Cuts((0, len(graph.nodes)), ()), batchable=False)
    feeds = {s.name: a for s, a in zip(whole.details.weights, whole.weights, strict=True)}
    feeds |= {i: rows[n] for i, n in zip(whole.details.inputs, whole.inputs, strict=True)}
    return run_bare(open_bare(whole.model), feeds)


def same(source: Source, graph: Graph) -> None:
    results = zip(answers(graph, source), source.references[0].outputs.values(), strict=True)
    for got, want in results:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@given(st.integers(1, 4), st.integers(2, 60), st.integers(2, 120), st.sampled_from([512, 10**6]))
@settings(max_examples=25, deadline=None)
def test_matmul_by_the_transpose_is_the_same(
    rows: int, inner: int, columns: int, limit: int
) -> None:
    source = source_of(
        [node("MatMul", ["x", "w"], "y")], {"w": weight(inner, columns)}, [1, rows, inner]
    )
    graph = transpose_matmul_weights(compiled(source))

    assert [one.op_type for one in graph.nodes] == (
        ["FusedMatMul"] if inner * columns >= 256 else ["MatMul"]
    )
    same(source, tile_graph(graph, limit, 0))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32])
def test_matmul_of_other_types_stays(dtype: Any) -> None:
    nodes = [node("MatMul", ["x", "w"], "y")]
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    source = source_of(nodes, {"w": weight(40, 40, dtype=dtype)}, [1, 40], dtype=onnx_type)
    graph = transpose_matmul_weights(compiled(source))

    assert [one.op_type for one in graph.nodes] == ["MatMul"]
    same(source, graph)


def test_matmul_by_stacked_matrices_stays() -> None:
    source = source_of([node("MatMul", ["x", "w"], "y")], {"w": weight(2, 40, 40)}, [1, 2, 3, 40])
    graph = transpose_matmul_weights(compiled(source))

    assert [one.op_type for one in graph.nodes] == ["MatMul"]
    same(source, graph)


def test_matrix_with_two_uses_is_kept_for_the_other() -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("MatMul", ["w", "a"], "b"),
        node("MatMul", ["b", "w"], "y"),
    ]
    source = source_of(nodes, {"w": weight(40, 40)}, [40, 40])
    graph = transpose_matmul_weights(compiled(source))

    assert sorted(one.op_type for one in graph.nodes) == ["FusedMatMul", "FusedMatMul", "MatMul"]
    same(source, graph)


def test_weights_of_branches_are_kept() -> None:
    inner = [
        helper.make_graph(
            [node("MatMul", ["r", name], name + "y")],
            name,
            [],
            [helper.make_tensor_value_info(name + "y", TensorProto.FLOAT, None)],
        )
        for name in "vw"
    ]
    nodes = [
        node("Relu", ["x"], "r"),
        node("ReduceSum", ["r"], "total", keepdims=0),
        node("Greater", ["total", "zero"], "condition"),
        node("If", ["condition"], "y", then_branch=inner[0], else_branch=inner[1]),
    ]
    weights = {"v": weight(40, 40), "w": weight(40, 40), "zero": np.zeros((), np.float32)}
    source = source_of(nodes, weights, [1, 40])

    same(source, transpose_matmul_weights(compiled(source)))


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("height", [64, 65, 67])
def test_lrn_in_bands_is_the_same(opset: int, height: int) -> None:
    source = source_of(
        [node("LRN", ["x"], "y", size=5, alpha=0.1)], {}, [1, 48, height, 96], opset=opset
    )
    graph = compiled(source)
    rows = source.references[0].inputs
    banded = split_bands(graph, measure_shapes(graph, rows, rows, batchable=False))

    assert [one.op_type for one in banded.nodes] == ["Split", *["LRN"] * BANDS, "Concat"]
    same(source, banded)


def test_small_lrn_stays_whole() -> None:
    source = source_of([node("LRN", ["x"], "y", size=5)], {}, [1, 8, 8, 8])
    graph = compiled(source)
    rows = source.references[0].inputs

    assert split_bands(graph, measure_shapes(graph, rows, rows, batchable=False)).nodes == (
        graph.nodes
    )
