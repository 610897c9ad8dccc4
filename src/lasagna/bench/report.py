"""What a benchmark leaves behind: ``results/NAME.json``, ``results/NAME.png`` and a table.

A *bar* is a figure with the limit that it promises to keep. The JSON file holds every sample, the
bars, and where they were measured, so that a figure in the documentation can be traced to a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lasagna.bench.machine import Noise, read_commit, read_machine, read_versions
from lasagna.errors import UsageError
from lasagna.native import build_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT: Final = 1
"""Version of the JSON files' layout."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and the limit that it has to keep.

    Attributes:
        name: what was measured, for people.
        value: the figure. NaN never keeps a limit.
        limit: the least value allowed, or the greatest if ``higher_is_better`` is False. A value
            equal to it keeps it.
        unit: of both; empty for a ratio.
        higher_is_better: which side of the limit is good.
        ok: whether the value keeps the limit. Derived: a bar can't claim what its figures deny.
    """

    name: str
    value: float
    limit: float
    unit: str = ""
    higher_is_better: bool = True
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        kept = self.value >= self.limit if self.higher_is_better else self.value <= self.limit
        object.__setattr__(self, "ok", bool(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark's ``run(*, quick: bool)`` returns.

    Attributes:
        samples: every single measurement, by series.
        bars: the figures that count; falling short of one fails the run.
        extra: whatever else helps to read the samples. NumPy arrays and scalars are welcome.
        figure: a drawing of it.
    """

    samples: Mapping[str, Sequence[float] | np.ndarray[Any, Any]]
    bars: Sequence[Bar]
    extra: Mapping[str, object] = field(default_factory=dict)
    figure: Figure | None = None


_Row = TypeVar("_Row")


def read_rows(path: Path, kind: type[_Row]) -> list[_Row]:
    """Rows of a benchmark that is measured in parts; none where there is no file yet.

    Raises:
        UsageError: the file is not of this version.
    """
    if not path.exists():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[kind])  # type: ignore[valid-type]
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} is of another version: {error}; remove it") from None


def write_results(
    name: str,
    *,
    samples: Mapping[str, Sequence[float] | np.ndarray[Any, Any]],
    bars: Sequence[Bar],
    extra: Mapping[str, object] | None = None,
    figure: Figure | None = None,
    noise: Noise | None = None,
    quick: bool = False,
    out: Path = Path("results"),
    console: Console | None = None,
) -> int:
    """Write ``NAME.json`` and, if there is a figure, ``NAME.png``; print the bars.

    A quick run writes ``NAME-quick.*`` instead: it must not pass for a full one.

    Args:
        name: of the benchmark.
        samples: every single measurement, by series.
        bars: the figures that count.
        extra: whatever else helps to read the samples.
        figure: a drawing of it.
        noise: what else the machine did meanwhile.
        quick: whether this was a short run.
        out: folder to write to; made if missing.
        console: where to print; standard output by default.

    Returns:
        The exit code: 0, or 1 if a bar falls short.
    """
    console = console or Console()
    stem = f"{name}-quick" if quick else name
    document = {
        "format": FORMAT,
        "name": name,
        "quick": quick,
        "finished": datetime.now(UTC),
        "commit": read_commit(),
        "machine": read_machine(),
        "versions": read_versions(),
        "native": build_info(),
        "noise": noise,
        "bars": list(bars),
        "extra": extra or {},
        "samples": samples,
    }
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{stem}.json"]
    encoded = msgspec.json.encode(document, enc_hook=_encode_numpy)
    written[0].write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    if figure is not None:
        written.append(out / f"{stem}.png")
        figure.savefig(written[1], dpi=150, bbox_inches="tight")

    console.print(bars_table(stem, bars))
    if noise is not None and noise.warning is not None:
        console.print(f"warning: {noise.warning}", style="yellow", markup=False)
    console.print(f"wrote {' and '.join(map(str, written))}", markup=False, highlight=False)
    return 0 if all(bar.ok for bar in bars) else 1


def bars_table(title: str, bars: Sequence[Bar]) -> Table:
    """A table of the bars for a terminal."""
    table = Table(title=Text(title))
    table.add_column("bar")
    table.add_column("value", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("unit")
    table.add_column("")
    for bar in bars:
        side = "≥" if bar.higher_is_better else "≤"
        verdict = "[green]ok[/]" if bar.ok else "[bold red]falls short[/]"
        limit = f"{side} {_figure(bar.limit)}"
        # Text, for a name may hold what Rich takes for markup
        table.add_row(Text(bar.name), _figure(bar.value), limit, Text(bar.unit), verdict)
    return table


def _figure(value: float) -> str:
    """Four significant digits, never in scientific notation below a million."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _encode_numpy(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} can't be written to a results file")
