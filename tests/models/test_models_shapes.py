"""Which tensors may cross a cut: those whose rows lie one after the other, in known shapes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lasagna.errors import ModelError
from lasagna.models.graph import Graph, read_graph
from lasagna.models.optimise import compile_variant
from lasagna.models.shapes import TensorInfo, measure_shapes, rows_agree
from lasagna.models.source import prepare


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, Any], x: list[Any], dtype: int = 1
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def measured(model: onnx.ModelProto) -> dict[str, TensorInfo]:
    source = prepare(model)
    first, second, _ = source.references
    with tempfile.TemporaryDirectory() as folder:
        graph = compile_variant(source, Path(folder), portable=True).graph
        return measure_shapes(graph, first.inputs, second.inputs, batchable=source.batchable)


def test_shapes_are_those_of_one_row() -> None:
    weights = {"w": np.ones((4, 5), np.float32)}
    tensors = measured(model_of([node("MatMul", "x w", "y")], weights, ["N", 3, 4]))

    assert tensors["x"].spec.row_shape == (1, 3, 4)
    assert tensors["y"].spec.row_shape == (1, 3, 5)
    assert tensors["y"].spec.dtype == "float32"
    assert tensors["y"].separable


def test_rows_under_one_leading_dimension_are_separable() -> None:
    nodes = [node("Reshape", "x s", "a"), node("Relu", "a", "b"), node("Reshape", "b t", "y")]
    weights = {"s": np.array([-1, 4]), "t": np.array([-1, 3, 4])}
    tensors = measured(model_of(nodes, weights, ["N", 3, 4]))

    assert tensors["a"].spec.row_shape == (3, 4)
    assert tensors["a"].separable


def test_interleaved_rows_are_not_separable() -> None:
    # [N, 2 heads, 4] -> [2 N, 4] with the heads first: twice as long for two rows, but row 0 has
    # the places 0 and 2. To cut here would give one request's numbers to another.
    nodes = [
        node("Transpose", "x", "a", perm=[1, 0, 2]),
        node("Reshape", "a s", "b"),
        node("Sin", "b", "c"),
        node("Reshape", "c t", "d"),
        node("Transpose", "d", "y", perm=[1, 0, 2]),
    ]
    weights = {"s": np.array([-1, 4]), "t": np.array([2, -1, 4])}
    tensors = measured(model_of(nodes, weights, ["N", 2, 4]))

    assert tensors["c"].spec.row_shape == (2, 4)
    assert not tensors["c"].separable
    assert not tensors["a"].separable
    assert tensors["y"].separable


def test_tensors_without_rows_are_not_separable() -> None:
    nodes = [
        node("Shape", "x", "a"),
        node("Cast", "a", "b", to=TensorProto.FLOAT),
        node("ReduceMax", "b", "c", keepdims=0),
        node("Sub", "x c", "d"),
        node("Sub", "d c", "y"),
    ]
    tensors = measured(model_of(nodes, {}, ["N", 70]))

    assert not tensors["b"].separable
    assert not tensors["c"].separable


def test_shapes_that_follow_the_data_are_not_separable() -> None:
    # Also at batch 1, where every tensor looks as if it had one row.
    nodes = [node("NonZero", "x", "a"), node("ReduceSum", "a axes", "y", keepdims=0)]
    weights = {"axes": np.array([1])}
    model = model_of([node("Relu", "x", "r"), *nodes], weights, [4, 50], TensorProto.INT64)
    model.graph.node[1].input[0] = "r"
    tensors = measured(model)

    assert not tensors["a"].separable
    assert tensors["y"].separable


def test_sequences_are_not_separable() -> None:
    nodes = [
        node("SplitToSequence", "x", "a", axis=1),
        node("ConcatFromSequence", "a", "y", axis=1),
    ]
    tensors = measured(model_of(nodes, {}, ["N", 4]))

    assert not tensors["a"].separable
    assert tensors["y"].separable


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("Lasagne", "does not load with its weights as inputs: .*Lasagne"),
        ("Upsample", "does not run with its weights as inputs: .*Upsample"),
    ],
)
def test_graph_that_fails_with_its_weights_as_inputs_is_explained(op: str, message: str) -> None:
    graph = Graph(
        nodes=(node(op, "x w", "y"),),
        weights={"w": np.ones(3, np.float32)},
        constants={},
        inputs=("x",),
        outputs=("y",),
        opsets=(helper.make_opsetid("", 9),),
    )
    rows = {"x": np.ones((1, 1, 2, 2), np.float32)}

    with pytest.raises(ModelError, match=message):
        measure_shapes(graph, rows, rows, batchable=False)


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        (TensorProto.STRING, {"string_data": [b"text"]}),
        (TensorProto.BFLOAT16, {"raw_data": bytes(2)}),
        (TensorProto.COMPLEX64, {"raw_data": bytes(8)}),
    ],
)
def test_weights_that_can_not_be_sealed_are_named(
    dtype: int, data: dict[str, Any], tmp_path: Path
) -> None:
    output = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph([node("Identity", "w", "y")], "g", [], [output])
    graph.initializer.add(name="w", data_type=dtype, dims=[1], **data)
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())

    with pytest.raises(ModelError, match=r"initializer 'w' has element type .*can't be sealed"):
        read_graph(path)


def test_large_weights_are_lifted_small_ones_stay(tmp_path: Path) -> None:
    weights = {
        "large": np.zeros(256, np.float32),
        "small": np.zeros(255, np.float32),
        "unused": np.zeros(256, np.float32),
    }
    nodes = [
        node("Sum", "x large small", "y"),
        node("Sum", "x unused", "dead"),
        node("Relu", "dead", "dead end"),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(nodes, weights, [1]).SerializeToString())
    graph = read_graph(path)

    assert (set(graph.weights), set(graph.constants)) == ({"large"}, {"small"})
    assert [one.op_type for one in graph.nodes] == ["Sum"]


@pytest.mark.parametrize(
    ("got", "want", "agree"),
    [
        ([1.0, 1.0], [1.0, 1.0001], True),
        ([1.0, 0.0], [1.0, 0.0005], True),
        ([1.0, 1.0], [1.0, 1.01], False),
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.nan, 1.0], [1.0, 1.0], False),
        ([np.inf, 1.0], [np.inf, 2.0], False),
        ([], [], True),
    ],
)
def test_rows_agree_within_rounding(got: list[float], want: list[float], agree: bool) -> None:
    assert rows_agree(np.array(got), np.array(want)) == agree


def test_rows_of_any_type_can_be_compared() -> None:
    for dtype in (np.bool_, np.uint8, np.int64, np.float16, np.float64):
        assert rows_agree(np.array([0, 1], dtype), np.array([0, 1], dtype))
        assert not rows_agree(np.array([0, 0], dtype), np.array([0, 1], dtype))
