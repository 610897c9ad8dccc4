"""A real sealed model, and what is needed to serve it with real enclave processes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from tests.server.rig import Rig, hosting

from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import open_session, prepare
from lasagna.models.zoo.light import light_input, light_model
from lasagna.server.broker import InsecureBroker
from lasagna.server.broker_state import BrokerSecrets
from lasagna.tee.process import InsecureProcessBackend
from lasagna.trust.keys import SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys, encode_model_keys
from lasagna.trust.policy import MeasurementIn
from lasagna.units import MIB

Array = NDArray[Any]
NAME = "squeezenet"
INPUT = "data_0"
OUTPUT = "softmaxout_1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Model:
    """SqueezeNet, sealed; ``session`` runs the same model in plain ONNX Runtime."""

    package: Path
    key_file: Path
    keys: ModelKeys
    session: ort.InferenceSession

    def expected(self, inputs: Mapping[str, Array]) -> Array:
        (answer,) = self.session.run([OUTPUT], dict(inputs))
        return np.asarray(answer)

    def copy_to(self, folder: Path) -> Path:
        return Path(shutil.copy(self.package, folder / self.package.name))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sealed")
    source = prepare(light_model(NAME, seed=1))
    package, key_file = folder / "squeezenet.lsg", folder / "squeezenet.key"
    options = SealOptions(profile=False, portable=False, slice_bytes=MIB)
    keys, _ = seal(source, NAME, Ed25519PrivateKey.generate(), package, options)
    key_file.touch(mode=0o600)
    key_file.write_bytes(encode_model_keys(keys))
    return Model(package, key_file, keys, open_session(source))


@pytest.fixture(scope="session")
def image() -> Array:
    return light_input(NAME)


@pytest.fixture
def broker(model: Model) -> InsecureBroker:
    return InsecureBroker(
        secrets=BrokerSecrets(
            Ed25519PrivateKey.from_private_bytes(b"b" * 32), ServiceSecret(SecretKey(b"s" * 32))
        ),
        models=[model.keys],
        policy=MeasurementIn(frozenset({InsecureProcessBackend().measurement()})),
        insecure_allow_emulated=True,
    )


@pytest.fixture
async def rig(model: Model, broker: InsecureBroker, tmp_path: Path) -> AsyncIterator[Rig]:
    """A host of the model, ready."""
    async with hosting(model.package, broker, tmp_path, max_batch=4) as made:
        yield made
