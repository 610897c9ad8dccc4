"""Slices: one after the other they compute what the whole model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lasagna.models.cut import Cuts
from lasagna.models.graph import Array, Graph, uses
from lasagna.models.optimise import compile_variant
from lasagna.models.shapes import TensorInfo, measure_shapes, open_bare, run_bare
from lasagna.models.slices import Slice, join_weights, make_slices, write_weights
from lasagna.models.source import Source, open_session, prepare
from lasagna.models.tile import tile_graph
from lasagna.package.format import DTYPES, WEIGHT_ALIGNMENT, Layer, SliceDetails

WIDTH = 24


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    outputs: Sequence[str],
    x: Sequence[int | str] = ("N", 3, WIDTH),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def weight(*shape: int) -> Array:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / 5).astype(np.float32)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A random network of tensors [N, 3, WIDTH] with branches, joins and one or two outputs."""
    names, nodes, weights = ["x"], [], {}
    for number in range(draw(st.integers(2, 7))):
        output = f"t{number}"
        recent = st.sampled_from(names[-3:])
        match draw(st.sampled_from(["MatMul", "Add", "Relu", "Concat"])):
            case "MatMul":
                weights[f"w{number}"] = weight(WIDTH, WIDTH) + number
                nodes.append(node("MatMul", [draw(recent), f"w{number}"], output))
            case "Concat":
                weights[f"w{number}"] = weight(2 * WIDTH, WIDTH) - number
                nodes.append(node("Concat", [draw(recent), draw(recent)], f"c{number}", axis=2))
                nodes.append(node("MatMul", [f"c{number}", f"w{number}"], output))
            case "Add":
                nodes.append(node("Add", [draw(recent), draw(recent)], output))
            case _:
                nodes.append(node("Relu", [draw(recent)], output))
        names.append(output)
    outputs = dict.fromkeys([names[-1], draw(st.sampled_from(names[1:]))])
    return model_of(nodes, weights, list(outputs))


def build(
    source: Source, *, portable: bool, limit: int = 10**9
) -> tuple[Graph, dict[str, TensorInfo]]:
    """A variant's graph, whose weights are copied out of their file, and its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_variant(source, Path(folder), portable=portable)
        graph = tile_graph(compiled.graph, limit, compiled.block)
        graph = Graph(
            graph.nodes,
            {name: np.array(array) for name, array in graph.weights.items()},
            graph.constants,
            graph.inputs,
            graph.outputs,
            graph.opsets,
        )
    one, other, _ = source.references
    return graph, measure_shapes(graph, one.inputs, other.inputs, batchable=source.batchable)


def run_chain(slices: Sequence[Slice], rows: dict[str, Array]) -> dict[str, Array]:
    """Run slices one after the other, with their weights as they are laid out in memory."""
    values = dict(rows)
    for piece in slices:
        memory = bytearray(piece.weight_bytes)
        write_weights(piece, memoryview(memory))
        values |= dict(zip(piece.outputs, run(piece, piece.details, memory, values), strict=True))
    return values


def run(
    piece: Slice, details: SliceDetails, memory: bytearray, values: dict[str, Array]
) -> list[Array]:
    feeds = {local: values[name] for local, name in zip(details.inputs, piece.inputs, strict=True)}
    for spec in details.weights:
        count = int(np.prod(spec.shape))
        flat = np.frombuffer(memory, DTYPES[spec.dtype], count, spec.offset)
        feeds[spec.name] = flat.reshape(spec.shape)
    return run_bare(open_bare(piece.model), feeds)


def batch(source: Source, rows: int) -> dict[str, Array]:
    references = [source.references[k % 3].inputs for k in range(rows)]
    return {name: np.concatenate([one[name] for one in references]) for name in references[0]}


def same(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(initial=1e-9))


@given(networks(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_chain_of_slices_is_the_model(model: onnx.ModelProto, data: st.DataObject) -> None:
    source = prepare(model)
    graph, tensors = build(source, portable=data.draw(st.booleans()), limit=1200)
    count = len(graph.nodes)
    inner = data.draw(st.sets(st.integers(1, max(1, count - 1)))) - {count}
    slices = make_slices(
        graph, tensors, Cuts((0, *sorted(inner), count), ()), batchable=source.batchable
    )
    plain = open_session(source)

    assert source.batchable
    for rows in (1, 3):
        feeds = batch(source, rows)
        values = run_chain(slices, feeds)
        for value, want in zip(plain.get_outputs(), plain.run(None, feeds), strict=True):
            same(values[value.name], want)


@given(networks(), st.data())
@settings(max_examples=20, deadline=None)
def test_the_whole_model_runs_on_the_weights_of_its_slices(
    model: onnx.ModelProto, data: st.DataObject
) -> None:
    source = prepare(model)
    graph, tensors = build(source, portable=True)
    count = len(graph.nodes)
    inner = data.draw(st.sets(st.integers(1, max(1, count - 1)))) - {count}
    slices = make_slices(graph, tensors, Cuts((0, *sorted(inner), count), ()), batchable=True)
    (whole,) = make_slices(graph, tensors, Cuts((0, count), ()), batchable=True)
    memory = bytearray(sum(piece.weight_bytes for piece in slices))
    base = 0
    for piece in slices:
        write_weights(piece, memoryview(memory)[base : base + piece.weight_bytes])
        base += piece.weight_bytes

    results = run(whole, join_weights(whole, slices), memory, dict(source.references[0].inputs))
    for name, got in zip(whole.outputs, results, strict=True):
        same(got, source.references[0].outputs[name])


def separable(graph: Graph, tensors: dict[str, TensorInfo], place: int) -> bool:
    made = {name for node in graph.nodes[:place] for name in node.output}
    needed = {name for node in graph.nodes[place:] for name in uses(node)}
    return all(tensors[name].separable for name in made & needed)


def chain_of(model: onnx.ModelProto, *, portable: bool = True, limit: int = 10**9) -> list[Slice]:
    """As many slices as can be."""
    source = prepare(model)
    graph, tensors = build(source, portable=portable, limit=limit)
    places = [place for place in range(1, len(graph.nodes)) if separable(graph, tensors, place)]
    cuts = Cuts((0, *places, len(graph.nodes)), ())
    slices = make_slices(graph, tensors, cuts, batchable=source.batchable)
    values = run_chain(slices, dict(source.references[0].inputs))
    for name, want in source.references[0].outputs.items():
        same(values[name], want)
    return slices


def test_equal_tiles_have_one_graph() -> None:
    model = model_of(
        [node("Gemm", ["x", "w", "b"], "y")],
        {"w": weight(64, 96), "b": weight(96)},
        ["y"],
        ["N", 64],
    )
    tiles = chain_of(model, limit=64 * 33 * 4)[:3]

    assert len({piece.model for piece in tiles}) == 1
    assert len({piece.weight_bytes for piece in tiles}) == 1
    assert not np.array_equal(tiles[0].weights[0], tiles[1].weights[0])


@pytest.mark.parametrize("portable", [True, False])
def test_equal_layers_have_one_graph(portable: bool) -> None:
    weights = {f"w{k}": weight(32, 32, 3, 3) + k for k in range(4)}
    names = ["x", "a", "b", "c", "y"]
    nodes = [
        node("Conv", [names[k], f"w{k}"], names[k + 1], pads=[1] * 4, name=f"layer {k}")
        for k in range(4)
    ]
    slices = chain_of(model_of(nodes, weights, ["y"], ["N", 32, 5, 5]), portable=portable)
    layers = [piece for piece in slices if piece.weights]

    assert len(layers) == 4
    assert len({piece.model for piece in layers}) == 1


def test_no_name_of_the_model_is_in_a_graph() -> None:
    weights = {"secret weight": weight(WIDTH, WIDTH), "secret table": weight(WIDTH)}
    nodes = [
        node("MatMul", ["x", "secret weight"], "secret tensor", name="secret node"),
        node("Mul", ["secret tensor", "secret table"], "y", doc_string="secret"),
    ]
    slices = chain_of(model_of(nodes, weights, ["y"]))

    assert not any(b"secret" in piece.model for piece in slices)
    assert slices[0].details.layers[0].name == "secret node"


def test_layers_are_described() -> None:
    model = model_of(
        [node("MatMul", ["x", "w"], "y", name="words")], {"w": weight(WIDTH, 96)}, ["y"]
    )
    size = 4 * WIDTH * 32
    layers = [layer for one in chain_of(model, limit=size) for layer in one.details.layers]

    assert layers == [
        Layer("words", "MatMul", "1/3", size),
        Layer("words", "MatMul", "2/3", size),
        Layer("words", "MatMul", "3/3", size),
        Layer("words", "Concat", "join", 0),
    ]


@pytest.mark.parametrize("name", ["a__tile_x_of_y", "b__tile_" + "9" * 5000 + "_of_2", "n" * 2000])
def test_any_name_of_a_layer_can_be_described(name: str) -> None:
    model = model_of(
        [node("MatMul", ["x", "w"], "y", name=name)], {"w": weight(WIDTH, WIDTH)}, ["y"]
    )
    (piece,) = chain_of(model)

    assert len(piece.details.layers[0].name) <= 1024


def test_weights_are_aligned_and_padding_is_zero() -> None:
    weights = {"w": weight(WIDTH, 13), "v": weight(13, 29)}
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "v"], "y")]
    source = prepare(model_of(nodes, weights, ["y"]))
    graph, tensors = build(source, portable=True)
    (piece,) = make_slices(graph, tensors, Cuts((0, 2), ()), batchable=True)
    memory = bytearray(b"\xff" * piece.weight_bytes)
    write_weights(piece, memoryview(memory))

    offsets = [spec.offset for spec in piece.details.weights]
    assert offsets == [0, -(-WIDTH * 13 * 4 // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT]
    assert bytes(memory[WIDTH * 13 * 4 : offsets[1]]).strip(b"\0") == b""
    assert memory[offsets[1] : offsets[1] + 13 * 29 * 4] == weights["v"].tobytes()


def test_a_slice_without_weights_has_none() -> None:
    (piece,) = chain_of(model_of([node("Relu", ["x"], "y")], {}, ["y"]))
    write_weights(piece, memoryview(bytearray(0)))

    assert (piece.weight_bytes, piece.details.weights) == (0, ())


def branch(name: str, other: str) -> onnx.GraphProto:
    """``r @ w + constant``, where r and w come from outside."""
    nodes = [
        node("MatMul", ["r", name], f"{name} m"),
        node("Add", [f"{name} m", other], name + "y"),
    ]
    result = helper.make_tensor_value_info(name + "y", TensorProto.FLOAT, None)
    inner = numpy_helper.from_array(weight(1), other)
    return helper.make_graph(nodes, name, [], [result], [inner])


def test_control_flow_passes_through() -> None:
    nodes = [
        node("Relu", ["x"], "r"),
        node("ReduceSum", ["r"], "total", keepdims=0),
        node("Greater", ["total", "zero"], "condition"),
        node(
            "If",
            ["condition"],
            "z",
            then_branch=branch("w", "c"),
            else_branch=branch("v", "d"),
        ),
        node("Relu", ["z"], "y"),
    ]
    weights = {
        "zero": np.float32(0),
        "w": weight(WIDTH, WIDTH),
        "v": weight(WIDTH, WIDTH),
    }
    model = model_of(nodes, {k: np.asarray(v) for k, v in weights.items()}, ["y"], [1, 3, WIDTH])
    slices = chain_of(model)

    layers = [layer for piece in slices for layer in piece.details.layers]
    flow = next(layer for layer in layers if layer.op == "If")
    assert flow.weight_bytes == 2 * WIDTH * WIDTH * 4  # weights of the branches are lifted too
    assert len(slices) > 1
