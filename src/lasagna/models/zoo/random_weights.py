"""Random weights that behave like trained ones: signals neither vanish nor explode, inputs differ.

He's initialisation (He et al., ICCV 2015) alone keeps the second moment of the signal, but behind
a ReLU most of that is the mean, the same for every input: after twenty layers a network answers
nearly the same to anything. So each filter's weights are centred, which removes that mean, and
scaled for the variance that is left. If z is standard normal, max(0, z) has the second moment 1/2
and the mean 1/sqrt(2 pi), hence the variance 1/2 - 1/(2 pi) = 0.341; weights of variance
1 / (0.341 fan_in) therefore give the next layer's sums the variance 1 again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from lasagna.errors import ModelError

_RECTIFIED_VARIANCE: Final = 0.5 - 0.5 / math.pi
_COLOURS: Final = 3
_RESIDUAL_SCALE: Final = 0.3
"""A residual branch is this much smaller than its trunk, so that the sum grows by 4 % a block."""


def random_weights(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], seed: int, logit_gain: float
) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of a graph of Conv, Gemm and BatchNormalization nodes.

    Args:
        graph: the graph; where a weight is used tells what it should look like.
        shapes: the shapes of the weights to draw, by name.
        seed: equal seeds give equal weights.
        logit_gain: further factor on the weights of the last Conv or Gemm.

    Raises:
        ModelError: the graph uses a weight in a way unknown here.
    """
    wiring = _Wiring.of(graph)
    random = np.random.default_rng(seed)
    return {name: _draw(wiring, name, shape, random, logit_gain) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class _Wiring:
    """Who makes and who uses each value of a graph, and its last layer that has weights."""

    makers: Mapping[str, onnx.NodeProto]
    users: Mapping[str, list[tuple[onnx.NodeProto, int]]]
    last: onnx.NodeProto

    @staticmethod
    def of(graph: onnx.GraphProto) -> _Wiring:
        makers = {output: node for node in graph.node for output in node.output}
        users = defaultdict(list)
        for node in graph.node:
            for position, value in enumerate(node.input):
                users[value].append((node, position))
        last = [node for node in graph.node if node.op_type in ("Conv", "Gemm")][-1]
        return _Wiring(makers, users, last)

    def use(self, weight: str) -> tuple[onnx.NodeProto, int]:
        """The node that computes with a weight, seen through reshapes, and the input it is."""
        node, position = self.users[weight][0]
        while node.op_type in ("Unsqueeze", "Reshape"):
            node, position = self.users[node.output[0]][0]
        return node, position

    def branch_scale(self, norm: onnx.NodeProto) -> float:
        """How much smaller a normalisation's output should be because it enters a sum."""
        for node, _ in self.users[norm.output[0]]:
            if node.op_type == "Sum":
                makers = [self.makers.get(term) for term in node.input]
                if all(maker and maker.op_type == norm.op_type for maker in makers):
                    return 1 / math.sqrt(len(makers))
                return _RESIDUAL_SCALE
        return 1.0


def _draw(
    wiring: _Wiring,
    name: str,
    shape: tuple[int, ...],
    random: np.random.Generator,
    logit_gain: float,
) -> NDArray[np.float32]:
    node, position = wiring.use(name)
    match node.op_type, position:
        case ("Conv" | "Gemm") as op, 1:
            gain = logit_gain if node is wiring.last else 1.0
            return _filters(op, shape, random, gain)
        case "BatchNormalization", 1:
            scale = wiring.branch_scale(node)
            return random.uniform(0.9 * scale, 1.1 * scale, shape).astype(np.float32)
        case "BatchNormalization", 4:
            return random.uniform(0.8, 1.2, shape).astype(np.float32)
        case "Mul", _:
            return random.uniform(0.9, 1.1, shape).astype(np.float32)
        case ("Conv" | "Gemm" | "BatchNormalization", 2) | ("BatchNormalization", 3) | ("Add", _):
            return (0.03 * random.standard_normal(shape)).astype(np.float32)
    raise ModelError(f"no random weights for input {position} of a {node.op_type} ({name})")


def _filters(
    op: str, shape: tuple[int, ...], random: np.random.Generator, gain: float
) -> NDArray[np.float32]:
    """Weights of a Conv [out, in / groups, height, width] or of a Gemm [..., out, in]."""
    weights = np.empty(shape, np.float32)
    random.standard_normal(dtype=np.float32, out=weights)
    rows = weights.reshape(shape[0] if op == "Conv" else -1, -1 if op == "Conv" else shape[-1])
    spread = float(rows.shape[1])
    # A filter that sees an image, or one channel by itself, must not ignore its mean.
    if op == "Gemm" or shape[1] > _COLOURS:
        rows -= rows.mean(axis=1, keepdims=True)
        spread *= _RECTIFIED_VARIANCE
    weights *= np.float32(gain / math.sqrt(spread))
    return weights
