"""Promise: the reference of `plan` and `simulate` has their options and all that they report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lasagna.cli import main

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs/reference/plan-and-simulate.md").read_text()
CLUSTER: Final = """
[[server]]
name = "a"
epc = "sgx1-128"
[demand]
inception_v2 = 5
[limits_ms]
inception_v2 = 1000
"""
SCENARIO: Final = """
cluster = "cluster.toml"
models = ["{costs}"]
policies = ["whole-model"]
seconds = 2
warm_up_s = 0
[plan]
time_limit_s = 0.2
"""
NAMES: Final = {"inception_v2", "a", "whole-model"}
"""Keys that are names of models, servers and policies."""


def section(command: str) -> str:
    (found,) = re.findall(rf"^## `lasagna {command} .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def keys_of(report: object) -> Iterator[str]:
    """At any depth, but of what a file's reference describes."""
    if isinstance(report, dict):
        for key, value in report.items():
            yield key
            if key != "scenario":
                yield from keys_of(value)
    if isinstance(report, list):
        for value in report:
            yield from keys_of(value)


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_each_option_is_there_with_its_default(command: str) -> None:
    group = get_command(main.app)
    _, real, _ = group.resolve_command(None, [command])  # type: ignore[attr-defined]
    options = {one.opts[0]: one for one in real.params if one.opts[0].startswith("--")}
    rows = re.findall(r"^\| `(--[\w-]+)[^`]*` \|([^|]*)\|", section(command), re.MULTILINE)
    defaults = {name: said.strip(" `") for name, said in rows}
    assert defaults == {name: shown(option.default) for name, option in options.items()}


def shown(default: object) -> str:
    """As the page has it: nothing for what is off or not there."""
    return "" if default in (None, False) else str(default).removesuffix(".0")


def test_each_key_of_both_reports_is_there(tmp_path: Path) -> None:
    """Of a plan that simulations have chosen, and of a simulation."""
    costs = ROOT / "examples/costs/inception_v2.json"
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "scenario.toml").write_text(SCENARIO.format(costs=costs))
    for command, *arguments in (
        ("plan", "cluster.toml", str(costs), "--time-limit=0.1", "--simulate"),
        ("simulate", "scenario.toml"),
    ):
        arguments[0] = str(tmp_path / arguments[0])
        result = CliRunner().invoke(main.app, [command, *arguments, "--json"])
        assert result.exit_code == 0, result.output
        keys = set(keys_of(json.loads(result.stdout))) - NAMES
        named = set(re.findall(r"`(\w+)`", section(command)))
        assert len(keys) > 20
        assert keys - named == set()
