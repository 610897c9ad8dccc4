"""Taking in a model: what becomes a batch, what can't, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lasagna.errors import ModelError, UsageError
from lasagna.models.source import Source, load_source, open_session, prepare

FLOAT = TensorProto.FLOAT


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Any],
    x: list[Any],
    y: list[Any] | None,
    *,
    dtype: int = FLOAT,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``; floats become float32, integers int64."""
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    initializers = [
        numpy_helper.from_array(a.astype(np.float32) if a.dtype.kind == "f" else a, name)
        for name, a in arrays.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, y)],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def weight(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape)


def flattened(target: Any, **attributes: Any) -> onnx.ModelProto:
    """Conv, Reshape to a constant, Gemm: as exporters leave it at batch 1."""
    nodes = [
        node("Conv", "x k", "a"),
        node("Reshape", "a shape", "b", **attributes),
        node("Gemm", "b w", "y"),
    ]
    weights = {"k": weight(4, 3, 1, 1), "shape": target, "w": weight(64, 5)}
    return model_of(nodes, weights, [1, 3, 4, 4], [1, 5])


def rows_of(source: Source, rows: int) -> tuple[Any, Any]:
    """The model's answer to a batch, and to each of its rows alone."""
    session = open_session(source)
    (value,) = session.get_inputs()
    shape = (rows, *value.shape[1:])
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    (together,) = session.run(None, {"x": x})
    alone = [session.run(None, {"x": x[k : k + 1]})[0] for k in range(rows)]
    return together, np.concatenate(alone)


# What becomes a batch.


@pytest.mark.parametrize("target", [[1, 64], [1, -1]])
def test_reshape_to_batch_1_is_freed(target: list[int]) -> None:
    source = prepare(flattened(np.array(target)))

    assert source.batchable
    assert source.batch_note == "exported with batch 1; freed by changing 1 Reshape target(s)"
    together, alone = rows_of(source, 5)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_reshape_target_in_a_constant_node_is_freed() -> None:
    model = flattened(np.array([1, 64]))
    del model.graph.initializer[1]
    shape = numpy_helper.from_array(np.array([1, 64]))
    model.graph.node.insert(0, node("Constant", "", "shape", value=shape))

    assert prepare(model).batchable


def test_reshape_with_free_target_needs_no_change() -> None:
    source = prepare(flattened(np.array([-1, 64])))

    assert source.batchable
    assert "changing 0 Reshape" in source.batch_note


def test_reshape_of_weights_is_left_alone() -> None:
    # As exporters of TensorFlow write a bias; freeing it would break the model.
    nodes = [
        node("Reshape", "bias shape", "b"),
        node("Conv", "x k", "a"),
        node("Add", "a b", "y"),
    ]
    weights = {"bias": weight(4), "shape": np.array([1, 4, 1, 1]), "k": weight(4, 3, 1, 1)}
    source = prepare(model_of(nodes, weights, [1, 3, 4, 4], [1, 4, 4, 4]))

    assert source.batchable
    together, alone = rows_of(source, 3)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_several_inputs_share_the_batch() -> None:
    model = model_of([node("Add", "x z", "y")], {}, [1, 4], [1, 4])
    model.graph.input.append(helper.make_tensor_value_info("z", FLOAT, [1, 4]))

    assert prepare(model).batchable


@pytest.mark.parametrize("name", ["N", "batch", None])
def test_declared_batch_stays(name: str | None) -> None:
    nodes = [node("MatMul", "x w", "y")]
    source = prepare(model_of(nodes, {"w": weight(4, 5)}, [name, 4], [name, 5]))

    assert source.batchable
    assert source.batch_note == "exported with a batch dimension"


def test_model_is_copied_not_changed() -> None:
    model = flattened(np.array([1, 64]))
    before = model.SerializeToString()
    prepare(model)

    assert model.SerializeToString() == before


def test_initializers_that_are_inputs_too_are_no_inputs() -> None:
    model = model_of([node("MatMul", "x w", "y")], {"w": weight(4, 5)}, [1, 4], [1, 5], opset=8)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [4, 5]))
    source = prepare(model)

    assert [value.name for value in source.model.graph.input] == ["x"]
    assert list(source.references[0].inputs) == ["x"]


def test_references_are_three_rows_of_the_model_as_it_came() -> None:
    model = model_of([node("Relu", "x", "y")], {}, [1, 4], [1, 4])
    for reference in prepare(model).references:
        np.testing.assert_array_equal(reference.outputs["y"], np.maximum(reference.inputs["x"], 0))
    assert len({reference.inputs["x"].tobytes() for reference in prepare(model).references}) == 3


# What can't be a batch says so, and runs as it came.


def runs_unbatched(model: onnx.ModelProto, reason: str) -> Source:
    source = prepare(model)

    assert not source.batchable
    assert source.batch_note.startswith("runs at batch 1: ")
    assert reason in source.batch_note
    session = open_session(source)
    for reference in source.references:
        got = session.run(None, reference.inputs)
        np.testing.assert_allclose(got[0], reference.outputs["y"], rtol=1e-5, atol=1e-6)
    return source


@pytest.mark.parametrize("batch", [1, "N"])
def test_softmax_over_the_batch_is_found(batch: Any) -> None:
    model = model_of([node("Softmax", "x", "y", axis=0)], {}, [batch, 4], [batch, 4])

    runs_unbatched(model, "output 'y' of a row changes with the other rows of the batch")


def test_fixed_batch_of_4_stays() -> None:
    source = runs_unbatched(
        model_of([node("MatMul", "x w", "y")], {"w": weight(4, 5)}, [4, 4], [4, 5]),
        "its inputs have a fixed leading dimension of 4",
    )

    assert source.references[0].inputs["x"].shape == (4, 4)


def test_expand_to_batch_1_does_not_run_with_three_rows() -> None:
    nodes = [node("Expand", "token shape", "t"), node("Concat", "t x", "y", axis=1)]
    weights = {"token": weight(1, 1, 4), "shape": np.array([1, 1, 4])}

    runs_unbatched(model_of(nodes, weights, [1, 3, 4], [1, 4, 4]), "does not run with three rows")


def test_sum_over_the_batch_gives_another_shape() -> None:
    nodes = [node("ReduceSum", "x axes", "y", keepdims=1)]

    runs_unbatched(
        model_of(nodes, {"axes": np.array([0])}, [1, 4], [1, 4]),
        "output 'y' of three rows has shape [1, 4]",
    )


def test_reshape_of_a_transposed_tensor_is_put_back() -> None:
    # 0 in its target would mean 16 rows: the first attempt fails, and must leave no trace.
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("Reshape", "t shape", "y")]
    model = model_of(nodes, {"shape": np.array([1, 16])}, [1, 16], [1, 16])
    source = runs_unbatched(model, "runs at batch 1")

    assert source.model.graph.node[1].input[1] == "shape"


def test_reshape_without_zero_copies_stays() -> None:
    runs_unbatched(flattened(np.array([1, 64]), allowzero=1), "does not run with three rows")


# Dimensions.


def test_open_dimension_names_the_option() -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["N", "words", 4], None)

    with pytest.raises(ModelError, match=r"open dimension 'words' of input 'x'.*--dim NAME=VALUE"):
        prepare(model)


def test_nameless_open_dimension_is_refused() -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["N", None, 4], None)

    with pytest.raises(ModelError, match="dimension 1 of input 'x' is open, and has no name"):
        prepare(model)


def test_dims_fix_open_dimensions() -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["N", "words", 4], ["N", "words", 4])
    source = prepare(model, {"words": 7})

    assert source.batchable
    assert source.references[0].outputs["y"].shape == (1, 7, 4)


def test_dims_can_fix_the_batch() -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["N", 4], ["N", 4])
    source = prepare(model, {"N": 4})

    assert not source.batchable
    assert source.references[0].outputs["y"].shape == (4, 4)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"word": 7}, "no dimension 'word': it has 'N', 'words'"),
        ({"words": 0}, "dimension 'words' can't be 0"),
    ],
)
def test_wrong_dims_are_refused(dims: dict[str, int], message: str) -> None:
    model = model_of([node("Relu", "x", "y")], {}, ["N", "words", 4], None)

    with pytest.raises(UsageError, match=message):
        prepare(model, dims)


# What is refused altogether.


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"can't read .*none.onnx: No such file"):
        load_source(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 a zip file", bytes(1000), b"\x08\x08\x12"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    with pytest.raises(ModelError, match="is not a valid ONNX model"):
        load_source(path)


def test_truncated_model(tmp_path: Path) -> None:
    data = flattened(np.array([1, 64])).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: len(data) // 2])

    with pytest.raises(ModelError, match="is not a valid ONNX model"):
        load_source(path)


def test_node_with_an_unknown_input(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(
        model_of([node("Add", "x nothing", "y")], {}, [1, 4], [1, 4]).SerializeToString()
    )

    with pytest.raises(ModelError, match="is not a valid ONNX model"):
        load_source(path)


def test_strings_are_refused() -> None:
    model = model_of([node("Identity", "x", "y")], {}, [1, 4], [1, 4], dtype=TensorProto.STRING)

    with pytest.raises(ModelError, match=r"of type tensor\(string\) are not supported"):
        prepare(model)


def test_string_output_is_refused() -> None:
    model = model_of([node("Cast", "x", "y", to=TensorProto.STRING)], {}, [1, 4], [1, 4])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING

    with pytest.raises(ModelError, match=r"of type tensor\(string\) are not supported"):
        prepare(model)


def test_sequence_input_is_refused() -> None:
    model = model_of([node("SequenceAt", "x i", "y")], {"i": np.array(0)}, [1], None)
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", FLOAT, [1, 4]))

    with pytest.raises(ModelError, match="input 'x' is not a tensor"):
        prepare(model)


def test_model_without_outputs_is_refused() -> None:
    model = model_of([node("Relu", "x", "y")], {}, [1, 4], [1, 4])
    del model.graph.output[:]

    with pytest.raises(ModelError, match="no inputs or no outputs"):
        prepare(model)


def test_scalar_input_is_refused() -> None:
    with pytest.raises(ModelError, match="input 'x' has no dimensions"):
        prepare(model_of([node("Relu", "x", "y")], {}, [], []))


def test_input_that_is_the_output_is_refused() -> None:
    model = model_of([], {}, [1, 4], [1, 4])
    model.graph.output[0].name = "x"

    with pytest.raises(ModelError, match="have one name"):
        prepare(model)


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(ModelError, match="ONNX Runtime can't load the model"):
        prepare(model_of([node("Lasagne", "x", "y")], {}, [1, 4], [1, 4]))


def test_model_that_does_not_run_is_refused() -> None:
    nodes = [node("Reshape", "x shape", "y")]
    model = model_of(nodes, {"shape": np.array([3, -1])}, ["N", 4], None)

    with pytest.raises(ModelError, match="ONNX Runtime can't run the model"):
        prepare(model)


# External data.


def external(tmp_path: Path, model: onnx.ModelProto) -> Path:
    """Save with all data in another file; this changes the model."""
    path = tmp_path / "model.onnx"
    options: Any = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, str(path), **options)
    return path


def test_external_data_stays_in_its_file(tmp_path: Path) -> None:
    want = prepare(flattened(np.array([1, 64]))).references[0].outputs["y"]
    source = load_source(external(tmp_path, flattened(np.array([1, 64]))))

    assert source.folder == tmp_path.resolve()
    assert source.batchable
    assert "changing 1 Reshape" in source.batch_note  # though its target was external, too
    places = [tensor.data_location for tensor in source.model.graph.initializer[:3]]
    assert places == [TensorProto.DEFAULT, TensorProto.DEFAULT, TensorProto.EXTERNAL]
    np.testing.assert_allclose(source.references[0].outputs["y"], want, rtol=1e-5)


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path, flattened(np.array([1, 64])))
    (tmp_path / "weights.bin").unlink()

    with pytest.raises(ModelError, match="model"):
        load_source(path)


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path, flattened(np.array([1, 64])))
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(100)

    with pytest.raises(ModelError, match="model"):
        load_source(path)
