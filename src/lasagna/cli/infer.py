"""``lasagna infer``."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from lasagna.cli.options import AllowMeasurement, InsecureAllowEmulated, digests_of
from lasagna.errors import UsageError

_TOP = 5


def infer(
    url: Annotated[str, typer.Argument(help="The server, such as http://edge:8000.")],
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="NAME=FILE.npy for each input; the first axis counts rows."),
    ],
    allow_measurement: AllowMeasurement,
    broker_key: Annotated[
        list[str], typer.Option(help="Public key of a key broker to trust; may be repeated.")
    ],
    insecure_allow_emulated: InsecureAllowEmulated = False,
    digest: Annotated[
        str | None, typer.Option(help="The package that must answer, as lasagna seal showed it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the outputs to this .npz.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outputs as JSON.")] = False,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for each answer. A server that can't keep to it refuses at once."
        ),
    ] = 60.0,
    priority: Annotated[
        int, typer.Option(help="1 goes first, 9 last; 0 is the server's default, the same as 5.")
    ] = 0,
    tenant: Annotated[
        str, typer.Option(help="Whose request it is, where no proxy tells the server.")
    ] = "",
) -> None:
    """Run a model on a server, sealed for its enclave.

    The enclave is verified before anything is sent: its code must have an allowed measurement, and
    its secret must come from a trusted broker.
    """
    from lasagna.client.client import Client
    from lasagna.trust.policy import MeasurementIn

    arrays = dict(_read_input(text) for text in inputs)
    if len(arrays) != len(inputs):
        raise UsageError("an input is given twice")
    if output is not None and output.suffix != ".npz":
        raise UsageError(f"--output writes .npz files, not {output.name!r}")
    with Client(
        url,
        policy=MeasurementIn(digests_of("--allow-measurement", allow_measurement)),
        brokers=digests_of("--broker-key", broker_key),
        digests={model: next(iter(digests_of("--digest", [digest])))} if digest else None,
        insecure_allow_emulated=insecure_allow_emulated,
        timeout_s=timeout,
    ) as client:
        outputs = client.infer(model, arrays, priority=priority, tenant=tenant)
    if output is not None:
        _write_npz(output, outputs)
    if as_json:
        typer.echo(json.dumps(_plain(outputs), allow_nan=False))
    else:
        for name, array in outputs.items():
            typer.echo(f"{name}: {array.dtype} {list(array.shape)}")
            for line in _summary(array):
                typer.echo(f"  {line}")


def _read_input(text: str) -> tuple[str, NDArray[Any]]:
    name, equals, file = text.rpartition("=")
    if not equals or not name or not file:
        raise UsageError(f"--input takes NAME=FILE.npy, not {text!r}")
    path = Path(file)
    if path.suffix != ".npy":
        raise UsageError(
            f"input {name!r}: {path.name!r} is not an .npy file (numpy.save makes one)"
        )
    try:
        return name, np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"input {name!r}: can't read {path}: {error.strerror}") from None
    except (ValueError, EOFError):
        raise UsageError(f"input {name!r}: {path} is not a readable .npy file") from None


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    # numpy.savez takes the names as keyword arguments, among which it has some of its own.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _summary(array: NDArray[Any]) -> list[str]:
    """The largest values of each row, if it is a row of numbers."""
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        return []
    rows = array.reshape(len(array), -1)
    lines = []
    for number, row in enumerate(rows):
        best = np.argsort(-row.astype(np.float64), kind="stable")[:_TOP]
        listed = ", ".join(f"{index}: {row[index]:.4g}" for index in best)
        lines.append(f"row {number}, largest: {listed}")
    return lines


def _plain(outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "data": [_number(value) for value in array.reshape(-1).tolist()],
        }
        for name, array in outputs.items()
    }


def _number(value: float | bool) -> float | int | bool | str:
    """JSON has no NaN and infinities: write them as Protocol Buffers' JSON mapping does."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
