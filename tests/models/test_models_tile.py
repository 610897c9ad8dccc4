"""Tiling: the same numbers as untiled, and tiles within their limit."""

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

from lasagna.enclave.sessions import native_block
from lasagna.models.cut import Cuts
from lasagna.models.graph import Array, Graph, uses
from lasagna.models.optimise import compile_variant
from lasagna.models.shapes import measure_shapes, open_bare, run_bare
from lasagna.models.slices import make_slices
from lasagna.models.source import prepare
from lasagna.models.tile import COLUMN_ALIGNMENT, TILE_MARK, tile_graph

LIMIT = 4096
few = settings(max_examples=15, deadline=None)
both = pytest.mark.parametrize("portable", [True, False], ids=["portable", "native"])


def weight(*shape: int) -> Array:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / 4).astype(np.float32)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"the {output}", **attributes)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    x: tuple[int, ...],
    *,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def answers(graph: Graph, rows: dict[str, Array]) -> list[Array]:
    """All outputs of a graph, run as one slice."""
    tensors = measure_shapes(graph, rows, rows, batchable=False)
    (whole,) = make_slices(graph, tensors, Cuts((0, len(graph.nodes)), ()), batchable=False)
    feeds = {
        spec.name: array for spec, array in zip(whole.details.weights, whole.weights, strict=True)
    }
    feeds |= {
        local: rows[name] for local, name in zip(whole.details.inputs, whole.inputs, strict=True)
    }
    return run_bare(open_bare(whole.model), feeds)


def tile_sizes(graph: Graph, *, all_layers: bool = False) -> list[int]:
    """Bytes of weights of every tile, or of every layer."""
    return [
        sum(graph.weights[name].nbytes for name in uses(node) if name in graph.weights)
        for node in graph.nodes
        if all_layers or (TILE_MARK in node.name and "_of_" in node.name)
    ]


def tiled_equals_untiled(
    model: onnx.ModelProto, *, portable: bool, limit: int = LIMIT, smallest: int = 0
) -> Graph:
    """Compile, tile, run both; return the tiled graph. ``smallest`` is that of a tile, in bytes."""
    source = prepare(model)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_variant(source, Path(folder), portable=portable)
        tiled = tile_graph(compiled.graph, limit, compiled.block)
        rows = source.references[0].inputs
        for got, want in zip(answers(tiled, rows), answers(compiled.graph, rows), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        largest = max(tile_sizes(compiled.graph, all_layers=True), default=0)
    tiles = tile_sizes(tiled)
    assert all(size <= max(limit, smallest) for size in tiles)
    if largest <= limit:
        assert not tiles
    elif largest > max(limit, smallest):
        assert len(tiles) > 1
    return tiled


# Gemm, MatMul, Gather.


@both
@pytest.mark.parametrize("bias", ["none", "row", "scalar", "1xN", "MxN", "Mx1"])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm(portable: bool, bias: str, transposed: tuple[int, int]) -> None:
    gemm(portable, bias, transposed, rows=3, inner=37, columns=101)


@few
@given(
    st.booleans(),
    st.sampled_from(["none", "row", "scalar", "1xN", "MxN", "Mx1"]),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 260),
)
def test_gemm_of_any_size(
    portable: bool, bias: str, transposed: tuple[int, int], rows: int, inner: int, columns: int
) -> None:
    gemm(portable, bias, transposed, rows, inner, columns)


def gemm(
    portable: bool, bias: str, transposed: tuple[int, int], rows: int, inner: int, columns: int
) -> None:
    shapes = {
        "row": (columns,),
        "scalar": (),
        "1xN": (1, columns),
        "MxN": (rows, columns),
        "Mx1": (rows, 1),
    }
    weights = {"w": weight(columns, inner) if transposed[1] else weight(inner, columns)}
    if bias in shapes:
        weights["b"] = np.asarray(weight(*shapes[bias]))
    nodes = [
        node("Gemm", ["x", *weights], "y", transA=transposed[0], transB=transposed[1], alpha=0.5)
    ]
    model = model_of(nodes, weights, (inner, rows) if transposed[0] else (rows, inner))
    a_column = 4 * (inner + (rows if bias == "MxN" else 1))
    tiled_equals_untiled(model, portable=portable, smallest=COLUMN_ALIGNMENT * a_column)


@both
def test_gemm_with_activation(portable: bool) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], "a"), node("Relu", ["a"], "y")]
    model = model_of(nodes, {"w": weight(40, 100), "b": weight(100)}, (1, 40))
    tiled = tiled_equals_untiled(model, portable=portable)

    assert {part.op_type for part in tiled.nodes} == {"FusedGemm", "Concat"}


def test_old_gemm() -> None:
    # Before operator set 11 a Concat's axis was not to be negative.
    nodes = [node("Gemm", ["x", "w", "b"], "y")]
    model = model_of(nodes, {"w": weight(40, 100), "b": weight(100)}, (1, 40), opset=8)

    tiled_equals_untiled(model, portable=True)


@both
@given(st.integers(1, 3), st.integers(2, 50), st.integers(2, 150), st.booleans())
@few
def test_matmul(portable: bool, batch: int, inner: int, columns: int, stacked: bool) -> None:
    w = weight(batch, inner, columns) if stacked else weight(inner, columns)
    model = model_of([node("MatMul", ["x", "w"], "y")], {"w": w}, (batch, 4, inner))
    smallest = COLUMN_ALIGNMENT * w.nbytes // columns
    tiled_equals_untiled(model, portable=portable, smallest=smallest)


def test_matmul_with_a_transposed_weight() -> None:
    # Fused into FusedMatMul, unless ONNX Runtime has transposed the weight already.
    nodes = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")]
    model = model_of(nodes, {"w": weight(100, 40)}, (1, 4, 40))

    assert tile_sizes(tiled_equals_untiled(model, portable=True))


@given(st.integers(1, 90), st.integers(1, 200))
@few
def test_gather(entries: int, columns: int) -> None:
    model = model_of(
        [node("Gather", ["w", "x"], "y")],
        {"w": weight(max(2, entries), columns)},
        (1, 5),
        dtype=TensorProto.INT64,
    )
    tiled_equals_untiled(model, portable=True, smallest=4 * COLUMN_ALIGNMENT * max(2, entries))


def test_one_weight_tiled_along_two_axes() -> None:
    # Tied embeddings: the table that words are looked up in is also the last layer.
    nodes = [
        node("Gather", ["table", "x"], "e"),
        node("ReduceMean", ["e"], "m", axes=[1], keepdims=0),
        node("Gemm", ["m", "table"], "y", transB=1),
    ]
    model = model_of(nodes, {"table": weight(64, 64)}, (1, 5), dtype=TensorProto.INT64)
    tiled = tiled_equals_untiled(model, portable=True)

    assert len({name for part in tiled.nodes for name in uses(part) if name in tiled.weights}) == 8


# Conv.


def conv(
    portable: bool,
    *,
    channels: tuple[int, int],
    group: int = 1,
    kernel: tuple[int, ...] = (3, 3),
    bias: bool = True,
    residual: bool = False,
    limit: int = LIMIT,
) -> Graph:
    """x -> Conv (-> + Conv of the same) -> Relu."""
    inputs, outputs = channels
    weights = {"w": weight(outputs, inputs // group, *kernel), "b": weight(outputs)}
    pads = [extent // 2 for extent in kernel] * 2
    nodes = [node("Conv", ["x", "w", *(["b"] if bias else [])], "a", group=group, pads=pads)]
    if residual:
        weights["s"] = weight(outputs, inputs, *(1 for _ in kernel))
        nodes = [node("Conv", ["x", "s"], "r"), *nodes, node("Add", ["a", "r"], "c")]
    nodes.append(node("Relu", ["c" if residual else "a"], "y"))
    block = 1 if portable else native_block()
    padded = -(-(inputs // group) // block) * block  # in the NCHWc layout
    a_channel = 4 * (padded * int(np.prod(kernel)) + 1)
    size = (1, inputs, *(6 for _ in kernel))
    return tiled_equals_untiled(
        model_of(nodes, weights, size),
        portable=portable,
        limit=limit,
        smallest=a_channel * block,
    )


@both
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3), (3,), (3, 3, 1)]),
    bias=st.booleans(),
)
@few
def test_conv(
    portable: bool, channels: tuple[int, int], kernel: tuple[int, ...], bias: bool
) -> None:
    conv(portable, channels=channels, kernel=kernel, bias=bias)


@both
@given(
    group=st.integers(2, 5),
    inner=st.integers(1, 17),
    outer=st.integers(1, 17),
    limit=st.sampled_from([1024, 4096]),
)
@few
def test_grouped_conv(portable: bool, group: int, inner: int, outer: int, limit: int) -> None:
    conv(portable, channels=(group * inner, group * outer), group=group, limit=limit)


@both
@pytest.mark.parametrize("inner", [16, 32, 64])
@pytest.mark.parametrize("outer", [16, 32])
def test_grouped_conv_in_blocks(portable: bool, inner: int, outer: int) -> None:
    # Of sizes that the NCHWc layout takes: whole groups a tile, and several tiles a group.
    conv(portable, channels=(4 * inner, 4 * outer), group=4, limit=20_000)


@both
@given(channels=st.integers(30, 130), multiplier=st.integers(1, 2))
@few
def test_depthwise_conv(portable: bool, channels: int, multiplier: int) -> None:
    conv(portable, channels=(channels, channels * multiplier), group=channels, limit=1024)


@both
@given(channels=st.tuples(st.integers(1, 40), st.integers(1, 70)))
@few
def test_conv_with_residual(portable: bool, channels: tuple[int, int]) -> None:
    conv(portable, channels=channels, residual=True)


def test_a_fused_residual_is_tiled_with_its_conv() -> None:
    tiled = conv(False, channels=(16, 48), residual=True)
    tiles = [part for part in tiled.nodes if TILE_MARK in part.name and "_of_" in part.name]

    assert len(tiles) > 2
    assert all(len(part.input) == 4 for part in tiles)
    order = [part.op_type for part in tiled.nodes if part.op_type in ("Slice", tiles[0].op_type)]
    # A slice of the residual just before its tile: what waits takes memory.
    assert order[-2 * len(tiles) :] == ["Slice", tiles[0].op_type] * len(tiles)


def test_old_conv_with_residual() -> None:
    # Before operator set 10 Slice had its bounds as attributes.
    weights = {"w": weight(64, 8, 3, 3), "s": weight(64, 8, 1, 1)}
    nodes = [
        node("Conv", ["x", "s"], "r"),
        node("Conv", ["x", "w"], "a", pads=[1] * 4),
        node("Add", ["a", "r"], "y"),
    ]
    for portable in (True, False):
        model = model_of(nodes, weights, (1, 8, 6, 6), opset=8)
        tiled_equals_untiled(model, portable=portable, smallest=native_block() * 4 * 8 * 9)


# Graphs of tiles.


def test_small_layers_stay_whole() -> None:
    model = model_of([node("MatMul", ["x", "w"], "y")], {"w": weight(40, 40)}, (1, 40))
    tiled = tiled_equals_untiled(model, portable=True, limit=10**6)

    assert [part.op_type for part in tiled.nodes] == ["MatMul"]


def test_bias_that_is_computed_keeps_a_gemm_whole() -> None:
    nodes = [node("Relu", ["x"], "b"), node("Gemm", ["x", "w", "b"], "y")]
    source = prepare(model_of(nodes, {"w": weight(64, 64)}, (1, 64)))
    with tempfile.TemporaryDirectory() as folder:
        graph = compile_variant(source, Path(folder), portable=True).graph
        assert tile_graph(graph, LIMIT, 0).nodes == graph.nodes


def test_parts_of_a_small_bias_are_weights_too() -> None:
    # As constants they would make the graphs of equal tiles differ.
    tiled = conv(True, channels=(16, 48), bias=True)

    tiles = [part for part in tiled.nodes if "_of_" in part.name]
    assert all(name in tiled.weights for part in tiles for name in part.input[1:3])
