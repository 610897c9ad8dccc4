"""The measurement of an enclave that no processor measures: a hash over its own code.

It stands in for MRENCLAVE in emulated evidence, so that brokers and clients name the code they
allow in the same way with and without SGX. Unlike MRENCLAVE it covers Lasagna's files only (not
Python, NumPy or ONNX Runtime), and whoever starts the process can claim any other: it tells
versions apart, it proves nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import lasagna
from lasagna.trust.encoding import canonical

ENCLAVE_CODE: Final = ("__init__.py", "enclave", "errors.py", "package", "trust", "units.py")
"""What is imported inside an enclave, files and folders, below the package ``lasagna``."""


def source_root() -> Path:
    """The folder of the package ``lasagna``."""
    return Path(lasagna.__file__).resolve().parent


def measure_code(root: Path) -> bytes:
    """SHA-256 over relative names and contents of the enclave's Python files, sorted by name.

    Args:
        root: the folder of the package ``lasagna``, as it will be imported.

    Returns:
        32 bytes; the same for equal files, wherever they lie.

    Raises:
        OSError: a file can't be read.
    """
    files: list[Path] = []
    for name in ENCLAVE_CODE:
        place = root / name
        files += place.rglob("*.py") if place.is_dir() else [place]
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    fields = [part for name, file in named for part in (name.encode(), file.read_bytes())]
    return hashlib.sha256(canonical("lasagna/v1/insecure-measurement", *fields)).digest()
