"""Building an ONNX graph from a checkpoint's tensors, each of which is checked when taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lasagna.errors import ModelError

OPSET: Final = 17
"""The oldest operator set with LayerNormalization."""
IR_VERSION: Final = 8
"""The file format's version that came with OPSET: older ONNX Runtimes read it too."""
BATCH: Final = "batch"
"""The name of the symbolic first dimension of every input and output."""

Weights = Mapping[str, NDArray[Any]]
"""A checkpoint: tensors by name."""


@dataclass(slots=True)
class GraphBuilder:
    """Collects nodes and initializers; a node's only output has the node's name.

    Attributes:
        weights: the checkpoint that ``take`` reads.
        nodes: the nodes so far, in topological order.
        initializers: the constants so far.
    """

    weights: Weights
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A tensor of the checkpoint.

        Raises:
            ModelError: it is missing, or has another shape or element type.
        """
        found = self.weights.get(key)
        if found is None:
            raise ModelError(f"the checkpoint has no tensor {key!r}")
        if found.dtype != np.float32 or found.shape != shape:
            raise ModelError(
                f"the checkpoint's tensor {key!r} is {found.dtype}{list(found.shape)}, "
                f"not float32{list(shape)}"
            )
        self._taken.add(key)
        return found

    def refuse_leftovers(self, ignored: Callable[[str], bool]) -> None:
        """Make sure that every tensor was taken: else the checkpoint is another network's.

        Raises:
            ModelError: a tensor that is not ``ignored`` was never taken.
        """
        left = sorted(key for key in self.weights if key not in self._taken and not ignored(key))
        if left:
            raise ModelError(
                f"the checkpoint is for another network: {len(left)} of its tensors "
                f"have no place in this one, for example {left[0]!r}"
            )

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer; returns its name."""
        contiguous = np.ascontiguousarray(array)
        self.initializers.append(onnx.numpy_helper.from_array(contiguous, name))
        return name

    def weight(self, key: str, shape: tuple[int, ...]) -> str:
        """Add a tensor of the checkpoint as an initializer of the same name.

        Raises:
            ModelError: as ``take``.
        """
        return self.constant(key, self.take(key, shape))

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name, which is the node's."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def model(
        self,
        name: str,
        inputs: Sequence[tuple[str, int, Sequence[int | str]]],
        outputs: Sequence[tuple[str, int, Sequence[int | str]]],
    ) -> onnx.ModelProto:
        """The finished model, checked.

        Args:
            name: the graph's name.
            inputs: name, ``TensorProto`` element type and shape of each input.
            outputs: the same of each output.
        """
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            producer_name="lasagna",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model)
        return model
