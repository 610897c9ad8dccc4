"""Folding scales and shifts into normalisations: same numbers, and only where it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lasagna.models.fold import fold_channel_affine
from lasagna.models.graph import Array

CHANNELS = 4
rng = np.random.default_rng(5)


def values(*shape: int) -> Array:
    return rng.uniform(0.5, 2, shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


NORM = node("BatchNormalization", "x g b m v", "n")


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    x: tuple[int, ...] = (1, CHANNELS, 3, 3),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
) -> onnx.ModelProto:
    statistics = {name: values(x[1]) for name in "gbmv"}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(a, name) for name, a in (statistics | weights).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def folded(model: onnx.ModelProto) -> int:
    """Fold, compare the answers before and after, and tell how many nodes went."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    count = fold_channel_affine(twin)
    assert len(twin.graph.node) == len(model.graph.node) - count
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    before, after = (
        ort.InferenceSession(one.SerializeToString(), plain, ["CPUExecutionProvider"])
        for one in (model, twin)
    )
    for want, got in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return count


@pytest.mark.parametrize("shape", [(CHANNELS, 1, 1), (1, CHANNELS, 1, 1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_scale_and_shift_are_folded(shape: tuple[int, ...], swapped: bool) -> None:
    nodes = [
        NORM,
        node("Mul", "s n" if swapped else "n s", "a"),
        node("Add", "t a" if swapped else "a t", "y"),
    ]

    assert folded(model_of(nodes, {"s": values(*shape), "t": values(*shape)})) == 2


@given(st.lists(st.sampled_from(["Mul", "Add"]), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_chain_is_folded(ops: list[str]) -> None:
    names = ["n", *(f"a{k}" for k in range(len(ops) - 1)), "y"]
    nodes = [NORM]
    weights = {}
    for number, op in enumerate(ops):
        nodes.append(node(op, f"{names[number]} w{number}", names[number + 1]))
        weights[f"w{number}"] = values(CHANNELS, 1, 1)

    assert folded(model_of(nodes, weights)) == len(ops)


@pytest.mark.parametrize("opset", [11, 17])
def test_operands_made_by_unsqueeze_are_folded(opset: int) -> None:
    if opset < 13:
        unsqueeze = [node("Unsqueeze", "s", "s3", axes=[1, 2])]
    else:
        unsqueeze = [node("Unsqueeze", "s axes", "s3")]
    nodes = [*unsqueeze, NORM, node("Mul", "n s3", "y")]

    weights = {"s": values(CHANNELS)} | ({} if opset < 13 else {"axes": np.array([1, 2])})
    assert folded(model_of(nodes, weights, opset=opset)) == 1


def test_two_chains_from_shared_statistics_are_folded_apart() -> None:
    nodes = [
        NORM,
        node("Mul", "n s", "a"),
        node("BatchNormalization", "a g b m v", "n2"),
        node("Add", "n2 s", "y"),
    ]

    assert folded(model_of(nodes, {"s": values(CHANNELS, 1, 1)})) == 2


def test_a_normalisation_that_is_used_twice_is_left() -> None:
    nodes = [NORM, node("Mul", "n s", "a"), node("Add", "a n", "y")]

    assert folded(model_of(nodes, {"s": values(CHANNELS, 1, 1)})) == 0


def test_a_normalisation_that_is_an_output_is_left() -> None:
    nodes = [NORM, node("Mul", "n s", "y")]
    model = model_of(nodes, {"s": values(CHANNELS, 1, 1)}, outputs=("y", "n"))

    assert folded(model) == 0


def test_a_square_is_left() -> None:
    assert folded(model_of([NORM, node("Mul", "n n", "y")], {})) == 0


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (1, 1, 1), (3,), (1, 1, 3, 3), (CHANNELS, 3, 3), (2, CHANNELS, 1, 1)],
)
def test_other_operands_are_left(shape: tuple[int, ...]) -> None:
    assert folded(model_of([NORM, node("Mul", "n s", "y")], {"s": values(*shape)})) == 0


@pytest.mark.parametrize("x", [(1, 4, 4, 3, 3), (1, 4, 5), (4, 4)])
def test_other_ranks_are_left(x: tuple[int, ...]) -> None:
    # Here [4, 1, 1] broadcasts along another axis than the channels.
    assert folded(model_of([NORM, node("Mul", "n s", "y")], {"s": values(4, 1, 1)}, x=x)) == 0


def test_unknown_rank_is_left() -> None:
    nodes = [
        node("Reshape", "x target", "r"),
        node("BatchNormalization", "r g b m v", "n"),
        node("Mul", "n s", "y"),
    ]
    model = model_of(nodes, {"s": values(CHANNELS, 1, 1)})
    model.graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, ["k"]))

    assert fold_channel_affine(model) == 0
