"""Promise: every test is in exactly one phase of `make test`, and CI runs all phases."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
MAKEFILE: Final = (ROOT / "Makefile").read_text()
EXPRESSIONS: Final = re.findall(r"pytest -m '?([^'\n]+)", MAKEFILE)
MARKERS: Final = ("integration", "slow")


def test_the_phases_are_about_the_declared_markers(pytestconfig: pytest.Config) -> None:
    declared = [line.partition(":")[0] for line in pytestconfig.getini("markers")]
    assert set(MARKERS) <= set(declared)
    assert set(re.findall(r"\w+", " ".join(EXPRESSIONS))) == {*MARKERS, "and", "not"}


@pytest.mark.parametrize("marked", list(product([False, True], repeat=len(MARKERS))))
def test_every_test_is_in_one_phase(marked: tuple[bool, ...]) -> None:
    names = dict(zip(MARKERS, marked, strict=True))
    runs = [eval(expression, {}, names) for expression in EXPRESSIONS]  # noqa: S307 - ours
    assert runs.count(True) == 1


def test_make_test_and_ci_run_all_phases() -> None:
    phases = re.findall(r"^(test-\w+):.*\n.*\n.*pytest -m", MAKEFILE, re.MULTILINE)
    assert len(phases) == len(EXPRESSIONS)
    (needed,) = re.findall(r"^test:([^#]*)", MAKEFILE, re.MULTILINE)
    assert needed.split() == ["lint", *phases]
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^phase .* make ([\w-]+)$", ci, re.MULTILINE)[1:-2] == ["lint", *phases]
