"""What every tensor of a graph looks like, found by running it.

ONNX's shape inference does not know ONNX Runtime's fused and NCHWc operators; ONNX Runtime does.
The graph runs with one row, with another, and with both: a tensor can cross a cut if its value
for both is the values for each, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from lasagna.errors import ModelError, RecordError
from lasagna.models.graph import Array, Graph, contiguous
from lasagna.package.format import DTYPES, TensorSpec
from lasagna.trust.records import row_bytes

ROW_TOLERANCE: Final = 1e-3
"""Relative difference allowed between a row alone and in a batch: kernels may sum in another
order, but a row that depends on its neighbours differs by far more."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A computed tensor.

    Attributes:
        spec: its name, element type and shape at batch 1.
        separable: whether its leading dimension is the rows', so that rows can be moved between
            batches, and each of them fits a record. A cut never crosses a tensor that is not.
    """

    spec: TensorSpec
    separable: bool


def measure_shapes(
    graph: Graph, one: Mapping[str, Array], other: Mapping[str, Array], *, batchable: bool
) -> dict[str, TensorInfo]:
    """Run the graph and note every tensor that it computes.

    Args:
        graph: an optimised graph.
        one: inputs of the model at batch 1.
        other: different ones.
        batchable: whether the model takes both as a batch of two.

    Returns:
        The model's inputs and all computed tensors, by name.

    Raises:
        ModelError: the graph does not run with its weights as inputs.
    """
    session = _session_of_everything(graph, one)
    weights = {name: contiguous(array) for name, array in graph.weights.items()}
    first = _values(session, weights, one)
    second = _values(session, weights, other)
    both = {}
    if batchable:
        rows = {name: np.concatenate([array, other[name]]) for name, array in one.items()}
        both = _values(session, weights, rows)
    found = {}
    for name, value in first.items():
        separable = value.dtype.name in DTYPES and value.ndim > 0
        spec = TensorSpec(
            name, value.dtype.name if separable else "uint8", value.shape if separable else (1,)
        )
        # Shapes that follow the data can't be planned for.
        separable = separable and value.shape == second[name].shape and _fits_records(spec)
        if batchable and separable:
            separable = _is_stacked(both[name], value, second[name])
        found[name] = TensorInfo(spec, separable)
    return found


def _fits_records(spec: TensorSpec) -> bool:
    try:
        row_bytes(spec.dtype, spec.row_shape)
    except RecordError:
        return False
    return True


def _is_stacked(both: Array, first: Array, second: Array) -> bool:
    """Whether a batch's value is the rows' values one after the other.

    A length that doubles does not suffice: rows that lie interleaved, as where the heads of
    attention come before the batch, would mix two requests in every cut.
    """
    rows = len(first)
    if both.shape != (2 * rows, *first.shape[1:]):
        return False
    return all(rows_agree(got, want) for got, want in ((both[:rows], first), (both[rows:], second)))


def typed_input(name: str, array: Array) -> onnx.ValueInfoProto:
    """A graph input for a weight: its type and exact shape."""
    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )


def _session_of_everything(graph: Graph, rows: Mapping[str, Array]) -> ort.InferenceSession:
    computed = [name for node in graph.nodes for name in node.output if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in computed]  # ONNX Runtime infers types
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for name, array in rows.items()
    ]
    inputs += [typed_input(name, array) for name, array in graph.weights.items()]
    proto = onnx.helper.make_graph(
        list(graph.nodes), "everything", inputs, outputs, list(graph.constants.values())
    )
    model = onnx.helper.make_model(proto, opset_imports=list(graph.opsets), ir_version=8)
    return open_bare(model.SerializeToString())


def open_bare(model: bytes) -> ort.InferenceSession:
    """A session that runs the graph as it stands, on one thread, as the enclave does.

    Raises:
        ModelError: ONNX Runtime refuses it; some operators insist on constant weights.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ModelError(
            f"the graph does not load with its weights as inputs: {str(error).splitlines()[0]}"
        ) from None


def run_bare(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> list[Array]:
    """Run all outputs; ONNX Runtime's errors become a ``ModelError``.

    Values that are no tensors (sequences, absent optionals) come as arrays of objects.
    """
    try:
        results: list[Any] = session.run(None, feeds)
    except Exception as error:  # as above
        raise ModelError(
            f"the graph does not run with its weights as inputs: {str(error).splitlines()[0]}"
        ) from None
    tensor = np.ndarray | np.generic
    return [
        np.asarray(value) if isinstance(value, tensor) else np.empty(0, dtype=object)
        for value in results
    ]


def rows_agree(got: Array, want: Array) -> bool:
    """Whether one row computed in a batch is the same computed alone."""
    wide = want.astype(np.float64)
    scale = float(np.max(np.abs(wide[np.isfinite(wide)]), initial=1e-6))
    rounding = 4 * float(np.finfo(want.dtype).eps) if want.dtype.kind == "f" else 0.0
    rtol = max(ROW_TOLERANCE, rounding)
    return bool(np.allclose(got, wide, rtol=rtol, atol=rtol * scale, equal_nan=True))


def _values(
    session: ort.InferenceSession, weights: Mapping[str, Array], rows: Mapping[str, Array]
) -> dict[str, Array]:
    results = run_bare(session, {**rows, **weights})
    named = zip((value.name for value in session.get_outputs()), results, strict=True)
    return {**rows, **dict(named)}
