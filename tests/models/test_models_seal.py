"""From model to package: what comes out of the file computes what went in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from lasagna.errors import ModelError, UsageError
from lasagna.models.graph import Array
from lasagna.models.seal import SealOptions, SealReport, seal
from lasagna.models.shapes import open_bare, run_bare
from lasagna.models.source import Source, load_source, open_session, prepare
from lasagna.package.format import (
    DTYPES,
    PROFILE_BATCHES,
    SliceDetails,
    SliceFacts,
    Variant,
)
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import ModelKeys

OWNER = Ed25519PrivateKey.generate()
FAST = SealOptions(slice_bytes=8192, profile=False)


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def weight(*shape: int) -> Array:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / 5).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    x: list[Any],
    *,
    y: list[Any] | None = None,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", dtype, y)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def small_network() -> onnx.ModelProto:
    """Two convolutions with a residual, a normalisation with scale and shift, a Gemm."""
    weights = {
        "k1": weight(16, 3, 3, 3),
        "k2": weight(16, 16, 3, 3),
        **{name: np.abs(weight(16)) + 0.5 for name in "hijk"},
        "s": weight(16, 1, 1),
        "shape": np.array([1, 1024]),
        "w": weight(1024, 48),
    }
    nodes = [
        node("Conv", ["x", "k1"], "a", pads=[1] * 4),
        node("BatchNormalization", ["a", *"hijk"], "b"),
        node("Mul", ["b", "s"], "c"),
        node("Conv", ["c", "k2"], "d", pads=[1] * 4),
        node("Add", ["d", "a"], "e"),
        node("Reshape", ["e", "shape"], "f"),
        node("Gemm", ["f", "w"], "y"),
    ]
    return model_of(nodes, weights, [1, 3, 8, 8], y=[1, 48])


def sealed(
    source: Source, folder: Path, options: SealOptions = FAST
) -> tuple[Path, ModelKeys, SealReport]:
    path = folder / "model.lsg"
    keys, report = seal(source, "model", OWNER, path, options)
    return path, keys, report


def run_variant(
    package: OpenPackage, variant: Variant, rows: dict[str, Array], *, whole: bool
) -> dict[str, Array]:
    """Run a variant out of its package, in slices or whole, as an enclave would."""
    details = package.details(variant)
    steps = zip(variant.slices, details.slices, strict=True)
    names = [spec.name for spec in package.manifest.inputs]
    values = dict(zip(variant.inputs, (rows[name] for name in names), strict=True))
    for facts, inner in [(variant.whole, details.whole)] if whole else steps:
        results = run_slice(package, facts, inner, values)
        values |= dict(zip(facts.outputs, results, strict=True))
        for number in facts.outputs:  # the planned shape is the one that comes
            count = len(next(iter(rows.values()))) // package.manifest.inputs[0].row_shape[0]
            assert values[number].shape == details.tensors[number].shape(count)
            assert values[number].dtype.name == details.tensors[number].dtype
    names = [spec.name for spec in package.manifest.outputs]
    return dict(zip(names, (values[number] for number in variant.outputs), strict=True))


def run_slice(
    package: OpenPackage, facts: SliceFacts, inner: SliceDetails, values: dict[int, Array]
) -> list[Array]:
    memory = b"".join(package.read_section(section) for section in facts.weights)
    assert len(memory) == facts.weight_bytes
    feeds = {name: values[number] for name, number in zip(inner.inputs, facts.inputs, strict=True)}
    for spec in inner.weights:
        flat = np.frombuffer(memory, DTYPES[spec.dtype], int(np.prod(spec.shape)), spec.offset)
        feeds[spec.name] = flat.reshape(spec.shape)
    return run_bare(open_bare(package.read_section(facts.graph)), feeds)


def check(source: Source, path: Path, keys: ModelKeys, *, rows: Sequence[int] = (1, 3)) -> None:
    """Every variant of a package answers as the model does."""
    plain = open_session(source)
    with Package(path) as package:
        package.verify_signature(keys.owner_public_key)
        opened = OpenPackage(package, keys.content_key.reveal())
        for variant in package.manifest.variants:
            for count in rows if source.batchable else [1]:
                feeds = {
                    name: np.concatenate(
                        [source.references[k % 3].inputs[name] for k in range(count)]
                    )
                    for name in source.references[0].inputs
                }
                want = dict(zip(source.references[0].outputs, plain.run(None, feeds), strict=True))
                for whole in (False, True):
                    got = run_variant(opened, variant, feeds, whole=whole)
                    for name, array in want.items():
                        np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4)


def test_package_computes_what_the_model_does(tmp_path: Path) -> None:
    source = prepare(small_network())
    path, keys, report = sealed(source, tmp_path)

    check(source, path, keys)
    native, portable = report.manifest.variants
    assert native.name.startswith("nchwc")
    assert int(native.name.removeprefix("nchwc")) == native.block > 0
    assert (portable.name, portable.block) == ("portable", 0)
    assert len(portable.slices) > 3
    assert report.file_bytes == path.stat().st_size
    assert set(report.self_check) == {native.name, "portable"}
    assert max(report.self_check.values()) < 1e-4


def test_manifest_tells_of_the_model(tmp_path: Path) -> None:
    source = prepare(small_network())
    path, keys, report = sealed(source, tmp_path)

    with Package(path) as package:
        manifest = package.manifest
    assert manifest == report.manifest
    assert manifest.name == "model"
    assert manifest.package_id == keys.package_id
    assert manifest.owner == keys.owner_public_key == OWNER.public_key().public_bytes_raw()
    assert (manifest.batchable, manifest.batch_note) == (True, source.batch_note)
    assert [(s.name, s.dtype, s.row_shape) for s in manifest.inputs] == [
        ("x", "float32", (1, 3, 8, 8))
    ]
    assert [(s.name, s.row_shape) for s in manifest.outputs] == [("y", (1, 48))]
    for variant in manifest.variants:
        assert variant.whole.weight_bytes == variant.weight_bytes
        assert all(len(one.workspace) == len(PROFILE_BATCHES) for one in variant.slices)
        assert all(one.compute_s == () for one in variant.slices)


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    # The Gemm is the same in both variants, and its tiles have one graph.
    _, _, report = sealed(prepare(small_network()), tmp_path)
    native, portable = report.manifest.variants

    weights = [{section for one in v.slices for section in one.weights} for v in (native, portable)]
    assert weights[0] & weights[1]
    assert len({one.graph for one in portable.slices}) < len(portable.slices)


def test_profile_measures_times(tmp_path: Path) -> None:
    options = SealOptions(slice_bytes=16384, native=False)
    _, _, report = sealed(prepare(small_network()), tmp_path, options)

    for facts in (*report.manifest.variants[0].slices, report.manifest.variants[0].whole):
        assert len(facts.compute_s) == len(PROFILE_BATCHES)
        assert all(0 < seconds < 1 for seconds in facts.compute_s)
        assert list(facts.workspace) == sorted(facts.workspace)


@pytest.mark.parametrize("portable", [True, False])
def test_one_variant_can_be_left_out(tmp_path: Path, portable: bool) -> None:
    options = SealOptions(slice_bytes=2**20, profile=False, portable=portable, native=not portable)
    _, _, report = sealed(prepare(small_network()), tmp_path, options)

    assert [variant.block > 0 for variant in report.manifest.variants] == [not portable]


def test_without_convolutions_there_is_one_variant(tmp_path: Path) -> None:
    model = model_of([node("MatMul", ["x", "w"], "y")], {"w": weight(40, 40)}, ["N", 40])
    source = prepare(model)
    path, keys, report = sealed(source, tmp_path)

    assert [variant.name for variant in report.manifest.variants] == ["portable"]
    check(source, path, keys)


def test_unbatched_model_is_sealed(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Softmax", ["a"], "y", axis=0)]
    source = prepare(model_of(nodes, {"w": weight(40, 40)}, [4, 40], y=[4, 40]))
    path, keys, report = sealed(source, tmp_path)

    assert not report.manifest.batchable
    assert "fixed leading dimension of 4" in report.manifest.batch_note
    assert report.manifest.inputs[0].row_shape == (4, 40)
    check(source, path, keys)


def test_outputs_that_are_no_floats_are_sealed(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("ArgMax", ["a"], "i", axis=1),
        node("Greater", ["a", "zero"], "y"),
    ]
    weights = {"w": weight(40, 40), "zero": np.zeros(1, np.float32)}
    model = model_of(nodes, weights, ["N", 40], dtype=TensorProto.BOOL)
    model.graph.output.append(helper.make_tensor_value_info("i", TensorProto.INT64, None))
    source = prepare(model)
    path, keys, report = sealed(source, tmp_path)

    assert [spec.dtype for spec in report.manifest.outputs] == ["bool", "int64"]
    check(source, path, keys)


def test_infinite_outputs_are_compared(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Log", ["a"], "y")]
    path, keys, _ = sealed(
        source := prepare(model_of(nodes, {"w": weight(40, 40)}, ["N", 40])), tmp_path
    )

    assert not np.isfinite(source.references[0].outputs["y"]).all()
    check(source, path, keys)


def test_external_data_is_sealed(tmp_path: Path) -> None:
    options: Any = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(small_network(), str(tmp_path / "model.onnx"), **options)
    source = load_source(tmp_path / "model.onnx")
    path, keys, _ = sealed(source, tmp_path)

    check(source, path, keys)


# What can't be sealed.


@pytest.mark.parametrize(
    ("last", "dtype"),
    [
        (node("ReduceSum", ["r"], "y", keepdims=0), TensorProto.FLOAT),
        (node("NonZero", ["r"], "y"), TensorProto.INT64),
    ],
)
def test_outputs_without_rows_are_named(tmp_path: Path, last: onnx.NodeProto, dtype: int) -> None:
    model = model_of([node("Relu", ["x"], "r"), last], {}, [3, 40], dtype=dtype)
    source = prepare(model)

    with pytest.raises(ModelError, match="output 'y' is not computed row by row"):
        sealed(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_constant_outputs_are_named(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], "r"), node("Relu", ["w"], "y")]
    source = prepare(model_of(nodes, {"w": weight(30, 40)}, [3, 40]))

    with pytest.raises(ModelError, match="output 'y' is the same for all inputs: a constant"):
        sealed(source, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SealOptions(portable=False, native=False), "at least one variant"),
        (SealOptions(slice_bytes=1000), "slices of 1000 bytes of weights are too small"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: SealOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sealed(prepare(small_network()), tmp_path, options)


@pytest.mark.parametrize("name", ["", "n" * 257])
def test_names_of_a_wrong_length(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a model's name has 1 to 256 characters"):
        seal(prepare(small_network()), name, OWNER, tmp_path / "model.lsg")


def test_model_beyond_a_limit_of_the_format_is_not_written(tmp_path: Path) -> None:
    long = "y" * 1025
    model = model_of([node("Relu", ["x"], long)], {}, ["N", 4])
    model.graph.output[0].name = long

    with pytest.raises(ModelError, match="does not fit the package format: malformed manifest"):
        sealed(prepare(model), tmp_path, FAST)
    assert not list(tmp_path.iterdir())


# The file appears whole or not at all.


class Interrupt:
    """Progress that is interrupted when it comes to a stage."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        self.files: list[str] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith(self.stage) and done == total - 1:
            self.files = sorted(path.name for path in self.folder.iterdir())
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["optimise", "profile", "encrypt"])
@pytest.mark.parametrize("before", [None, b"an older package"])
def test_interrupted_sealing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, before: bytes | None
) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = folder / "model.lsg"
    if before:
        path.write_bytes(before)
    interrupt = Interrupt(stage, folder)

    with pytest.raises(KeyboardInterrupt):
        seal(prepare(small_network()), "model", OWNER, path, FAST, interrupt)
    assert interrupt.files == [name for name in ("model.lsg",) if before] + [
        name for name in ("model.lsg.partial",) if stage == "encrypt"
    ]
    assert [one.name for one in folder.iterdir()] == (["model.lsg"] if before else [])
    assert not before or path.read_bytes() == before
    assert not list(scratch.iterdir())  # plaintext weights were there


def test_target_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't write .*: No such file or directory"):
        seal(prepare(small_network()), "model", OWNER, tmp_path / "none" / "model.lsg", FAST)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "model.lsg.partial").symlink_to("/dev/full")

    with pytest.raises(UsageError, match="No space left on device"):
        sealed(prepare(small_network()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_progress_is_told_in_order(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    seal(
        prepare(small_network()),
        "model",
        OWNER,
        tmp_path / "model.lsg",
        FAST,
        lambda *what: told.append(what),
    )

    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[0] == "optimise (native)"
    assert stages[-1] == "encrypt"
    for stage in stages:
        steps = [(done, total) for what, done, total in told if what == stage]
        assert steps == sorted(steps)
        assert all(0 <= done < total for done, total in steps)
