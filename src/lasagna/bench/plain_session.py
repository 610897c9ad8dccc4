"""The native candidate of the benchmarks: plain ONNX Runtime at its best for one thread.

``python -m lasagna.bench.plain_session MODEL.onnx`` is that as a process of its own. It answers
lines on standard input: a number of runs, for which it writes the seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

from lasagna.models.graph import Array
from lasagna.models.source import Source, load_source, open_session, random_inputs

Block: TypeAlias = Callable[[int], None]
"""Runs one candidate so many times."""


def native_session(source: Source) -> ort.InferenceSession:
    """One thread, every optimisation, ONNX Runtime's own arena."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return open_session(source, options)


def native_block(source: Source, inputs: dict[str, Array]) -> Block:
    """Runs of a native session."""
    session = native_session(source)

    def block(calls: int) -> None:
        for _ in range(calls):
            session.run(None, inputs)

    return block


def calls_in(seconds: float, block: Block, *, at_least: int) -> int:
    """How many calls take about so long."""
    block(at_least)
    start = time.perf_counter()
    block(at_least)
    return max(at_least, round(at_least * seconds / (time.perf_counter() - start)))


def main() -> None:
    """Answer lines until the input ends."""
    session = native_session(load_source(Path(sys.argv[1])))
    inputs = random_inputs(session, 1, np.random.default_rng(1))
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            session.run(None, inputs)
        sys.stdout.write(f"{time.perf_counter() - begin}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
