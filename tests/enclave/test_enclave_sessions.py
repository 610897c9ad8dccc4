"""Promise: slices open as they were measured, and never take more workspace than was planned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

from lasagna.enclave import sessions
from lasagna.enclave.sessions import native_block, open_slice_session, set_workspace_arena
from lasagna.errors import BudgetError, PackageError


def test_the_probe_in_the_enclave_is_the_graph_its_comment_describes() -> None:
    domain = "com.microsoft.nchwc"
    shape = [1, 64, 1, 2]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    graph = onnx.load_from_string(sessions._NCHWC_PROBE).graph
    assert [(n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node] == [
        ("ReorderInput", domain, ["x"], ["y"])
    ]
    assert [v.SerializeToString() for v in graph.input] == [x.SerializeToString()]


def test_the_block_is_one_that_onnx_runtime_has() -> None:
    assert native_block() in (4, 8, 16)


def _chain(names: list[str]) -> bytes:
    info = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Transpose", [a], [b], perm=[1, 0]) for a, b in pairwise(names)]
    graph = onnx.helper.make_graph(
        nodes,
        "chain",
        [info(names[0], onnx.TensorProto.FLOAT, ["rows", 1000])],
        [info(names[-1], onnx.TensorProto.FLOAT, None)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(model.SerializeToString())


def test_a_run_that_needs_more_workspace_than_the_arena_fails_and_the_next_one_works() -> None:
    set_workspace_arena(1_000_000)
    session = open_slice_session(_chain(["a", "b", "c", "d", "e"]))
    small, large = np.zeros((100, 1000), np.float32), np.zeros((500, 1000), np.float32)
    assert session.run(None, {"a": small})[0].shape == (100, 1000)
    with pytest.raises(Exception, match="Available memory"):
        session.run(None, {"a": large})
    assert session.run(None, {"a": small})[0].shape == (100, 1000)


def test_a_graph_that_is_none_is_refused() -> None:
    set_workspace_arena(100_000)
    with pytest.raises(PackageError, match=r"does not accept a slice's graph \(\w+\)$"):
        open_slice_session(b"no graph")


def test_a_refused_graph_is_not_quoted() -> None:
    """It is encrypted in the package, and the host reads the error."""
    set_workspace_arena(100_000)
    model = onnx.load_from_string(_chain(["a", "b"]))
    model.graph.node[0].op_type = "SecretLayer"
    with pytest.raises(PackageError) as caught:
        open_slice_session(model.SerializeToString())
    assert "SecretLayer" not in str(caught.value)


def test_a_workspace_beyond_counting_is_refused_and_the_one_before_stays() -> None:
    set_workspace_arena(1_000_000)
    with pytest.raises(BudgetError, match="no workspace of 9007199254740992 bytes"):
        set_workspace_arena(2**53)
