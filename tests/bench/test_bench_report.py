from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lasagna import native
from lasagna.bench.machine import Noise
from lasagna.bench.report import Bar, bars_table, write_results

FAST = Bar("throughput", 21.4, 20, "1/s")
SLOW = Bar("overhead", 1.31, 1.25, higher_is_better=False)


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write(out: Path, **keywords: Any) -> tuple[int, str]:
    """Write the results of a benchmark named probe; the exit code and what was printed."""
    printed = io.StringIO()
    arguments = {"samples": {}, "bars": []} | keywords
    code = write_results("probe", out=out, console=Console(file=printed, width=200), **arguments)
    return code, printed.getvalue()


@pytest.mark.parametrize(
    ("value", "higher_is_better", "ok"),
    [
        (2.0, True, True),
        (1.0, True, True),
        (0.9, True, False),
        (0.9, False, True),
        (1.0, False, True),
        (2.0, False, False),
        (math.nan, True, False),
        (math.nan, False, False),
    ],
)
def test_bar_is_ok_on_the_right_side_of_its_limit(
    value: float, higher_is_better: bool, ok: bool
) -> None:
    assert Bar("figure", value, 1.0, higher_is_better=higher_is_better).ok is ok


def test_bar_takes_numpy_scalars() -> None:
    assert Bar("figure", float(np.float64(2)), 1).ok is True
    assert Bar("figure", np.float64(2), 1).ok is True


@pytest.mark.parametrize(("bars", "code"), [([], 0), ([FAST], 0), ([FAST, SLOW], 1), ([SLOW], 1)])
def test_exit_code_is_1_if_a_bar_falls_short(tmp_path: Path, bars: list[Bar], code: int) -> None:
    assert write(tmp_path, bars=bars)[0] == code


def test_json_holds_samples_bars_and_provenance(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", samples={"a": [1.0, 2.0]}, bars=[SLOW])

    document = read(tmp_path / "new" / "folder" / "probe.json")
    assert document["name"] == "probe"
    assert document["samples"] == {"a": [1.0, 2.0]}
    assert document["bars"] == [
        {
            "name": "overhead",
            "value": 1.31,
            "limit": 1.25,
            "unit": "",
            "higher_is_better": False,
            "ok": False,
        }
    ]
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["numpy"] == np.__version__
    assert document["native"]["compiler"] == native.build_info().compiler
    assert document["finished"].endswith("Z")
    assert set(document) >= {"format", "commit", "noise", "quick", "extra"}


def test_numpy_values_become_plain_json(tmp_path: Path) -> None:
    extra = {"count": np.int64(3), "grid": np.eye(2), "missing": math.nan, "path": {"x": [1]}}
    write(tmp_path, samples={"a": np.array([0.5, 1.5])}, extra=extra)

    document = read(tmp_path / "probe.json")
    assert document["samples"] == {"a": [0.5, 1.5]}
    assert document["extra"] == {
        "count": 3,
        "grid": [[1, 0], [0, 1]],
        "missing": None,
        "path": {"x": [1]},
    }


def test_a_value_json_has_no_form_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object can't be written"):
        write(tmp_path, extra={"x": object()})

    assert list(tmp_path.iterdir()) == []


def test_figure_is_saved_beside_the_json(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])

    _, printed = write(tmp_path, figure=figure)

    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "probe.png") in printed


def test_quick_run_does_not_overwrite_a_full_one(tmp_path: Path) -> None:
    write(tmp_path, extra={"full": True})
    write(tmp_path, quick=True)

    assert read(tmp_path / "probe.json")["extra"] == {"full": True}
    assert read(tmp_path / "probe-quick.json")["quick"] is True


def test_noise_is_recorded_and_its_warning_shown(tmp_path: Path) -> None:
    noise = Noise(steal_percent=7.5, busy_percent=99, load_before=0.1, warning="not [so] quiet")

    _, printed = write(tmp_path, noise=noise)

    assert "warning: not [so] quiet" in printed
    assert read(tmp_path / "probe.json")["noise"]["steal_percent"] == 7.5


def test_quiet_run_prints_no_warning(tmp_path: Path) -> None:
    noise = Noise(steal_percent=0.1, busy_percent=50, load_before=0.1, warning=None)

    assert "warning" not in write(tmp_path, noise=noise)[1]


def test_table_shows_each_bar_its_limit_and_verdict() -> None:
    printed = io.StringIO()
    Console(file=printed, width=100).print(bars_table("t", [FAST, SLOW, Bar("[odd] name", 0, 0)]))

    text = printed.getvalue()
    assert "21.40" in text
    assert "≥ 20.00" in text
    assert "≤ 1.250" in text
    assert "1/s" in text
    assert "falls short" in text
    assert "[odd] name" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.8612, "0.8612"),
        (21.4, "21.40"),
        (12345.6, "12,346"),
        (0.00052, "0.0005200"),
        (5e-7, "5e-07"),
        (3e9, "3e+09"),
        (0.0, "0"),
        (-2.5, "-2.500"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_table_shows_four_digits(value: float, shown: str) -> None:
    printed = io.StringIO()
    Console(file=printed, width=100).print(bars_table("t", [Bar("b", value, 7)]))

    assert f" {shown} " in printed.getvalue()
