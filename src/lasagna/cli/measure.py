"""``lasagna measure``."""

from __future__ import annotations

import typer

from lasagna.tee.process import InsecureProcessBackend


def measure() -> None:
    """Print the measurement of this version's enclave code.

    It is what emulated evidence of an enclave says its code is: allow it in a broker or a client
    with --allow-measurement. An enclave under SGX has another (MRENCLAVE), which its processor
    measures.
    """
    typer.echo(InsecureProcessBackend().measurement().hex())
