"""all-MiniLM-L6-v2 against the embeddings of a second implementation, see tests/data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from lasagna.errors import ModelError, UsageError
from lasagna.models.zoo import catalog
from lasagna.models.zoo.minilm import build_minilm, read_safetensors, tokenize

REFERENCE = json.loads(
    Path(__file__).parents[2].joinpath("data/minilm_reference.json").read_text("utf-8")
)
EXPECTED = np.array([row["embedding"] for row in REFERENCE])


# What uses it is slow: the network has 90 MB of weights.
@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    pytest.importorskip("safetensors")
    try:
        return ort.InferenceSession(catalog.load("minilm").SerializeToString())
    except ModelError as error:
        pytest.skip(str(error))


def embed(
    session: ort.InferenceSession, ids: NDArray[np.int64], mask: NDArray[np.int64]
) -> NDArray[np.float32]:
    (found,) = session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
    return np.asarray(found, np.float32)


def reference_inputs() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids, mask = np.zeros((2, len(REFERENCE), 128), np.int64)
    for row, entry in enumerate(REFERENCE):
        ids[row, : len(entry["tokens"])] = entry["tokens"]
        mask[row, : len(entry["tokens"])] = 1
    return ids, mask


@pytest.mark.slow
def test_embeds_as_the_second_implementation(session: ort.InferenceSession) -> None:
    found = embed(session, *reference_inputs())
    np.testing.assert_allclose(found, EXPECTED, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # https://sbert.net/docs/quickstart.html prints these similarities.
    similarity = found @ found.T
    np.testing.assert_allclose(similarity[0, 1:], [0.6660, 0.1046], atol=1e-4)
    np.testing.assert_allclose(similarity[1, 2], 0.1411, atol=1e-4)


@pytest.mark.slow
def test_padding_holds_nothing(session: ort.InferenceSession) -> None:
    ids, mask = reference_inputs()
    found = embed(session, np.where(mask == 1, ids, 999), mask)
    np.testing.assert_allclose(found, EXPECTED, atol=1e-4)


@pytest.mark.slow
def test_a_row_of_padding_is_zero_not_nan(session: ort.InferenceSession) -> None:
    np.testing.assert_array_equal(embed(session, *np.zeros((2, 1, 128), np.int64)), 0)


def test_sentences_become_the_reference_tokens() -> None:
    pytest.importorskip("tokenizers")
    try:
        file = catalog.minilm_tokenizer()
    except ModelError as error:
        pytest.skip(str(error))
    sentences = [row["sentence"] for row in REFERENCE]
    found = tokenize(sentences, file)
    for array, expected in zip(found, reference_inputs(), strict=True):
        np.testing.assert_array_equal(array, expected, strict=True)
    ids, mask = tokenize(["weather " * 50], file, 16)
    assert ids.shape == mask.shape == (1, 16)
    assert ids[0, 0] == 101  # [CLS]
    assert ids[0, -1] == 102  # [SEP]
    assert tokenize([], file)[0].shape == (0, 128)


@pytest.fixture
def random_weights() -> dict[str, NDArray[Any]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (30522, 384),
        "embeddings.position_embeddings.weight": (512, 384),
        "embeddings.token_type_embeddings.weight": (2, 384),
        "embeddings.LayerNorm.weight": (384,),
        "embeddings.LayerNorm.bias": (384,),
    }
    linears = {
        "attention.self.query": (384, 384),
        "attention.self.key": (384, 384),
        "attention.self.value": (384, 384),
        "attention.output.dense": (384, 384),
        "intermediate.dense": (1536, 384),
        "output.dense": (384, 1536),
    }
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        for part, shape in linears.items():
            shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        for part in ("attention.output", "output"):
            shapes |= {f"{name}.{part}.LayerNorm.{kind}": (384,) for kind in ("weight", "bias")}
    random = np.random.default_rng(0)
    return {key: random.random(shape, np.float32) - 0.5 for key, shape in shapes.items()}


@pytest.mark.slow
def test_the_sequence_length_is_free(random_weights: dict[str, NDArray[Any]]) -> None:
    session = ort.InferenceSession(build_minilm(random_weights, 7).SerializeToString())
    assert session.get_inputs()[0].shape == ["batch", 7]
    found = embed(session, np.ones((2, 7), np.int64), np.ones((2, 7), np.int64))
    assert found.shape == (2, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    for length in (0, 513):
        with pytest.raises(UsageError, match=f"is {length}, not from 1 to 512"):
            build_minilm(random_weights, length)


def test_refuses_another_network(random_weights: dict[str, NDArray[Any]]) -> None:
    random_weights["encoder.layer.6.output.dense.bias"] = np.zeros(384, np.float32)
    with pytest.raises(ModelError, match="for another network"):
        build_minilm(random_weights)


def test_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    for content in (b"", b"no tensors", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="can't read the checkpoint"):
            read_safetensors(path)
    with pytest.raises(ModelError, match="can't read the checkpoint"):
        read_safetensors(tmp_path / "none")
