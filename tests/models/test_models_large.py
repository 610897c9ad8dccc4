"""A model of more than 2 GB: beyond what one protobuf, and one 32-bit length, can hold."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper

from lasagna.models.graph import Array
from lasagna.models.seal import SealOptions, seal
from lasagna.models.shapes import open_bare, run_bare
from lasagna.models.source import load_source
from lasagna.package.format import DTYPES
from lasagna.package.reader import OpenPackage, Package

WIDTH: Final = 8192
LAYERS: Final = 8
LAST: Final = 256
LAYER_BYTES: Final = 4 * WIDTH * WIDTH
WEIGHT_BYTES: Final = LAYERS * LAYER_BYTES + 4 * WIDTH * LAST
FREE_BYTES: Final = 12 * 2**30


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for some 8 GB, gone after the test; pytest would keep it."""
    if shutil.disk_usage(tmp_path).free < FREE_BYTES:
        pytest.skip("needs 12 GiB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_model(folder: Path) -> Path:
    """Layers of Relu(Gemm), whose weights differ and lie one behind the other in a file."""
    chunk = np.random.default_rng(6).standard_normal((WIDTH // 16, WIDTH), dtype=np.float32)
    chunk /= np.sqrt(WIDTH / 2)
    with (folder / "weights.bin").open("wb") as file:
        for number in range(16 * LAYERS + 1):
            file.write((chunk * np.float32(1 + number / 1000)).tobytes())  # no two are equal
    nodes, weights = [], []
    for layer in range(LAYERS + 1):
        rows = WIDTH if layer < LAYERS else LAST
        weight = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[rows, WIDTH])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "weights.bin"),
            ("offset", layer * LAYER_BYTES),
            ("length", 4 * WIDTH * rows),
        ):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        inputs = [f"r{layer - 1}" if layer else "x", weight.name]
        nodes.append(helper.make_node("Gemm", inputs, [f"g{layer}"], transB=1))
        nodes.append(helper.make_node("Relu", [f"g{layer}"], [f"r{layer}"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info(f"r{LAYERS}", TensorProto.FLOAT, ["N", LAST])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_model_of_more_than_2_gb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    source = load_source(write_model(folder))
    path = folder / "model.lsg"
    options = SealOptions(profile=False, native=False)
    keys, report = seal(source, "large", Ed25519PrivateKey.generate(), path, options)

    (variant,) = report.manifest.variants
    assert source.batchable
    assert variant.weight_bytes == WEIGHT_BYTES > 2**31
    assert path.stat().st_size == report.file_bytes > variant.weight_bytes
    assert max(facts.weight_bytes for facts in variant.slices) <= 16 * 2**20
    assert len({facts.weights for facts in variant.slices if facts.weight_bytes}) > 125
    with Package(path) as package:
        package.verify_signature(keys.owner_public_key)
        got = run_chain(
            OpenPackage(package, keys.content_key.reveal()), source.references[0].inputs
        )
    want = source.references[0].outputs[f"r{LAYERS}"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def run_chain(package: OpenPackage, rows: dict[str, Array]) -> Array:
    """The output for one row, slice by slice, only one slice's weights at a time in memory."""
    (variant,) = package.manifest.variants
    details = package.details(variant)
    values: dict[int, Array] = {variant.inputs[0]: rows["x"]}
    for facts, inner in zip(variant.slices, details.slices, strict=True):
        memory = b"".join(map(package.read_section, facts.weights))
        feeds = dict(zip(inner.inputs, (values[number] for number in facts.inputs), strict=True))
        for spec in inner.weights:
            flat = np.frombuffer(memory, DTYPES[spec.dtype], int(np.prod(spec.shape)), spec.offset)
            feeds[spec.name] = flat.reshape(spec.shape)
        session = open_bare(package.read_section(facts.graph))
        values.update(zip(facts.outputs, run_bare(session, feeds), strict=True))
    return values[variant.outputs[0]]
