"""The package is pure, and an enclave's part of it is small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lasagna.trust

SOURCES = sorted(Path(lasagna.trust.__file__).parent.glob("*.py"))
ALLOWED = {
    "__future__",
    "collections.abc",
    "cryptography",
    "dataclasses",
    "enum",
    "hashlib",
    "hmac",
    "lasagna.errors",
    "lasagna.trust",
    "lasagna.units",
    "math",
    "msgspec",
    "typing",
    "typing_extensions",  # for type checkers only
}
FORBIDDEN_CALLS = {"open", "print", "eval", "exec", "compile", "__import__", "input", "breakpoint"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "?")
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_module_imports_only_what_has_no_effects(source: Path) -> None:
    for name in imported(ast.parse(source.read_text())):
        parts = name.split(".")
        prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        assert prefixes & ALLOWED, f"{source.name} imports {name}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_module_calls_nothing_that_has_effects(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{source.name} calls {node.func.id}"


def test_an_enclave_imports_no_verifier() -> None:
    """What opens capsules, records and grants needs no policies: they stay out of its code."""
    code = (
        "import sys, lasagna.trust.release, lasagna.trust.records, lasagna.trust.signing\n"
        "loaded = {name for name in sys.modules if name.startswith('lasagna.trust.')}\n"
        "print(*sorted(name.removeprefix('lasagna.trust.') for name in loaded))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert shown == [
        "documents",
        "encoding",
        "evidence",
        "hpke",
        "keys",
        "model_keys",
        "records",
        "release",
        "request",
        "signing",
    ]


def test_no_module_is_too_long_to_audit() -> None:
    assert all(len(source.read_text().splitlines()) < 400 for source in SOURCES)
