"""``lasagna seal``: an ONNX model in, a sealed package and the key to it out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lasagna.cli.keygen import (
    PRIVATE,
    PUBLIC,
    encode_owner_key,
    owner_public_key,
    read_owner_key,
    staged,
)
from lasagna.errors import UsageError
from lasagna.package.reader import Package
from lasagna.trust.model_keys import encode_model_keys
from lasagna.units import format_bytes, parse_bytes

if TYPE_CHECKING:  # these need ONNX Runtime, which takes a second to import
    from lasagna.models.seal import SealReport
    from lasagna.models.source import Source


class Only(StrEnum):
    """Which of the two variants."""

    PORTABLE = "portable"
    NATIVE = "native"


def seal(
    *,
    model: Annotated[
        Path | None, typer.Argument(help="The ONNX file. Its external data stays beside it.")
    ] = None,
    zoo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Seal a model of the zoo instead of a file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The package to write. [default: MODEL.lsg]"),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="The file for the package's key. [default: the package's, with .key]"),
    ] = None,
    owner_key: Annotated[
        Path, typer.Option(help="The key that signs; made if there is none.")
    ] = Path("owner.pem"),
    name: Annotated[
        str | None, typer.Option(help="What the model is called. [default: the file's name]")
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Fix an open dimension; can be repeated."),
    ] = None,
    slice_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most bytes of weights in a slice, such as 4MiB."),
    ] = None,
    memory_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most bytes of intermediate results in a slice."),
    ] = None,
    only: Annotated[
        Only | None, typer.Option(help="One variant instead of both.", case_sensitive=False)
    ] = None,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="Don't measure compute times.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
) -> None:
    """Seal an ONNX model: cut it into slices, encrypt and sign them.

    Run it where the model may lie in plaintext: on its owner's machine. The package can go to any
    server, the key only to a key broker.
    """
    # Whatever can be wrong with the arguments is found out before the long part.
    stem = model.stem if model and not zoo else zoo
    if not stem or (model and zoo):
        raise UsageError("give one model: an ONNX file, or --zoo and a name")
    output = output or Path(f"{stem}.lsg")
    keys = keys or output.parent / f"{output.stem}.key"
    _check_targets(output, keys, owner_key, force)
    owner = read_owner_key(owner_key) if owner_key.exists() else None
    dims = dict(map(_dimension, dim or ()))
    sizes = [parse_bytes(text) if text else None for text in (slice_bytes, memory_bytes)]

    from lasagna.models.seal import SealOptions
    from lasagna.models.seal import seal as seal_package

    console = Console(stderr=True)
    options = SealOptions(
        slice_bytes=sizes[0],
        memory_bytes=sizes[1],
        profile=not no_profile,
        portable=only is not Only.NATIVE,
        native=only is not Only.PORTABLE,
    )
    made = None
    with ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())
        report_stage = stack.enter_context(_progress(console, shown=not json_))
        report_stage("read the model", 0, 1)
        source = _source(model, zoo, dims)
        # All files are complete before the first takes its place.
        if owner is None:
            owner = Ed25519PrivateKey.generate()
            made = stack.enter_context(staged(owner_key, PRIVATE, replace=False))
            made.write_bytes(encode_owner_key(owner))
        key_file = stack.enter_context(staged(keys, PRIVATE, replace=force))
        package_file = stack.enter_context(staged(output, PUBLIC, replace=force))
        model_keys, report = seal_package(
            source, stem if name is None else name, owner, package_file, options, report_stage
        )
        key_file.write_bytes(encode_model_keys(model_keys))
    if made is not None:
        note = f"made an owner key, {owner_key}: it signs your packages, keep it where you seal"
        console.print(Text(note), soft_wrap=True)
    with Package(output) as package:
        package.verify_signature(owner_public_key(owner))
        digest = package.model_digest
    facts = _facts(report, output, keys, owner_key, digest)
    if json_:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(Console(), facts)


def _check_targets(output: Path, keys: Path, owner_key: Path, force: bool) -> None:
    if len({output.absolute(), keys.absolute(), owner_key.absolute()}) < 3:
        raise UsageError("the package, its key and the owner's key are three different files")
    for path in (output, keys, owner_key):
        if path.is_dir():
            raise UsageError(f"{path} is a directory")
        if not path.parent.is_dir():
            raise UsageError(f"can't write {path}: there is no directory {path.parent}")
        if path.exists() and not force and path != owner_key:
            raise UsageError(f"{path} exists; --force replaces it")


def _dimension(text: str) -> tuple[str, int]:
    name, equals, value = text.rpartition("=")
    if not (equals and name and value.isascii() and value.isdigit()):
        raise UsageError(f"{text!r} does not fix a dimension: write --dim NAME=VALUE")
    return name, int(value)


def _source(model: Path | None, zoo: str | None, dims: dict[str, int]) -> Source:
    from lasagna.models.source import load_source, prepare

    if zoo is None:
        assert model is not None
        return load_source(model, dims)
    from lasagna.models.zoo import catalog

    return prepare(catalog.load(zoo), dims)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: temporary files hold plaintext weights."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(console: Console, shown: bool) -> Iterator[Any]:
    """A bar for each stage, on a terminal; yields what ``seal`` reports to."""
    bars = Progress(
        TextColumn("{task.description:26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
    current = ("", bars.add_task("", total=1, visible=False))

    def report(what: str, done: int, total: int) -> None:
        nonlocal current
        name, task = current
        if what != name:
            _finish(bars, task)
            current = (what, bars.add_task(what, total=total))
        bars.update(current[1], completed=done, total=total)

    with bars:
        yield report
        _finish(bars, current[1])


def _finish(bars: Progress, task: Any) -> None:
    """Stop a bar's clock, as full as it can be."""
    bars.update(task, completed=next(one.total for one in bars.tasks if one.id == task))
    bars.stop_task(task)


def _facts(
    report: SealReport, output: Path, keys: Path, owner_key: Path, digest: bytes
) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "package": str(output),
        "keys": str(keys),
        "owner_key": str(owner_key),
        "name": manifest.name,
        "package_id": manifest.package_id.hex(),
        "model_digest": digest.hex(),
        "owner": manifest.owner.hex(),
        "file_bytes": report.file_bytes,
        "batchable": manifest.batchable,
        "batch_note": manifest.batch_note,
        "variants": [
            {
                "name": variant.name,
                "slices": len(variant.slices),
                "weight_bytes": variant.weight_bytes,
                "largest_slice_bytes": max(one.weight_bytes for one in variant.slices),
                "largest_workspace_bytes": max(one.workspace[0] for one in variant.slices),
                "self_check": report.self_check[variant.name],
            }
            for variant in manifest.variants
        ],
    }


def _show(console: Console, facts: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variant")
    for title in ("slices", "weights", "largest slice", "workspace", "self-check"):
        table.add_column(title, justify="right")
    for variant in facts["variants"]:
        table.add_row(
            Text(variant["name"]),
            str(variant["slices"]),
            format_bytes(variant["weight_bytes"]),
            format_bytes(variant["largest_slice_bytes"]),
            format_bytes(variant["largest_workspace_bytes"]),
            f"{variant['self_check']:.1e}",
        )
    console.print(table)
    console.print(
        "self-check: largest difference to plain ONNX Runtime, relative to the largest output",
        style="dim",
    )
    note = "takes batches" if facts["batchable"] else "takes no batches"
    lines = (
        ("batches", f"{note}: {facts['batch_note']}"),
        ("package", f"{facts['package']}, {format_bytes(facts['file_bytes'])}: for any server"),
        ("key", f"{facts['keys']}: for the key broker only"),
        ("owner", f"{facts['owner']} ({facts['owner_key']})"),
    )
    grid = Table.grid(padding=(0, 2))
    for title, text in lines:
        grid.add_row(Text(title, style="bold"), Text(text, overflow="fold"))
    console.print()
    console.print(grid)
