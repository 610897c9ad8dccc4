"""From a cut graph to slices: each a small ONNX graph and the bytes of its weights.

Names inside a slice's graph are numbers (``i0 w0 t0 o0``), so equal stretches of a network, the
tiles of one layer above all, become byte-identical graphs: stored once, opened once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from lasagna.models.cut import Cuts, segments
from lasagna.models.graph import Array, Graph, addend, copy_into, has_subgraph, uses
from lasagna.models.shapes import TensorInfo, typed_input
from lasagna.models.source import BATCH
from lasagna.models.tile import TILE_MARK
from lasagna.package.format import MAX_NAME, WEIGHT_ALIGNMENT, Layer, SliceDetails, WeightSpec

_TILE: Final = re.compile(rf"(.*){TILE_MARK}(?:(\d{{1,9}})_of_(\d{{1,9}})|(\w+))", re.DOTALL)
"""Names that tiling gives: a tile, and what splits a tensor for tiles or joins theirs."""
_VIEWS: Final = frozenset(
    ["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Optional"]
)
"""Operators whose result may be their input's memory (``Alias`` in ONNX Runtime's kernels)."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice, in plaintext.

    Attributes:
        model: the serialised graph; all weights and crossing tensors are inputs.
        details: how to bind it.
        weights: the arrays, in the order of ``details.weights``.
        weight_names: their names in the whole graph.
        inputs: names in the whole graph of ``details.inputs``.
        outputs: names in the whole graph of ``details.outputs``.
        weight_bytes: bytes of all weights as they lie in memory, padding included.
        in_place: pairs of an input and an output, by their names in the whole graph, that may share
            their memory; with less than that it is copied.
    """

    model: bytes
    details: SliceDetails
    weights: tuple[Array, ...]
    weight_names: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    in_place: tuple[tuple[str, str], ...] = ()


def make_slices(
    graph: Graph, tensors: Mapping[str, TensorInfo], cuts: Cuts, *, batchable: bool
) -> list[Slice]:
    """Cut the graph up; the model's outputs leave the slice that computes them."""
    last_slice: dict[str, int] = {}
    bounds = segments(cuts)
    for number, (start, stop) in enumerate(bounds):
        for node in graph.nodes[start:stop]:
            last_slice.update(dict.fromkeys(uses(node), number))
    last_slice.update(dict.fromkeys(graph.outputs, len(bounds)))
    return [
        _make_slice(graph, tensors, graph.nodes[start:stop], number, last_slice, batchable)
        for number, (start, stop) in enumerate(bounds)
    ]


def _make_slice(
    graph: Graph,
    tensors: Mapping[str, TensorInfo],
    nodes: Sequence[onnx.NodeProto],
    number: int,
    last_slice: Mapping[str, int],
    batchable: bool,
) -> Slice:
    computed = dict.fromkeys(name for node in nodes for name in node.output if name)
    read = dict.fromkeys(name for node in nodes for name in uses(node))
    inputs = tuple(n for n in read if n in tensors and n not in computed)
    outputs = tuple(n for n in computed if last_slice.get(n, -1) > number)
    weights = tuple(n for n in read if n in graph.weights)
    constants = tuple(n for n in read if n in graph.constants)
    local: dict[str, str] = {}
    if not any(has_subgraph(node) for node in nodes):  # inner graphs refer to outer names
        for prefix, names in (("i", inputs), ("o", outputs), ("w", weights), ("c", constants)):
            local.update({name: f"{prefix}{k}" for k, name in enumerate(names)})
        inner = [name for name in computed if name not in local]
        local.update({name: f"t{k}" for k, name in enumerate(inner)})

    def short(name: str) -> str:
        return local.get(name, name)

    proto = onnx.helper.make_graph(
        [_renamed(node, local) for node in nodes],
        "slice",
        [_crossing(short(n), tensors[n], batchable) for n in inputs]
        + [typed_input(short(n), graph.weights[n]) for n in weights],
        [onnx.ValueInfoProto(name=short(n)) for n in outputs],
        [_named(graph.constants[n], short(n)) for n in constants],
    )
    model = onnx.helper.make_model(proto, opset_imports=list(graph.opsets), ir_version=8)
    specs, position = [], 0
    for name in weights:
        array = graph.weights[name]
        specs.append(WeightSpec(short(name), array.dtype.name, array.shape, position))
        position += -(-array.nbytes // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
    details = SliceDetails(
        layers=tuple(_layer(node, graph) for node in nodes),
        weights=tuple(specs),
        inputs=tuple(map(short, inputs)),
        outputs=tuple(map(short, outputs)),
    )
    arrays = tuple(graph.weights[name] for name in weights)
    encoded = model.SerializeToString(deterministic=True)
    dead = {name for name in inputs if last_slice[name] == number and name not in graph.inputs}
    pairs = tuple(
        (before, after) for before, after in in_place_pairs(nodes, dead) if after in outputs
    )
    return Slice(encoded, details, arrays, weights, inputs, outputs, position, pairs)


def in_place_pairs(
    nodes: Sequence[onnx.NodeProto], dead: AbstractSet[str]
) -> list[tuple[str, str]]:
    """Tensors that nodes may overwrite with what they make of them.

    A convolution that adds a tensor to its result first copies it there, on one thread, unless it
    is there already (ONNX Runtime, ``nchwc_ops.cc``, ``conv.cc``). That is a twentieth of
    ResNet-50's time.

    Args:
        nodes: of a slice, in an order in which they can run.
        dead: its inputs that nobody needs after it.
    """
    before: dict[str, set[int]] = {}  # by tensor: what runs before it is there, whatever the order
    pairs = []
    for number, node in enumerate(nodes):
        earlier = set().union(*(before.get(name, set()) for name in uses(node)))
        before.update(dict.fromkeys(node.output, earlier | {number}))
        added = addend(node)
        if added is None:
            continue
        readers = {n for n, other in enumerate(nodes) if added in uses(other)} - {number}
        if any(nodes[n].op_type in _VIEWS for n in readers):
            continue  # who reads a view of it is not among its readers
        if added in dead and readers <= earlier and list(node.input).count(added) == 1:
            pairs.append((added, node.output[0]))
    return pairs


def freeze(piece: Slice) -> bytes:
    """The slice's graph with its weights as constants, whose values are told apart from it.

    ONNX Runtime packs constant weights for its kernels, which inputs can't be. Whoever opens this
    graph gives the values by name (``add_external_initializers``); the file that they claim to be
    in does not exist.
    """
    model = onnx.load_from_string(piece.model)
    graph = model.graph
    values = {spec.name: spec for spec in piece.details.weights}
    kept = [value for value in graph.input if value.name not in values]
    del graph.input[:]
    graph.input.extend(kept)
    for name, spec in values.items():
        tensor = graph.initializer.add(name=name, dims=spec.shape)
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "sealed"), ("offset", "0"), ("length", str(spec.size))):
            tensor.external_data.add(key=key, value=value)
    encoded: bytes = model.SerializeToString(deterministic=True)
    return encoded


def join_weights(whole: Slice, slices: Sequence[Slice]) -> SliceDetails:
    """How to bind the whole model to the weights of its slices, laid one behind the other."""
    places: dict[str, int] = {}
    base = 0
    for piece in slices:
        for spec, name in zip(piece.details.weights, piece.weight_names, strict=True):
            places.setdefault(name, base + spec.offset)
        base += piece.weight_bytes
    specs = [
        WeightSpec(spec.name, spec.dtype, spec.shape, places[name])
        for spec, name in zip(whole.details.weights, whole.weight_names, strict=True)
    ]
    return SliceDetails(
        layers=whole.details.layers,
        weights=tuple(sorted(specs, key=lambda spec: spec.offset)),
        inputs=whole.details.inputs,
        outputs=whole.details.outputs,
    )


def write_weights(piece: Slice, out: memoryview) -> None:
    """Lay a slice's weights out as they will lie in enclave memory.

    Args:
        piece: the slice.
        out: ``piece.weight_bytes`` bytes; the padding between weights is zeroed.
    """
    flat = np.frombuffer(out, dtype=np.uint8)
    flat[:] = 0
    for spec, array in zip(piece.details.weights, piece.weights, strict=True):
        target = flat[spec.offset : spec.offset + array.nbytes].view(array.dtype)
        copy_into(target.reshape(array.shape), array)


def _renamed(node: onnx.NodeProto, local: Mapping[str, str]) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.ClearField("doc_string")
    if local:
        twin.ClearField("name")
        for field in (twin.input, twin.output):
            for index, name in enumerate(field):
                field[index] = local.get(name, name)
    return twin


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    twin = onnx.TensorProto()
    twin.CopyFrom(tensor)
    twin.name = name
    return twin


def _crossing(name: str, info: TensorInfo, batchable: bool) -> onnx.ValueInfoProto:
    """A graph input for a crossing tensor. A known shape lets ONNX Runtime reuse memory."""
    shape: list[int | str | None] = list(info.spec.row_shape)
    if batchable:
        shape[0] = BATCH if shape[0] == 1 else None
    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(info.spec.dtype)), shape
    )


def _layer(node: onnx.NodeProto, graph: Graph) -> Layer:
    name, tile = node.name or next(filter(None, node.output), ""), ""
    if match := _TILE.fullmatch(name):
        name = match[1]
        tile = match[4] or f"{int(match[2]) + 1}/{match[3]}"
    size = sum(graph.weights[n].nbytes for n in uses(node) if n in graph.weights)
    return Layer(name[:MAX_NAME], node.op_type[:MAX_NAME], tile, size)
