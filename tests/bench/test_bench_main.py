from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lasagna.bench import __main__ as bench
from lasagna.bench.report import Bar, Result
from lasagna.errors import LasagnaError

PLANTED = "lasagna_test_planted_benchmark"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark `probe` with one bar, kept in full runs only."""

    def run(*, quick: bool) -> Result:
        return Result(samples={"a": [1.0]}, bars=[Bar("full", 0.0 if quick else 1.0, 1.0)])

    module = ModuleType(PLANTED)
    vars(module)["run"] = run
    monkeypatch.setitem(sys.modules, PLANTED, module)
    monkeypatch.setitem(bench.BENCHMARKS, "probe", PLANTED)
    return module


def test_run_writes_results_and_returns_0(planted: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["probe", "--out", str(tmp_path)]) == 0

    document = json.loads((tmp_path / "probe.json").read_text())
    assert document["quick"] is False
    assert document["samples"] == {"a": [1.0]}
    assert "noise" in document


def test_quick_reaches_the_benchmark_and_the_file_name(planted: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["probe", "--quick", "--out", str(tmp_path)]) == 1

    assert (tmp_path / "probe-quick.json").exists()


@pytest.mark.parametrize("arguments", [["no-such"], []])
def test_wrong_name_exits_with_the_list(
    planted: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)

    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "overhead" in shown
    assert "probe" in shown


def test_failure_is_one_line_and_1(
    planted: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*, quick: bool) -> Result:
        raise LasagnaError("no enclave here")

    vars(planted)["run"] = fail

    assert bench.main(["probe", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: no enclave here\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_in_the_table_can_run(name: str) -> None:
    if importlib.util.find_spec(bench.BENCHMARKS[name]) is None:
        pytest.skip(f"{bench.BENCHMARKS[name]} is not written yet")

    assert callable(importlib.import_module(bench.BENCHMARKS[name]).run)
