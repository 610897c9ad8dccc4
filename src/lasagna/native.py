"""The native library: where it is, and how it was built.

``liblasagna_native.so`` is built from ``native/`` by CMake and installed inside the package. It is
loaded by ctypes, so nothing here depends on one version of Python.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Final

import lasagna
from lasagna.errors import LasagnaError

_FILE: Final = "liblasagna_native.so"


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """How the native library was built.

    Attributes:
        version: of the package that it was built with.
        compiler: name and version, ``GNU 12.2.0``.
        flags: as given to the compiler, without paths.
        cpu: the target architecture, ``x86_64``.
        instruction_sets: those the compiler may use unasked, ``sse2 avx2``.
        build_type: CMake's, ``Release``.
        sanitizer: ``address,undefined``, or ``none``.
    """

    version: str
    compiler: str
    flags: str
    cpu: str
    instruction_sets: str
    build_type: str
    sanitizer: str


class _CBuildInfo(ctypes.Structure):
    # struct lasagna_build_info of native/buildinfo.h
    _fields_ = [(field.name, ctypes.c_char_p) for field in fields(BuildInfo)]


def library_path() -> Path:
    """The path of the installed shared library.

    Raises:
        LasagnaError: the package was not built: it is used from a source tree without installing.
    """
    # An editable install has two folders in __path__: src/lasagna, and the one in site-packages
    # that CMake installed into. importlib.resources can't hand out a real path for both.
    for folder in lasagna.__path__:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise LasagnaError(
        f"{_FILE} is not installed: run `pip install .` (or `pip install -e .`) in the source tree"
    )


@cache
def library() -> ctypes.CDLL:
    """The loaded library; loaded once a process.

    Raises:
        LasagnaError: it is not installed, or the system can't load it.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise LasagnaError(f"can't load {path}: {error}") from error
    loaded.lasagna_build_info.argtypes = []
    loaded.lasagna_build_info.restype = ctypes.POINTER(_CBuildInfo)
    return loaded


@cache
def build_info() -> BuildInfo:
    """How the installed native library was built.

    Raises:
        LasagnaError: it is not installed, or the system can't load it.
    """
    raw = library().lasagna_build_info().contents
    return BuildInfo(
        **{field.name: getattr(raw, field.name).decode() for field in fields(BuildInfo)}
    )
