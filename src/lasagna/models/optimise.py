"""Optimising a model with ONNX Runtime, once, at the owner's: the enclave runs what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnxruntime as ort

from lasagna.enclave.sessions import native_block
from lasagna.models.graph import LIFT_BYTES, Graph, read_graph
from lasagna.models.source import Source, open_session
from lasagna.package.format import PORTABLE

NCHWC: Final = "com.microsoft.nchwc"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A graph optimised for one memory layout (``block`` as in ``package.format.Variant``)."""

    name: str
    block: int
    graph: Graph


def compile_variant(source: Source, folder: Path, *, portable: bool) -> Compiled:
    """Optimise a model; its weights are left in ``folder`` and mapped from there.

    Args:
        source: the model.
        folder: an empty directory that outlives the result; it holds plaintext weights.
        portable: stop at the extended level, whose graph runs on any processor. Otherwise the
            highest level, which reorders convolutions for this machine's vector width.

    Raises:
        ModelError: ONNX Runtime can't load the model.
    """
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_EXTENDED if portable else level.ORT_ENABLE_ALL
    )
    path = folder / "optimised.onnx"
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "weights.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(LIFT_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    open_session(source, options)
    graph = read_graph(path)
    block = native_block() if any(node.domain == NCHWC for node in graph.nodes) else 0
    return Compiled(PORTABLE if block == 0 else f"nchwc{block}", block, graph)
