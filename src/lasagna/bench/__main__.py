"""``python -m lasagna.bench NAME``: run one benchmark.

A benchmark is a module with ``run(*, quick: bool) -> Result``, entered in `BENCHMARKS`. It is
imported only when it is run. Those in `PARTED` take ``only`` as well, names of parts, and ``out``;
those in `AGAIN` also ``again``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lasagna.bench.machine import noise_between, read_ticks
from lasagna.bench.report import Result, write_results
from lasagna.errors import LasagnaError

BENCHMARKS: Final[dict[str, str]] = {
    "baseline": "lasagna.bench.baseline",
    "branches": "lasagna.bench.branches",
    "fidelity": "lasagna.bench.fidelity",
    "local": "lasagna.bench.local",
    "epc": "lasagna.bench.epc",
    "overhead": "lasagna.bench.overhead",
    "paper": "lasagna.bench.paper",
    "plan": "lasagna.bench.plan",
    "policy": "lasagna.bench.policy",
    "scale": "lasagna.bench.scale",
}
PARTED: Final = frozenset(["fidelity", "local"])
AGAIN: Final = frozenset(["fidelity"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the arguments name.

    Returns:
        The exit code: 0; 1 if a bar falls short or the benchmark fails. Wrong arguments exit with 2
        and the list of benchmarks.
    """
    names = sorted(BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m lasagna.bench",
        description="Run one benchmark.",
        # In the usage, for argparse prints that with every error.
        usage="%(prog)s NAME [--quick] [--only PART ...] [--again] [--out OUT]\n"
        f"benchmarks: {', '.join(names)}",
    )
    parser.add_argument("name", choices=names, metavar="NAME", help="one of the benchmarks above")
    parser.add_argument("--quick", action="store_true", help="a short run, to NAME-quick.json")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="measure this part anew, and keep the others as they are",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="fidelity: simulate the real runs that were kept, and measure nothing",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.only and chosen.name not in PARTED:
        parser.error(f"{chosen.name} has no parts to choose from")
    if chosen.again and chosen.name not in AGAIN:
        parser.error(f"{chosen.name} keeps no runs that could be simulated again")
    options: dict[str, object] = {}
    if chosen.name in PARTED:
        options |= {"only": chosen.only, "out": chosen.out}
    if chosen.name in AGAIN:
        options["again"] = chosen.again
    try:
        return _run(chosen.name, options, quick=chosen.quick, out=chosen.out)
    except LasagnaError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _run(name: str, options: Mapping[str, object], *, quick: bool, out: Path) -> int:
    load_before = os.getloadavg()[0]
    before = read_ticks()
    result: Result = importlib.import_module(BENCHMARKS[name]).run(quick=quick, **options)
    return write_results(
        name,
        samples=result.samples,
        bars=result.bars,
        extra=result.extra,
        figure=result.figure,
        noise=noise_between(before, read_ticks(), load_before),
        quick=quick,
        out=out,
    )


if __name__ == "__main__":
    sys.exit(main())
