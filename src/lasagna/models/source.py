"""Taking in an ONNX model: checks, fixed dimensions, and a batch dimension where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from lasagna.errors import ModelError, UsageError
from lasagna.models.fold import fold_channel_affine
from lasagna.models.graph import LIFT_BYTES, Array, tensor_array, uses
from lasagna.models.shapes import rows_agree
from lasagna.package.format import DTYPES

BATCH: Final = "batch"


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs of one row, and the outputs for it, by name."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Source:
    """A checked model, ready to be optimised.

    Attributes:
        model: the graph; large initializers may still lie in external files.
        folder: where those files are, or None when there are none.
        batchable: whether the leading dimension of every input and output is a free batch.
        batch_note: why not, or what was changed to make it so.
        references: some single rows, and what the model gave for each as it came, before any
            change.
    """

    model: onnx.ModelProto
    folder: Path | None
    batchable: bool
    batch_note: str
    references: tuple[Reference, ...]


def open_session(source: Source, options: ort.SessionOptions | None = None) -> ort.InferenceSession:
    """A plain ONNX Runtime session of the model, as anybody else would run it.

    Raises:
        ModelError: ONNX Runtime can't load it.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = 4
    if source.folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(source.folder)
        )
    try:
        return ort.InferenceSession(
            source.model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            # One node would hold the whole embedding table, which then can't be tiled.
            disabled_optimizers=["EmbedLayerNormFusion"],
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ModelError(f"ONNX Runtime can't load the model: {error}") from None


def load_source(path: Path, dims: Mapping[str, int] | None = None) -> Source:
    """Read, check and prepare an ONNX file; external data stays in its files.

    Raises:
        ModelError: not a valid model, or a dimension that ``dims`` must fix is open.
        UsageError: ``dims`` and the model's dimensions don't agree.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None
    except Exception as error:  # protobuf, checker and external-data errors share no base
        raise ModelError(f"{path} is not a valid ONNX model: {error}") from None
    folder = path.parent.resolve()
    external = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    for tensor in external:
        # ONNX Runtime's shape inference wants targets, axes and the like in the model itself.
        if math.prod(tensor.dims) * 8 <= LIFT_BYTES:
            array = np.array(tensor_array(tensor, folder))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return prepare(model, dims, folder=folder if external else None)


def prepare(
    model: onnx.ModelProto, dims: Mapping[str, int] | None = None, folder: Path | None = None
) -> Source:
    """Fix named dimensions and free the batch dimension where the graph allows it.

    Args:
        model: the model; it is copied, not changed.
        dims: values for symbolic dimensions other than the leading one, by name.
        folder: where the model's external data lies.

    Raises:
        ModelError: no inputs or outputs, an open dimension, an element type we can't carry, or
            ONNX Runtime can't run it.
        UsageError: ``dims`` names a dimension that the model does not have, or gives it no size.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _drop_initializer_inputs(copy)
    if not copy.graph.input or not copy.graph.output:
        raise ModelError("the model has no inputs or no outputs")
    names = {v.name for v in copy.graph.input} | {v.name for v in copy.graph.output}
    if len(names) != len(copy.graph.input) + len(copy.graph.output):
        raise ModelError("an input and an output of the model have one name")
    _fix_dimensions(copy, dims or {})
    leading = [value.type.tensor_type.shape.dim[0] for value in copy.graph.input]
    extents = [dim.dim_value if dim.HasField("dim_value") else 1 for dim in leading]
    declared = not any(dim.HasField("dim_value") for dim in leading)
    references = _references(copy, folder)
    fold_channel_affine(copy)
    if any(extent != 1 for extent in extents):
        reason = f"its inputs have a fixed leading dimension of {max(extents)}"
        return _unbatched(copy, folder, extents, reason, references)
    targets = [] if declared else _free_batch(copy, folder)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del copy.graph.value_info[:]
    note = (
        "exported with a batch dimension"
        if declared
        else f"exported with batch 1; freed by changing {len(targets)} Reshape target(s)"
    )
    candidate = Source(copy, folder, True, note, references)
    reason = _batch_defect(candidate)
    if not reason:
        return candidate
    for node, target in targets:
        node.input[1] = target
    return _unbatched(copy, folder, extents, reason, references)


def random_inputs(
    session: ort.InferenceSession, rows: int, rng: np.random.Generator
) -> dict[str, Array]:
    """Inputs for trying a model out: normal floats, integers 0 or 1, open dimensions = ``rows``."""
    feeds: dict[str, Array] = {}
    for value in session.get_inputs():
        shape = tuple(extent if isinstance(extent, int) else rows for extent in value.shape)
        dtype = numpy_dtype(value.type)
        if dtype.kind == "f":
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[value.name] = rng.integers(0, 2, size=shape).astype(dtype)
    return feeds


def numpy_dtype(ort_type: str) -> np.dtype[Any]:
    """The NumPy element type of ONNX Runtime's ``tensor(float)`` and so on.

    Raises:
        ModelError: a type that sealed records don't carry (strings, sequences, bfloat16).
    """
    short = ort_type.removeprefix("tensor(").removesuffix(")")
    name = {"float": "float32", "double": "float64"}.get(short, short)
    if name not in DTYPES:
        raise ModelError(f"inputs and outputs of type {ort_type} are not supported")
    return DTYPES[name]


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Before IR version 4 every initializer was an input too: keep real inputs only."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in initializers]
    if len(kept) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)


def _fix_dimensions(model: onnx.ModelProto, dims: Mapping[str, int]) -> None:
    for name, extent in dims.items():
        if extent < 1:
            raise UsageError(f"dimension {name!r} can't be {extent}")
    open_dims: dict[str, str] = {}
    known: dict[str, None] = {}
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name!r} is not a tensor")
        shape = value.type.tensor_type.shape
        if not shape.dim:
            raise ModelError(f"input {value.name!r} has no dimensions; a batch needs one")
        for position, dim in enumerate(shape.dim):
            if dim.dim_param:
                known[dim.dim_param] = None
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
            elif not dim.HasField("dim_value") and position and not dim.dim_param:
                raise ModelError(
                    f"dimension {position} of input {value.name!r} is open, and has no name by "
                    "which --dim could fix it: export the model with a fixed or named dimension"
                )
            elif not dim.HasField("dim_value") and position:
                open_dims.setdefault(dim.dim_param, value.name)
    for name in dims:
        if name not in known:
            there = f"it has {', '.join(map(repr, known))}" if known else "all of its are fixed"
            raise UsageError(f"the model's inputs have no dimension {name!r}: {there}")
    if open_dims:
        listed = ", ".join(f"{name!r} of input {where!r}" for name, where in open_dims.items())
        raise ModelError(
            f"open dimension {listed}: enclave memory is planned ahead, so every dimension but "
            "the leading one needs a value; give it with --dim NAME=VALUE"
        )


def _free_batch(model: onnx.ModelProto, folder: Path | None) -> list[tuple[onnx.NodeProto, str]]:
    """Let Reshapes to a constant [1, ...] keep whatever leading dimension comes in.

    Returns:
        The nodes changed, and the names of their targets as they were.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    computed = {value.name for value in model.graph.input}
    changed = []
    for node in model.graph.node:
        if computed.isdisjoint(uses(node)):
            continue  # of weights only, such as a bias made [1, C, 1, 1]
        computed.update(node.output)
        # Before operator set 5 the target is an attribute; such models run at batch 1.
        if node.op_type != "Reshape" or node.domain or len(node.input) < 2:
            continue
        if node.input[1] not in constants:
            continue
        target = np.array(tensor_array(constants[node.input[1]], folder or Path()))
        zero_is_copy = not any(a.name == "allowzero" and a.i for a in node.attribute)
        if target.size and target[0] == 1 and zero_is_copy:
            target[0] = 0
            name = f"{node.output[0]}__batch_shape"
            model.graph.initializer.append(onnx.numpy_helper.from_array(target, name))
            changed.append((node, node.input[1]))
            node.input[1] = name
    return changed


def _references(model: onnx.ModelProto, folder: Path | None) -> tuple[Reference, ...]:
    """What the model as it came gives for three rows, one after the other."""
    session = open_session(Source(model, folder, False, "", ()))
    for value in session.get_outputs():
        numpy_dtype(value.type)  # refuses what can't be carried; inputs are refused below
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3):
        rows = random_inputs(session, 1, rng)
        try:
            results = session.run(None, rows)
        except Exception as error:  # see open_session
            raise ModelError(f"ONNX Runtime can't run the model: {error}") from None
        names = [value.name for value in session.get_outputs()]
        found.append(Reference(rows, dict(zip(names, map(np.asarray, results), strict=True))))
    return tuple(found)


def _batch_defect(candidate: Source) -> str:
    """Compare three rows in one batch with each row alone; say what is wrong, or nothing."""
    references = candidate.references
    feeds = {
        name: np.concatenate([one.inputs[name] for one in references])
        for name in references[0].inputs
    }
    try:
        together = open_session(candidate).run(None, feeds)
    except Exception as error:  # see open_session; ModelError too
        return f"it does not run with three rows ({str(error).splitlines()[0][:200]})"
    for (name, first), got in zip(references[0].outputs.items(), together, strict=True):
        rows = [one.outputs[name] for one in references]
        want = np.concatenate(rows) if first.ndim else np.array(rows)
        if got.shape != want.shape:
            return f"output {name!r} of three rows has shape {list(got.shape)}"
        if not rows_agree(got, want):
            return f"output {name!r} of a row changes with the other rows of the batch"
    return ""


def _unbatched(
    model: onnx.ModelProto,
    folder: Path | None,
    extents: Sequence[int],
    reason: str,
    references: tuple[Reference, ...],
) -> Source:
    """The model at the batch it was exported with; an open leading dimension becomes 1."""
    for value, extent in zip(model.graph.input, extents, strict=True):
        value.type.tensor_type.shape.dim[0].dim_value = extent
    for value in model.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].ClearField("dim_param")
    return Source(model, folder, False, f"runs at batch 1: {reason}", references)
