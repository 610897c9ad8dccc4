"""The secrets that a key broker keeps: made at its first start, readable for its owner only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.errors import TrustError, UsageError
from lasagna.secret_file import read_private
from lasagna.trust.keys import KEY_BYTES, SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys, decode_model_keys

_SIGNING_KEY: Final = "broker.secret"
_SERVICE_SECRET: Final = "service.secret"  # noqa: S105 - a file's name


@dataclass(frozen=True, slots=True)
class BrokerSecrets:
    """What a broker holds besides the models' keys.

    Attributes:
        signing_key: signs its grants; clients trust its public key.
        service_secret: given to every enclave that the broker releases keys to.
    """

    signing_key: Ed25519PrivateKey = field(repr=False)
    service_secret: ServiceSecret


def open_state(folder: Path) -> BrokerSecrets:
    """Read a broker's secrets; make folder and secrets if they are not there yet.

    Raises:
        UsageError: others may read a file, it can't be read, or it is not one of ours.
        OSError: the folder can't be read or written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing = _secret(folder / _SIGNING_KEY)
    service = _secret(folder / _SERVICE_SECRET)
    return BrokerSecrets(
        Ed25519PrivateKey.from_private_bytes(signing.reveal()), ServiceSecret(service)
    )


def read_model_keys(paths: Sequence[Path]) -> tuple[ModelKeys, ...]:
    """Read the owner's key files.

    Raises:
        UsageError: others may read a file, it can't be read, or it is no key file.
    """
    found = []
    for path in paths:
        try:
            found.append(decode_model_keys(read_private(path)))
        except TrustError as error:
            raise UsageError(f"{path} is not a model's key file: {error}") from None
    return tuple(found)


def _secret(path: Path) -> SecretKey:
    if not path.exists():
        _create(path, os.urandom(KEY_BYTES))
    raw = read_private(path)
    if len(raw) != KEY_BYTES:
        raise UsageError(f"{path} is not a secret of {KEY_BYTES} bytes: restore it or remove it")
    return SecretKey(raw)


def _create(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and never replaces another."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another broker was first: its secret counts
            os.link(partial, path)
    finally:
        partial.unlink()
